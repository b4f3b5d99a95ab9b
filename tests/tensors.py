"""Comparison of tensors in tests."""

from torch import Tensor


def largest_difference(left: Tensor, right: Tensor) -> float:
    """The maximum absolute difference of two finite tensors of the same shape."""
    assert left.shape == right.shape and left.isfinite().all() and right.isfinite().all()
    return float((left.double() - right.double()).abs().max())
