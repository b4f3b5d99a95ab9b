"""Image quality of the pocket bundle."""
