"""Re-diffusion: large images by sampling again, to compare with LUA. `models/methods/draw.py` chooses the method."""
