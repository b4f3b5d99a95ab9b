"""LUA in a form for inference: the same weights and sums in another layout.

The affine part of each LayerNorm and the scale of the queries are folded into the following weights, which is exact.
One gather takes tokens from the window order of a block to that of the next, in place of roll and window cut, and puts
the windows that the shift mask touches last, so that the others share one bias. On a CPU, linear layers and
convolutions are packed for oneDNN once (`models/engines/packed_layers.py`), and a block runs some windows at a time,
which stay in the cache. `models/engines/cpu.py` chooses that form; `models/engines/compiled.py` compiles the one with
torch's own layers. `benchmarks/engines/run.py` measures them.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantleap.models.allocator import keep_freed_memory
from giantleap.models.engines.packed_layers import Layout, Norm, fold_norm
from giantleap.models.lua.network import Lua, ScaleHead, check_latent, pad_to_window
from giantleap.models.lua.spec import scaled_size
from giantleap.models.lua.swin import ResidualGroup, SwinBlock, shift_mask

HEAD_DIM_MULTIPLE = 8  # 30 -> 32: zeros that cost 3 % in the linear layers and save 8 to 14 % of the attention
GRIDS_KEPT = 8  # cached sizes; one of 256 x 256 at window 8 takes 2 MiB
TOKENS_AT_ONCE = {torch.float32: 512, torch.bfloat16: 1024}  # per thread; measured at 180 channels, 1 MiB of L2


@dataclass(frozen=True, slots=True)
class Grid:
    """The assignment of the tokens of one size to windows of one shift; masked windows are last.

    Args:
        gather: Token of each place in window order, [tokens].
        scatter: Its inverse.
        mask: For the windows at the end, [masked, 1, window^2, window^2], 0 or -100.
    """

    gather: Tensor
    scatter: Tensor
    mask: Tensor

    @classmethod
    def build(cls, batch: int, height: int, width: int, window: int, shift: int, like: Tensor) -> Self:
        """For `batch` latents of this size; the mask in the dtype of `like`, everything on its device."""
        nh, nw = height // window, width // window
        tokens = torch.arange(batch * height * width, device=like.device).view(batch, height, width)
        cut = torch.roll(tokens, (-shift, -shift), (1, 2)).view(batch, nh, window, nw, window)
        windows = cut.transpose(2, 3).reshape(batch, nh * nw, window**2)
        mask = shift_mask(nh, nw, window, like)
        touched = mask.flatten(1).any(1) & (shift > 0)
        gather = torch.cat([windows[:, ~touched].flatten(), windows[:, touched].flatten()])
        return cls(gather, torch.argsort(gather), mask[touched][:, None].repeat(batch, 1, 1, 1))


@dataclass(frozen=True, slots=True)
class Grids:
    """Both grids of one size, and the permutations from the window order of one to that of the other."""

    plain: Grid
    shifted: Grid
    to_plain: Tensor
    to_shifted: Tensor

    @classmethod
    def build(cls, batch: int, height: int, width: int, window: int, like: Tensor) -> Self:
        """See `Grid.build`."""
        plain, shifted = (Grid.build(batch, height, width, window, shift, like) for shift in (0, window // 2))
        return cls(plain, shifted, shifted.scatter[plain.gather], plain.scatter[shifted.gather])


class PackedBlock:
    """A `SwinBlock` on tokens; the module's docstring lists the folded operations."""

    def __init__(self, block: SwinBlock, layout: Layout) -> None:
        attn, mlp = block.attn, block.mlp
        dim, heads = attn.qkv.in_features, attn.heads
        head_dim = dim // heads
        padding, extra = -head_dim % HEAD_DIM_MULTIPLE, layout.width - dim
        weight, bias = fold_norm(block.norm1, attn.qkv)
        weight, bias = weight.view(3, heads, head_dim, dim).clone(), bias.view(3, heads, head_dim).clone()
        weight[0] *= head_dim**-0.5
        bias[0] *= head_dim**-0.5
        weight, bias = F.pad(weight, (0, 0, 0, padding)), F.pad(bias, (0, padding))
        back = F.pad(attn.proj.weight.detach().view(dim, heads, head_dim), (0, padding))
        self.qkv = layout.linear(weight.reshape(-1, dim), bias.flatten(), columns=extra)
        self.proj = layout.linear(back.reshape(dim, -1), attn.proj.bias, rows=extra)
        self.fc1 = layout.linear(*fold_norm(block.norm2, mlp.fc1), columns=extra, gelu=True)
        self.fc2 = layout.linear(mlp.fc2.weight, mlp.fc2.bias, rows=extra)
        self.bias = attn.position_bias().detach().to(layout.dtype).contiguous()[None]
        # Without affine weights the CPU kernel takes a path that is half as fast.
        one, zero = self.bias.new_ones(dim), self.bias.new_zeros(dim)
        self.norm1, self.norm2 = Norm(dim, block.norm1.eps, one, zero), Norm(dim, block.norm2.eps, one, zero)
        self.heads, self.head_dim = heads, head_dim + padding
        self.window, self.shifted = block.window, block.shift > 0
        self.tokens_at_once = TOKENS_AT_ONCE[layout.dtype] if layout.packed else None
        self.packed, self.dtype = layout.packed, layout.dtype

    def __call__(self, x: Tensor, enter: Tensor, grid: Grid) -> Tensor:
        """The whole block in the window order of `grid`, on a CPU some windows at a time, which stay in its cache.

        Shape:
            x [tokens, width] in an order from which `enter` [tokens] gathers that of `grid` -> [tokens, width].
        """
        n = self.window**2
        y = torch.empty_like(x)
        for start, stop, mask in self._portions(grid):
            part = slice(n * start, n * stop)
            self._run(x.index_select(0, enter[part]), mask, y[part])
        return y

    def _portions(self, grid: Grid) -> list[tuple[int, int, Tensor]]:
        """First window, end window and mask of each portion."""
        windows, masked = len(grid.gather) // self.window**2, len(grid.mask)
        if self.tokens_at_once is None:
            return [(0, windows, grid.mask)]
        free = windows - masked
        max_windows = max(1, self.tokens_at_once * torch.get_num_threads() // self.window**2)
        starts = [*_starts(0, free, max_windows), *_starts(free, windows, max_windows), windows]
        return [
            (start, stop, grid.mask[max(0, start - free) : max(0, stop - free)]) for start, stop in pairwise(starts)
        ]

    def _run(self, x: Tensor, mask: Tensor, out: Tensor) -> None:
        """Shape: x, out [windows * window^2, width]; mask [masked, 1, window^2, window^2] of the last windows."""
        qkv = self.qkv(self.norm1(x)).view(-1, self.window**2, 3, self.heads, self.head_dim)
        attend = self._attention_math if self.uses_attention_math() else self._attention_fused
        y = attend(qkv.permute(2, 0, 3, 1, 4), mask).transpose(1, 2).reshape(len(x), -1)
        x = self.proj(y).add_(x)  # oneDNN's own fused addition is no faster: `benchmarks/engines/parts`
        torch.add(self.fc2(self.fc1(self.norm2(x))), x, out=out)

    def uses_attention_math(self) -> bool:
        """Whether two products are faster than the fused kernel.

        On Zen 5 they are 1.6 times as fast in bfloat16, and faster in float32 with more than one thread, which the
        kernel uses poorly (`benchmarks/engines/parts`).
        """
        return self.packed and (self.dtype == torch.bfloat16 or torch.get_num_threads() > 1)

    def _attention_fused(self, parts: Tensor, mask: Tensor) -> Tensor:
        """Shape: [3, windows, heads, window^2, head_dim] -> [windows, heads, window^2, head_dim]."""
        if not len(mask):
            return _fused(parts, self.bias)
        masked = _fused(parts[:, -len(mask) :], self.bias + mask)
        if len(mask) == parts.shape[1]:
            return masked
        free = _fused(parts[:, : -len(mask)], self.bias)
        return torch.cat([free.transpose(1, 2), masked.transpose(1, 2)]).transpose(1, 2)  # in the kernel's own layout

    def _attention_math(self, parts: Tensor, mask: Tensor) -> Tensor:
        """See `_attention_fused`."""
        q, k, v = parts.contiguous().unbind(0)
        logits = (q @ k.transpose(-2, -1)).add_(self.bias)
        if len(mask):
            logits[-len(mask) :] += mask
        return logits.softmax(-1) @ v


def _starts(first: int, end: int, max_windows: int) -> list[int]:
    """Starts of portions of nearly equal size; a portion of few windows would waste the setup of a product."""
    count = -(-(end - first) // max_windows)
    return [first + index * (end - first) // count for index in range(count)]


def _fused(parts: Tensor, bias: Tensor) -> Tensor:
    q, k, v = parts.unbind(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


class PackedLua:
    """A `Lua` in a form for inference, with copies of its weights.

    Args:
        net: The network, in float32.
        dtype: float32 or bfloat16 (with torch's layers also float16); input and output are float32.
        packed: Layers packed for oneDNN, on a CPU; otherwise torch's layers on the device of the network.
        width_multiple: Pads the backbone with zero channels to a multiple of this, for kernels that need aligned rows.
    """

    def __init__(self, net: Lua, dtype: torch.dtype, packed: bool = True, width_multiple: int = 1) -> None:
        self.spec, self.dtype = net.spec, dtype
        if packed:
            keep_freed_memory()
        dim = net.spec.embed_dim
        extra = -dim % width_multiple
        layout = Layout(dtype, packed, dim + extra)
        self._layout = layout
        groups = [cast(ResidualGroup, layer) for layer in net.layers]
        self.groups = [
            (
                [PackedBlock(cast(SwinBlock, block), layout) for block in group.residual_group.blocks],
                layout.conv(group.conv, rows=extra, columns=extra),
            )
            for group in groups
        ]
        self._first = layout.conv(net.conv_first, rows=extra)
        self._after_body = layout.conv(net.conv_after_body, rows=extra, columns=extra)
        self._first_norm, self._last_norm = _norm_of(net.patch_embed.norm, dtype), _norm_of(net.norm, dtype)
        self._heads = {
            scale: _pack_head(cast(ScaleHead, net.heads[f"x{scale}"]), layout, extra) for scale in net.spec.scales
        }
        self._skips = copy.deepcopy(net.skips).float() if net.spec.linear_skip else None
        mean = net.latent_mean if net.spec.latent_norm else net.image_mean if net.spec.image_mean is not None else None
        self._mean = None if mean is None else mean.detach().clone().view(-1, 1, 1)
        self._std = net.latent_std.detach().clone().view(-1, 1, 1) if net.spec.latent_norm else None
        self._grids: OrderedDict[tuple[int, int, int], Grids] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, latent: Tensor, scale: float) -> Tensor:
        """See `Lua.forward`."""
        check_latent(self.spec, latent, (scale,))
        height, width = latent.shape[-2:]
        padded = pad_to_window(latent.float(), self.spec.window)
        upscaled = self.core(padded, self.grids_of(padded), int(scale))
        return upscaled[..., : scaled_size(height, scale), : scaled_size(width, scale)]

    def core(self, latent: Tensor, grids: Grids, scale: int) -> Tensor:
        """See `Lua.core`; `grids` come from `grids_of`."""
        x = latent if self._mean is None else latent - self._mean
        x = x if self._std is None else x / self._std
        with torch.autocast(latent.device.type, enabled=False):  # it would compute the norms in float32
            features = self._features(x.to(self.dtype), grids)
            for layer in self._heads[scale]:
                features = layer(features)
        y = features.float()
        if self.spec.bicubic_skip:
            y = y + F.interpolate(x, scale_factor=float(scale), mode="bicubic")
        elif self._skips is not None:
            with torch.autocast(latent.device.type, enabled=False):
                y = y + self._skips[f"x{scale}"](x)
        y = y if self._std is None else y * self._std
        return y if self._mean is None else y + self._mean

    def _features(self, x: Tensor, grids: Grids) -> Tensor:
        """Shape: [batch, channels, height, width] -> [batch, width of the backbone, height, width]."""
        dim = self._layout.width
        shape = (x.shape[0], x.shape[2], x.shape[3], dim)
        shallow = self._first(x.contiguous(memory_format=torch.channels_last))
        tokens = self._first_norm(shallow.permute(0, 2, 3, 1).reshape(-1, dim))
        for blocks, conv in self.groups:
            y = _run_blocks(blocks, tokens, grids)
            maps = conv.add(y.view(shape).permute(0, 3, 1, 2), tokens.view(shape).permute(0, 3, 1, 2))
            tokens = maps.permute(0, 2, 3, 1).reshape(-1, dim)
        return self._after_body.add(self._last_norm(tokens).view(shape).permute(0, 3, 1, 2), shallow)

    def grids_of(self, padded: Tensor) -> Grids:
        """The grids of a size; those of recent sizes are cached."""
        key = (padded.shape[0], padded.shape[2], padded.shape[3])
        grids = self._grids.pop(key, None)
        if grids is None:
            grids = Grids.build(*key, self.spec.window, padded.new_empty(0, dtype=self.dtype))
        self._grids[key] = grids
        while len(self._grids) > GRIDS_KEPT:
            self._grids.popitem(last=False)
        return grids


def _run_blocks(blocks: Sequence[PackedBlock], tokens: Tensor, grids: Grids) -> Tensor:
    """Run the blocks of a group one after the other, each in its own window order.

    Shape:
        [tokens, width] in raster order -> the same.
    """
    enters: dict[tuple[bool | None, bool], Tensor] = {
        (None, False): grids.plain.gather,
        (None, True): grids.shifted.gather,
        (False, True): grids.to_shifted,
        (True, False): grids.to_plain,
    }
    order: bool | None = None  # whether the windows are shifted; None is row by row
    for block in blocks:
        grid = grids.shifted if block.shifted else grids.plain
        if order == block.shifted:  # of a network that shifts no window (`LuaSpec.shift`)
            enter = torch.arange(len(tokens), device=tokens.device)
        else:
            enter = enters[order, block.shifted]
        tokens = block(tokens, enter, grid)
        order = block.shifted
    return tokens.index_select(0, (grids.shifted if order else grids.plain).scatter)


def _norm_of(norm: nn.LayerNorm, dtype: torch.dtype) -> Norm:
    return Norm(norm.normalized_shape[0], norm.eps, norm.weight.detach().to(dtype), norm.bias.detach().to(dtype))


def _pack_head(head: ScaleHead, layout: Layout, extra: int) -> list[Callable[[Tensor], Tensor]]:
    before, leaky = head.conv_before
    doublings = [m if isinstance(m, nn.PixelShuffle) else layout.conv(m) for m in head.upsample]
    slope = cast(nn.LeakyReLU, leaky).negative_slope
    return [layout.conv(before, columns=extra, slope=slope), *doublings, layout.conv(head.conv_last)]
