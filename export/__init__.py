"""Exports LUA and the VAE decoder for other engines, each artifact compared with PyTorch."""
