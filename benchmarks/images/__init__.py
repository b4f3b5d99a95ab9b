"""What images cost: decoding, encoding, provenance."""
