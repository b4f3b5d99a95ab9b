"""Encoding and decoding with a VAE, whole or in exact strips."""
