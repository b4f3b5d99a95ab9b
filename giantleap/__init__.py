"""Giantleap: latents enlarged by a Latent Upscaler Adapter, in Python and as a service."""
