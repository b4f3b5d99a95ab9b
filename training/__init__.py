"""Training of the adapter for any VAE by the paper's curriculum. Start at `giantleap.training.run`."""
