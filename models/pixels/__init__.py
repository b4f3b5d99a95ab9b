"""Pixels: reading images, image formats, encoding."""
