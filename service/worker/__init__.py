"""The worker: claims jobs, runs them in batches on one device, ends them. Start at `process.py`, then `loop.py`."""
