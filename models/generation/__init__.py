"""Runs a stock diffusers pipeline up to its latent."""
