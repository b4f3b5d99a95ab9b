"""The autoencoder of stride 4 and its adapter: `python -m giantleap.training.pocket.stride4`."""
