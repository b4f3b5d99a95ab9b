"""Images per second by batch size, and what the worker's policy makes of it."""
