"""Transfer the pocket adapter to an autoencoder with 12 channels and compare with ten times the steps from scratch."""
