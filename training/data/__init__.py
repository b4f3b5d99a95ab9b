"""Training pairs: prepared from pictures, stored and read."""
