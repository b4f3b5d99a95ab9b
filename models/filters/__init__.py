"""Filters of other packages that see decoded images and may refuse them."""
