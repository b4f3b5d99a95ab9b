"""The service under load, and the queue alone."""
