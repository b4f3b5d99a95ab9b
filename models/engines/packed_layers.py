"""Layers of the packed LUA: torch's operators, or weights packed for oneDNN with the following operation fused.

`Layout` chooses between them; `models/engines/packed_lua.py` builds the network.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """A linear layer and an optional GELU, by torch's operators."""

    weight: Tensor
    bias: Tensor
    gelu: bool = False

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor, dtype: torch.dtype, gelu: bool = False) -> Self:
        """Convert weights to the layer's type and layout."""
        return cls(weight.to(dtype).contiguous(), bias.to(dtype).contiguous(), gelu)

    def __call__(self, x: Tensor) -> Tensor:
        """Shape: [..., in] -> [..., out]."""
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if self.gelu else y


class PackedLinear(PlainLinear):
    """A linear layer with a weight in oneDNN's layout and the GELU fused."""

    __slots__ = ()

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor, dtype: torch.dtype, gelu: bool = False) -> Self:
        """Convert weights to the layer's type and layout."""
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), None)
        return cls(packed, bias.to(dtype).contiguous(), gelu)

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer."""
        after, form = ("gelu", "none") if self.gelu else ("none", "")
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, after, [], form)
        return y


@dataclass(frozen=True, slots=True)
class PlainConv:
    """A convolution of stride 1, channels last, and an optional LeakyReLU, by torch's operators."""

    weight: Tensor
    bias: Tensor
    padding: list[int]
    slope: float | None = None

    @classmethod
    def pack(
        cls, weight: Tensor, bias: Tensor, padding: list[int], dtype: torch.dtype, slope: float | None = None
    ) -> Self:
        """Convert weights to the layer's type and layout."""
        last = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        return cls(last, bias.to(dtype).contiguous(), padding, slope)

    def __call__(self, x: Tensor) -> Tensor:
        """Shape: [batch, in, height, width] -> [batch, out, height, width], channels last."""
        y = F.conv2d(x, self.weight, self.bias, padding=self.padding)
        return y if self.slope is None else F.leaky_relu(y, self.slope)

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """The layer's output plus `other`; oneDNN's fused addition is no faster."""
        return self(x).add_(other)


class PackedConv(PlainConv):
    """A convolution with a weight in oneDNN's layout."""

    __slots__ = ()

    @classmethod
    def pack(
        cls, weight: Tensor, bias: Tensor, padding: list[int], dtype: torch.dtype, slope: float | None = None
    ) -> Self:
        """Convert weights to the layer's type and layout."""
        dense = weight.to(dtype).contiguous().to_mkldnn()  # the only type that the reorder takes
        packed: Tensor = torch.ops.aten.mkldnn_reorder_conv2d_weight(dense, padding, [1, 1], [1, 1], 1)
        return cls(packed, bias.to(dtype).contiguous(), padding, slope)

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer."""
        after, scalars = ("none", []) if self.slope is None else ("leaky_relu", [self.slope])
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, self.padding, [1, 1], [1, 1], 1, after, scalars, ""
        )
        return y


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of weights.

    Args:
        dtype: The compute type.
        packed: Packed for oneDNN; otherwise torch's operators.
        width: Channels of the backbone, at least `embed_dim`; the rest are zeros.
    """

    dtype: torch.dtype
    packed: bool
    width: int

    def linear(self, weight: Tensor, bias: Tensor, rows: int = 0, columns: int = 0, gelu: bool = False) -> PlainLinear:
        """A layer padded by `rows` zero outputs and `columns` zero inputs."""
        kind = PackedLinear if self.packed else PlainLinear
        weight, bias = weight.detach(), bias.detach()
        return kind.pack(F.pad(weight, (0, columns, 0, rows)), F.pad(bias, (0, rows)), self.dtype, gelu)

    def conv(self, conv: nn.Module, rows: int = 0, columns: int = 0, slope: float | None = None) -> PlainConv:
        """See `linear`."""
        if not isinstance(conv, nn.Conv2d) or conv.bias is None or isinstance(conv.padding, str):
            raise TypeError(f"found {conv}, expected a convolution with a bias and a padding in pixels")
        kind = PackedConv if self.packed else PlainConv
        weight = F.pad(conv.weight.detach(), (0, 0, 0, 0, 0, columns, 0, rows))
        return kind.pack(weight, F.pad(conv.bias.detach(), (0, rows)), list(conv.padding), self.dtype, slope)


@dataclass(frozen=True, slots=True)
class Norm:
    """A LayerNorm over the `dim` true channels of a backbone that may be wider."""

    dim: int
    eps: float
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Shape: [tokens, width] -> the same."""
        if x.shape[-1] == self.dim:
            return F.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)
        y = F.layer_norm(x[..., : self.dim], (self.dim,), self.weight, self.bias, self.eps)
        return F.pad(y, (0, x.shape[-1] - self.dim))


def fold_norm(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that takes normalized tokens without the norm's affine part.

    W (g * n + b) + c = (W diag(g)) n + (W b + c).
    """
    weight = linear.weight.detach()
    return weight * norm.weight.detach(), linear.bias.detach() + weight @ norm.bias.detach()
