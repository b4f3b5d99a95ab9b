"""Measure what the worker's pipeline gives, against a worker that does everything in turn, in one run."""
