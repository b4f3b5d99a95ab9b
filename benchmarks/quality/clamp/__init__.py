"""Compare LUA with and without the latent clamp, on latents like those of the training and on others."""
