"""The Latent Upscaler Adapter: a Swin backbone that runs once, and one pixel-shuffle head per scale or a LIIF head.

`Lua.forward` takes any size and pads and crops around `Lua.core`, the part that is exported: its input is a multiple of
the window, every shape stays symbolic, and no buffer depends on the size. The blocks are in `models/lua/swin.py`, the
configurations in `models/lua/spec.py`, the files in `models/lua/checkpoints.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from giantleap.models.lua.liif import LiifHead
from giantleap.models.lua.spec import PRESETS, LuaSpec, is_whole, preset, scaled_size
from giantleap.models.lua.swin import (
    BiasCache,
    ResidualGroup,
    SwinBlock,
    WindowAttention,
    build_biases,
    to_maps,
    to_tokens,
)

__all__ = ["PRESETS", "Lua", "LuaSpec", "pad_to_window", "preset"]

LINEAR_SKIP_KERNEL = 5  # the bicubic enlargement by 2 and 4 reads so many neighbors
MASK_CACHE_BYTES = 64 * 2**20  # at window 8, the masks of four latents of 256x256


class PatchEmbed(nn.Module):
    """The LayerNorm after the first convolution; patches are single pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class ScaleHead(nn.Module):
    """Features to the latent at `scale` times their size: conv, LeakyReLU, a pixel shuffle per doubling, conv."""

    def __init__(self, spec: LuaSpec, scale: int) -> None:
        super().__init__()
        f = spec.num_feat
        self.conv_before = nn.Sequential(nn.Conv2d(spec.embed_dim, f, 3, padding=1), nn.LeakyReLU(0.01))
        doublings: list[nn.Module] = []
        for _ in range(scale.bit_length() - 1):
            doublings += [nn.Conv2d(f, 4 * f, 3, padding=1), nn.PixelShuffle(2)]
        self.upsample = nn.Sequential(*doublings)
        self.conv_last = nn.Conv2d(f, spec.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Shape: [batch, embed_dim, height, width] -> [batch, channels, scale * height, scale * width]."""
        y: Tensor = self.conv_last(self.upsample(self.conv_before(x)))
        return y


class LinearSkip(nn.Module):
    """A linear enlargement: each latent pixel's square of `scale` x `scale` pixels from its 5 x 5 neighbors.

    Starts as the bicubic enlargement of each channel. Borders are repeated, as bicubic enlargement does.
    """

    def __init__(self, channels: int, scale: int) -> None:
        super().__init__()
        side = LINEAR_SKIP_KERNEL
        self.conv = nn.Conv2d(channels, channels * scale**2, side, padding=side // 2, padding_mode="replicate")
        self.shuffle = nn.PixelShuffle(scale)
        with torch.no_grad():
            kernels = _bicubic_kernels(scale).to(self.conv.weight.device)
            weight = torch.einsum("ab,skl->asbkl", torch.eye(channels, device=kernels.device), kernels)
            self.conv.weight.copy_(weight.flatten(0, 1))
            nn.init.zeros_(cast(Tensor, self.conv.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Enlarge a latent.

        Shape:
            [batch, channels, height, width] -> [batch, channels, scale * height, scale * width].
        """
        y: Tensor = self.shuffle(self.conv(x))
        return y


def _bicubic_kernels(scale: int) -> Tensor:
    """The weight of each neighbor for each place of a pixel's square in torch's bicubic upscaling; [scale**2, 5, 5]."""
    side = LINEAR_SKIP_KERNEL
    with torch.device("cpu"):  # the network may be built on "meta"
        impulses = F.pad(torch.eye(side**2).view(side**2, 1, side, side), (side,) * 4)
        large = F.interpolate(impulses, scale_factor=scale, mode="bicubic")
    first = scale * (side + side // 2)
    places = large[:, 0, first : first + scale, first : first + scale]
    return places.flatten(1).T.reshape(scale**2, side, side)


class Lua(nn.Module):
    """The Latent Upscaler Adapter.

    References:
        arXiv 2511.10629, figure 4 and section 3; backbone as SwinIR (arXiv 2108.10257) with one head per scale.

    Args:
        spec: The shape of the network.
    """

    latent_mean: Tensor
    latent_std: Tensor
    image_mean: Tensor

    def __init__(self, spec: LuaSpec) -> None:
        super().__init__()
        self.spec = spec
        self.conv_first = nn.Conv2d(
            spec.channels, spec.embed_dim, spec.conv_first_kernel, padding=spec.conv_first_kernel // 2
        )
        self.patch_embed = PatchEmbed(spec.embed_dim)
        self.layers = nn.ModuleList(
            ResidualGroup(spec, depth, heads) for depth, heads in zip(spec.depths, spec.layer_heads, strict=True)
        )
        self.norm = nn.LayerNorm(spec.embed_dim)
        self.conv_after_body = nn.Conv2d(spec.embed_dim, spec.embed_dim, 3, padding=1)
        heads: dict[str, nn.Module] = {f"x{scale}": ScaleHead(spec, scale) for scale in spec.scales}
        self.heads = nn.ModuleDict(heads if spec.head == "pixelshuffle" else {"liif": LiifHead(spec)})
        if spec.linear_skip:
            self.skips = nn.ModuleDict({f"x{scale}": LinearSkip(spec.channels, scale) for scale in spec.scales})
        if spec.latent_norm:
            self.register_buffer("latent_mean", torch.zeros(spec.channels))
            self.register_buffer("latent_std", torch.ones(spec.channels))
        if spec.image_mean is not None:
            # On the CPU even if the weights are built on "meta", because no file has it.
            image_mean = torch.tensor(spec.image_mean, device="cpu")
            self.register_buffer("image_mean", image_mean, persistent=False)
        self.bias_cache = BiasCache(MASK_CACHE_BYTES)
        self._start_weights()

    def _start_weights(self) -> None:
        for name, module in self.named_modules():
            if name.startswith("heads."):
                continue  # convolutions and the layers of a LIIF head, whose signal 0.02 would suppress
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        for head in self.heads.values() if self.spec.has_skip else ():
            last = head.last if isinstance(head, LiifHead) else cast(ScaleHead, head).conv_last
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the per-channel statistics that the network normalizes by.

        Args:
            mean: [channels].
            std: [channels].

        Raises:
            ValueError: The spec has no `latent_norm`, a shape is wrong, or a deviation is not positive.
        """
        shape = (self.spec.channels,)
        if not self.spec.latent_norm:
            raise ValueError("this LUA was built with latent_norm=False and stores no latent statistics")
        if mean.shape != shape or std.shape != shape or not bool((std > 0).all()):
            raise ValueError(
                f"latent statistics must be two vectors of shape {shape} with positive deviations; "
                f"found shapes {tuple(mean.shape)} and {tuple(std.shape)}, least deviation {std.min().item()}"
            )
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def forward(self, latent: Tensor, scale: float) -> Tensor:
        """Upscale a latent of any size.

        Shape:
            [batch, channels, height, width] -> [batch, channels, scale * height, scale * width].

        Raises:
            ValueError: The latent is not a 4-D tensor of `channels` channels, there is no such head, or with a LIIF
                head the upscaled sides would not be whole.
        """
        return self.forward_scales(latent, (scale,))[scale]

    def forward_scales(self, latent: Tensor, scales: Sequence[float]) -> dict[float, Tensor]:
        """Upscale by several scales with one pass of the backbone; otherwise as `forward`."""
        check_latent(self.spec, latent, scales)
        height, width = latent.shape[-2:]
        padded = pad_to_window(latent, self.spec.window)
        upscaled = self._core(padded, scales)
        return {s: y[..., : scaled_size(height, s), : scaled_size(width, s)] for s, y in upscaled.items()}

    def core(self, latent: Tensor, scale: float) -> Tensor:
        """The part that is exported: height and width must be multiples of the window, and nothing is checked.

        Shape:
            [batch, channels, height, width] -> [batch, channels, scale * height, scale * width].
        """
        return self._core(latent, (scale,))[scale]

    def _core(self, latent: Tensor, scales: Sequence[float]) -> dict[float, Tensor]:
        x = self.normalize(latent)
        features = self.forward_features(x)
        upscaled: dict[float, Tensor] = {}
        for scale in scales:
            if self.spec.head == "liif":
                y = self.heads["liif"](features, scale)
                skip = partial(F.interpolate, size=(y.shape[-2], y.shape[-1]))
            else:
                y = self.heads[f"x{scale:g}"](features)
                skip = partial(F.interpolate, scale_factor=scale)
            if self.spec.bicubic_skip:
                y = y + skip(x, mode="bicubic")
            elif self.spec.linear_skip:
                y = y + self.skips[f"x{scale:g}"](x)
            upscaled[scale] = self._restore(y)
        return upscaled

    def forward_features(self, x: Tensor) -> Tensor:
        """The backbone, on a normalized latent whose sides are multiples of the window.

        Shape:
            [batch, channels, height, width] -> [batch, embed_dim, height, width].
        """
        height, width = x.shape[-2:]
        biases = self._block_biases(height // self.spec.window, width // self.spec.window)
        shallow = self.conv_first(x)
        tokens = self.patch_embed(to_tokens(shallow))
        for layer in self.layers:
            tokens = layer(tokens, biases)
        features: Tensor = self.conv_after_body(to_maps(self.norm(tokens))) + shallow
        return features

    def _block_biases(self, nh: int, nw: int) -> Iterator[Tensor]:
        blocks = [
            cast(SwinBlock, block)
            for layer in self.layers
            for block in cast(ResidualGroup, layer).residual_group.blocks
        ]
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        if self.training or torch.is_grad_enabled() or tracing:
            return build_biases(blocks, nh, nw)
        return self.bias_cache.get(blocks, nh, nw)

    def normalize(self, latent: Tensor) -> Tensor:
        """Normalize a latent for the first convolution and the skip; the same shape."""
        if self.spec.latent_norm:
            return (latent - self.latent_mean.view(-1, 1, 1)) / self.latent_std.view(-1, 1, 1)
        return latent if self.spec.image_mean is None else latent - self.image_mean.view(-1, 1, 1)

    def _restore(self, y: Tensor) -> Tensor:
        if self.spec.latent_norm:
            return y * self.latent_std.view(-1, 1, 1) + self.latent_mean.view(-1, 1, 1)
        return y if self.spec.image_mean is None else y + self.image_mean.view(-1, 1, 1)

    def train(self, mode: bool = True) -> Self:
        """Switch the mode and drop cached attention biases."""
        self.bias_cache.clear()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.bias_cache.clear()
        super()._apply(fn, recurse)
        return self


def check_latent(spec: LuaSpec, latent: Tensor, scales: Sequence[float]) -> None:
    """Check that a network of this spec takes a latent at these scales.

    Raises:
        ValueError: The latent is not a 4-D tensor of `channels` channels, there is no head for a scale, or an upscaled
            side would not be whole.
    """
    if latent.dim() != 4 or latent.shape[1] != spec.channels or min(latent.shape[2:]) < 1:
        raise ValueError(
            f"LUA takes latents of shape [batch, {spec.channels}, height, width]; found {list(latent.shape)}"
        )
    for scale in scales:
        if not spec.takes(scale):
            has = f"heads for scales {spec.scales}"
            if spec.head == "liif":
                has = f"a head for any scale above 1 that makes a window of {spec.window} a whole number"
            raise ValueError(f"scale {scale}: this LUA has {has}")
        if not all(is_whole(side, scale) for side in latent.shape[2:]):
            raise ValueError(f"a latent of {list(latent.shape[2:])} has no whole sides at scale {scale}")


def pad_to_window(latent: Tensor, window: int) -> Tensor:
    """Pad right and bottom to multiples of `window`, by reflection, or by the last value if a side is too small.

    Shape:
        [batch, channels, height, width] -> [batch, channels, height', width'], both multiples of `window`.
    """
    height, width = latent.shape[-2:]
    bottom, right = -height % window, -width % window
    if right:
        latent = F.pad(latent, (0, right, 0, 0), mode="reflect" if right < width else "replicate")
    if bottom:
        latent = F.pad(latent, (0, 0, 0, bottom), mode="reflect" if bottom < height else "replicate")
    return latent
