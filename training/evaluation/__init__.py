"""Quality of an adapter against both bicubics."""
