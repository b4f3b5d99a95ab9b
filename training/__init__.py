"""Train the adapter for any VAE with the paper's curriculum; see `giantleap.training.run`."""
