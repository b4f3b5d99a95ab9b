"""Routes that speak the protocol of another service: OpenAI images, KServe v2, the diffusers remote VAE."""
