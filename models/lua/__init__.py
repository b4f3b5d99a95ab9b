"""The Latent Upscaler Adapter: network, specification and weights."""
