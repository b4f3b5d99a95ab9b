"""Evaluate the pocket bundle on the six held-out photographs, as `giantleap train evaluate` does."""
