"""Scripts behind every figure in the documentation; see CONTRIBUTING.md."""
