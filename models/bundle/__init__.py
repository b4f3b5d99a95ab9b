"""Bundles: what can be served, how a descriptor is read and its weights are pulled."""
