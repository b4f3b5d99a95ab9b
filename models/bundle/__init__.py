"""Bundles: reading descriptors, checking them, and pulling weights."""
