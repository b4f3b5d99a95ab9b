"""Decode methods compared: full-size decoders one by one, the pocket bundle's by several ways in turns."""
