"""HiDiffusion: deep blocks see maps of the size that they were trained at, attention of the largest maps in windows.

In early steps the UNet halves its maps once more, in a block ("pool") or in a convolution ("stride"); in all steps
self-attention at the first level that has any works in four windows, shifted at random.

Ref: arXiv 2311.17528; steps and places of SDXL and SD 1.5 as its authors set them, by level.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.methods.unet_hooks import (
    Geometry,
    attention_level,
    down_block,
    geometry_inside,
    pair_end,
    up_block,
)
from giantleap.models.methods.views import NoiseSource

_POOLED_LEVEL = 1
_LARGE = 4  # times the size that the UNet was trained at


@dataclass(frozen=True, slots=True)
class HiDiffusionPlan:
    """In which steps the maps are halved once more.

    Args:
        pool: Steps with a pooled block.
        stride: Steps with a convolution of stride 4.
    """

    pool: range
    stride: range


def plan_hidiffusion(unet: Any, height: int, width: int, steps: int) -> HiDiffusionPlan:
    """The authors' steps for SDXL, which has no attention at level 0, or for SD 1.5, which has.

    Args:
        unet: Of either kind.
        height: Of the final latent.
        width: Likewise.
        steps: Denoising steps.
    """
    is_large = min(height, width) >= _LARGE * unet.config.sample_size
    if attention_level(unet) == 0:
        ends = (int(0.3 * steps), int(0.7 * steps)) if is_large else (0, int(0.4 * steps))
        return HiDiffusionPlan(range(ends[0]), range(ends[1]))
    if is_large:
        return HiDiffusionPlan(range(int(0.7 * steps)), range(int(0.3 * steps)))
    middle = int(8 / 50 * steps)
    return HiDiffusionPlan(range(middle, int(0.4 * steps)), range(middle))


class HiDiffusion:
    """The state of one image's run; the hooks read it.

    Args:
        plan: What happens when.
        noise: Draws the shifts of windows.
    """

    def __init__(self, plan: HiDiffusionPlan, noise: NoiseSource) -> None:
        self._plan = plan
        self._noise = noise
        self.pools = self.strides = False
        self.latent_size = (0, 0)
        self.pooled_from = (0, 0)
        self.skip_sizes: dict[int, tuple[int, int]] = {}

    def begin(self, index: int) -> None:
        """Set the state of a step."""
        self.pools, self.strides = index in self._plan.pool, index in self._plan.stride

    def draw_shift(self, window: Sequence[int]) -> tuple[int, int]:
        """By how many quarters of their sides windows are moved; the same number on both axes."""
        quarters = self._noise.integer(0, 3)
        return window[0] // 4 * quarters, window[1] // 4 * quarters


@contextmanager
def hidiffusion(unet: Any, plan: HiDiffusionPlan, noise: NoiseSource) -> Iterator[HiDiffusion]:
    """Change a UNet inside the block.

    Raises:
        ValueError: The UNet has attention at its last level only, where nothing can be halved.
    """
    level, levels = attention_level(unet), len(unet.down_blocks)
    if level > levels - 2:
        raise ValueError("hidiffusion needs a UNet with attention above its last level; choose another method")
    state = HiDiffusion(plan, noise)
    with ExitStack() as stack:
        _remember_latent_size(stack, unet, state)
        _pool_block(stack, unet, state)
        geometry_inside(
            stack,
            down_block(unet, level).downsamplers[0].conv,
            lambda own: Geometry((4, 4), (2, 2), (2, 2)) if state.strides else own,
        )
        for each in range(levels - 1):
            _fit_upsampler(stack, unet, each, state)
        for block in (down_block(unet, level), up_block(unet, level)):
            for attention in block.attentions:
                for transformer in attention.transformer_blocks:
                    _window_attention(stack, transformer.attn1, state)
        yield state


def _remember_latent_size(stack: ExitStack, unet: Any, state: HiDiffusion) -> None:
    def before(unet: Any, inputs: Any) -> None:
        state.latent_size = (inputs[0].shape[-2], inputs[0].shape[-1])

    stack.callback(unet.register_forward_pre_hook(before).remove)


def _pool_block(stack: ExitStack, unet: Any, state: HiDiffusion) -> None:
    """Pool after the first pair of a block, and undo it before the last pair of its mirror."""

    def pool(module: Any, inputs: Any, output: Any) -> Any:
        if not state.pools:
            return None
        maps = output[0] if isinstance(output, tuple) else output
        state.pooled_from = (maps.shape[-2], maps.shape[-1])
        pooled = F.avg_pool2d(maps, 2, ceil_mode=True)
        return (pooled,) if isinstance(output, tuple) else pooled

    def unpool(module: Any, inputs: Any, output: Any) -> Any:
        if not state.pools:
            return None
        maps = output[0] if isinstance(output, tuple) else output
        resized = F.interpolate(maps, size=state.pooled_from, mode="bicubic")
        return (resized,) if isinstance(output, tuple) else resized

    down, up = down_block(unet, _POOLED_LEVEL), up_block(unet, _POOLED_LEVEL)
    stack.callback(pair_end(down, 0).register_forward_hook(pool).remove)
    stack.callback(pair_end(up, len(down.resnets) - 1).register_forward_hook(unpool).remove)


def _fit_upsampler(stack: ExitStack, unet: Any, level: int, state: HiDiffusion) -> None:
    """Make the maps that come up to a level as large as those that it kept on the way down."""

    def remember(block: Any, inputs: Any, output: Any) -> None:
        last_pair = output[1][len(block.resnets) - 1]
        state.skip_sizes[level] = (last_pair.shape[-2], last_pair.shape[-1])

    def fit(block: Any, positional: Any, named: dict[str, Any]) -> Any:
        if not (state.pools or state.strides):
            return None
        return positional, named | {"upsample_size": state.skip_sizes[level]}

    stack.callback(down_block(unet, level).register_forward_hook(remember).remove)
    stack.callback(up_block(unet, level + 1).register_forward_pre_hook(fit, with_kwargs=True).remove)


def _window_attention(stack: ExitStack, attention: Any, state: HiDiffusion) -> None:
    """Cut the tokens in four windows before an attention, and join them after it."""
    places: list[tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = []

    def before(attention: Any, positional: Any, named: dict[str, Any]) -> Any:
        tokens = positional[0]
        size = map_size(state.latent_size, tokens.shape[1])
        even = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        shift = state.draw_shift((even[0] // 2, even[1] // 2))
        places.append((size, even, shift))
        return (split_windows(tokens, size, even, shift), *positional[1:]), named

    def after(attention: Any, inputs: Any, output: Any) -> Any:
        return join_windows(output, *places.pop())

    stack.callback(attention.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(attention.register_forward_hook(after).remove)


def map_size(latent_size: Sequence[int], tokens: int) -> tuple[int, int]:
    """Height and width of the map that tokens are, from the size of the latent."""
    height, width = latent_size
    ratio = round((height * width / tokens) ** 0.5)
    return -(-height // ratio), -(-width // ratio)


def split_windows(tokens: Tensor, size: Sequence[int], even: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Roll a map and cut it into four windows.

    Shape:
        [batch, height * width, channels] -> [4 * batch, even height * even width / 4, channels].
    """
    batch, _, channels = tokens.shape
    maps = _resize(tokens.transpose(1, 2).reshape(batch, channels, *size), even)
    maps = torch.roll(maps, (-shift[0], -shift[1]), (2, 3))
    cut = maps.reshape(batch, channels, 2, even[0] // 2, 2, even[1] // 2)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(4 * batch, -1, channels)


def join_windows(windows: Tensor, size: Sequence[int], even: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The inverse of `split_windows`, but for the resize of a map of an odd side."""
    channels = windows.shape[-1]
    cut = windows.reshape(-1, 2, 2, even[0] // 2, even[1] // 2, channels)
    maps = torch.roll(cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, *even), (shift[0], shift[1]), (2, 3))
    return _resize(maps, size).flatten(2).transpose(1, 2)


def _resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    return maps if maps.shape[-2:] == tuple(size) else F.interpolate(maps, size=tuple(size), mode="bicubic")
