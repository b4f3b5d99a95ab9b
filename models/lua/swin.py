"""Swin blocks in raster order, and the attention biases that they share.

The residual stream stays [batch, height, width, dim]; windows exist only inside a block. Biases depend on the size of
the input through the shift mask, so they are arguments of the blocks and never buffers. `models/lua/network.py`
composes the blocks.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantleap.models.lua.spec import LuaSpec

MASK_VALUE = -100.0  # the published value; exp(-100) is negligible


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias per relative position."""

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.window, self.heads = window, heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def position_bias(self) -> Tensor:
        """The learned bias of every pair of positions in a window.

        Shape:
            [heads, window^2, window^2].
        """
        w, table = self.window, self.relative_position_bias_table
        steps = torch.arange(w, device=table.device)
        offset = steps[:, None] - steps[None, :] + w - 1  # 0 .. 2w-2
        index = offset[:, None, :, None] * (2 * w - 1) + offset[None, :, None, :]  # [row, col, row', col']
        flat: Tensor = table.index_select(0, index.reshape(-1))
        return flat.view(w * w, w * w, self.heads).permute(2, 0, 1)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attend within each window; a bias with a window axis is shared by the batch.

        Shape:
            x [batch, windows, window^2, dim], bias [(windows,) heads, window^2, window^2] -> as x.
        """
        batch, windows, n, dim = x.shape
        head_dim = dim // self.heads
        qkv = self.qkv(x).view(batch, windows, n, 3, self.heads, head_dim).permute(3, 0, 1, 4, 2, 5)
        # The fused kernels and the ONNX converter take four dimensions; windows join the axis over which the bias
        # broadcasts without a copy.
        lead = (batch * windows, self.heads) if bias.dim() == 3 else (batch, windows * self.heads)
        q, k, v = (t.reshape(*lead, n, head_dim) for t in qkv.unbind(0))
        y = _attend(q, k, v, bias.reshape(1, lead[1], n, n).to(q.dtype))
        y = y.reshape(batch, windows, self.heads, n, head_dim).transpose(2, 3)
        out: Tensor = self.proj(y.reshape(batch, windows, n, dim))
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    # The fused CPU kernel has no gradient for a bias, and PyTorch's fallback is 1.35 times as slow as this.
    if bias.requires_grad and q.device.type == "cpu":
        logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1) + bias
        return logits.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [..., dim] -> [..., dim]."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class SwinBlock(nn.Module):
    """Window attention and an MLP, each after a LayerNorm and with a residual.

    Odd blocks shift their windows by half a window (`LuaSpec.shift`). Whether a block shifts depends on its place and
    never on the size of the input, as in a network trained on patches larger than the window.
    """

    def __init__(self, dim: int, window: int, heads: int, mlp_hidden: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_hidden)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Shape: x [batch, height, width, dim], multiples of the window; bias as `WindowAttention.forward`."""
        batch, height, width, dim = x.shape
        w = self.window
        nh, nw = height // w, width // w
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = y.view(batch, nh, w, nw, w, dim).transpose(2, 3).reshape(batch, nh * nw, w * w, dim)
        y = self.attn(y, bias)
        y = y.view(batch, nh, nw, w, w, dim).transpose(2, 3).reshape(batch, height, width, dim)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y
        z: Tensor = self.mlp(self.norm2(x))
        return x + z


class BlockGroup(nn.Module):
    """The blocks of one residual group (the name level `residual_group` of the published files)."""

    def __init__(self, spec: LuaSpec, depth: int, heads: int) -> None:
        super().__init__()
        shifts = [spec.window // 2 if spec.shift and j % 2 else 0 for j in range(depth)]
        self.blocks = nn.ModuleList(
            SwinBlock(spec.embed_dim, spec.window, heads, spec.mlp_hidden, shift) for shift in shifts
        )


class ResidualGroup(nn.Module):
    """RSTB: Swin blocks, then a 3x3 convolution, then a residual."""

    def __init__(self, spec: LuaSpec, depth: int, heads: int) -> None:
        super().__init__()
        self.residual_group = BlockGroup(spec, depth, heads)
        self.conv = nn.Conv2d(spec.embed_dim, spec.embed_dim, 3, padding=1)

    def forward(self, x: Tensor, biases: Iterator[Tensor]) -> Tensor:
        """Shape: x [batch, height, width, dim]; takes one bias per block."""
        y = x
        for block in self.residual_group.blocks:
            y = block(y, next(biases))
        return x + to_tokens(self.conv(to_maps(y)))


def shift_mask(nh: int, nw: int, window: int, like: Tensor) -> Tensor:
    """Separate the regions that the cyclic shift brings together in the last row and column of windows.

    It uses comparisons instead of assignments to slices, so that it exports with any size.

    Returns:
        [nh * nw, window^2, window^2], 0 or -100, in the dtype and on the device of `like`.
    """
    wrapped = torch.arange(window, device=like.device) >= window - window // 2
    rows = (torch.arange(nh, device=like.device) == nh - 1)[:, None] & wrapped
    cols = (torch.arange(nw, device=like.device) == nw - 1)[:, None] & wrapped
    n = window * window
    shape = (nh, nw, window, window)
    row = rows[:, None, :, None].expand(shape).reshape(nh * nw, n)
    col = cols[None, :, None, :].expand(shape).reshape(nh * nw, n)
    apart = (row[:, :, None] ^ row[:, None, :]) | (col[:, :, None] ^ col[:, None, :])
    return apart.to(like.dtype) * MASK_VALUE


def build_biases(blocks: Sequence[SwinBlock], nh: int, nw: int) -> Iterator[Tensor]:
    """One attention bias per block, for a grid of `nh` by `nw` windows, built lazily."""
    mask = shift_mask(nh, nw, blocks[0].window, blocks[0].attn.relative_position_bias_table)
    return _add_mask(blocks, (block.attn.position_bias() for block in blocks), mask)


def _add_mask(blocks: Sequence[SwinBlock], biases: Iterable[Tensor], mask: Tensor) -> Iterator[Tensor]:
    for block, bias in zip(blocks, biases, strict=True):
        yield bias + mask[:, None] if block.shift else bias


class BiasCache:
    """Caches the parts of `build_biases` for inference: the biases of the blocks and the masks of recent sizes.

    Biases are valid while their tables are the same tensors at the same version, so optimizer steps, in-place averaging
    and loading refresh them. Their sums with a mask are not cached: that was no faster and 25 times as large.

    Args:
        limit_bytes: Of all masks; the least recently used are dropped first, and a larger one is built in every call.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._tables: list[Tensor] = []
        self._versions: list[int] = []
        self._biases: list[Tensor] = []
        self._masks: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def get(self, blocks: Sequence[SwinBlock], nh: int, nw: int) -> Iterator[Tensor]:
        """See `build_biases`."""
        tables: list[Tensor] = [block.attn.relative_position_bias_table for block in blocks]
        if any(table.is_inference() for table in tables):  # inference tensors have no version
            return build_biases(blocks, nh, nw)
        versions = [table._version for table in tables]
        if versions != self._versions or any(a is not b for a, b in zip(tables, self._tables, strict=True)):
            self._tables, self._versions = tables, versions
            self._biases = [block.attn.position_bias().contiguous() for block in blocks]
        return _add_mask(blocks, self._biases, self._mask(nh, nw, blocks[0].window, tables[0]))

    def _mask(self, nh: int, nw: int, window: int, like: Tensor) -> Tensor:
        mask = self._masks.pop((nh, nw), None)
        if mask is None:
            mask = shift_mask(nh, nw, window, like)
        if mask.nbytes <= self.limit_bytes:
            self._masks[nh, nw] = mask
        while self.mask_bytes > self.limit_bytes:
            self._masks.popitem(last=False)
        return mask

    @property
    def mask_bytes(self) -> int:
        """Size of the cached masks."""
        return sum(mask.nbytes for mask in self._masks.values())

    @property
    def empty(self) -> bool:
        """Whether nothing is cached."""
        return not self._biases and not self._masks

    def clear(self) -> None:
        """Drop everything."""
        self._tables, self._versions, self._biases = [], [], []
        self._masks.clear()


def to_tokens(maps: Tensor) -> Tensor:
    """Channels last, contiguous; without a copy if a convolution returned that order.

    Shape:
        [batch, dim, height, width] -> [batch, height, width, dim].
    """
    return maps.permute(0, 2, 3, 1).contiguous()


def to_maps(tokens: Tensor) -> Tensor:
    """The inverse of `to_tokens`, always a view."""
    return tokens.permute(0, 3, 1, 2)
