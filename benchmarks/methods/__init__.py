"""Time the stages of every method of a bundle at each scale."""
