"""Artifacts for engines: a graph per scale head and one of the decoder, compared with PyTorch before they count."""
