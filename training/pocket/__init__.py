"""Make the weights of the pocket bundle: `python -m giantleap.training.pocket`."""
