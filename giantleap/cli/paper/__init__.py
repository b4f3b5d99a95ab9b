"""`giantleap bench paper`: every method of a bundle at every size, beside the figures of Table 1 of the LUA paper."""
