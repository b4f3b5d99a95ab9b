"""The commands below `giantleap bench`."""
