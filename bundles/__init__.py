"""What can be served: `pocket` with its weights, and descriptors of models to pull."""
