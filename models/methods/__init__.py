"""Re-diffusion: large images by sampling again, to compare with LUA. `sampling.py` chooses the method."""
