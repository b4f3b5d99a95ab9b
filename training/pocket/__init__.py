"""How the pocket bundle's weights are made: `python -m giantleap.training.pocket`."""
