"""Time the parts of one Swin block on this CPU, with the alternatives that were slower."""
