"""Upscales decoded images in pixels with SwinIR networks, one single-head file per scale: the method `swinir`.

A picture up to a budget of pixels is processed whole, a larger one in overlapping tiles. Tiles start at multiples of
the attention window, so that a tile and the whole picture have the same windows; the remaining difference comes from
what a tile cannot see. `models/lua/checkpoints.py` reads the files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from giantleap.models.device import PartCallback, choose_upscaler_dtype, part_of
from giantleap.models.engines.cpu import LatentUpscaler, pack_lua
from giantleap.models.engines.packed_lua import PackedLua
from giantleap.models.lua.checkpoints import CheckpointError, read_lua
from giantleap.models.pixels.images import to_pixels

RGB_CHANNELS = 3
TILE_PX = 512  # side of the largest tile, of the input; a picture of at most its square is not tiled
HALO_PX = 32  # overlap of a tile beyond the part that it owns, on each side


@dataclass(frozen=True, slots=True)
class Span:
    """One tile along one side, in input pixels: it reads `start` to `stop` and owns `first` to `last`."""

    start: int
    first: int
    last: int
    stop: int


def plan_spans(side_px: int, tile_px: int, halo_px: int, window: int) -> list[Span]:
    """Cut a side into tiles of about equal length that read at most `tile_px`.

    The halo is rounded up and the tile down to multiples of the window, so that every start is one, and every stop but
    the end of the side.

    Raises:
        ValueError: The tile is shorter than four halos, so that its blends would overlap.
    """
    halo, tile = -(-halo_px // window) * window, tile_px // window * window
    if tile < max(4 * halo, window):
        raise ValueError(f"tiles of {tile_px} px are too short for a halo of {halo_px} px; the minimum is four halos")
    if side_px <= tile_px:
        return [Span(0, 0, side_px, side_px)]
    count = -(-side_px // (tile - 2 * halo))
    owned = -(-side_px // (count * window)) * window
    return [
        Span(max(0, first - halo), first, min(side_px, first + owned), min(side_px, first + owned + halo))
        for first in range(0, side_px, owned)
    ]


def blend_weights(span: Span, side_px: int, scale: int, halo_px: int) -> Tensor:
    """The weight of each output pixel of a tile along one side; those of neighbors sum to one.

    It falls linearly over the length of a halo around the border of two tiles. The outer half of a halo has weight 0.

    Returns:
        [scale * (stop - start)].
    """
    place_px = span.start + (torch.arange(scale * (span.stop - span.start)) + 0.5) / scale
    weights = torch.ones_like(place_px)
    if span.first > 0:
        weights = ((place_px - span.first) / halo_px + 0.5).clamp(0.0, 1.0)
    if span.last < side_px:
        weights = weights * ((span.last - place_px) / halo_px + 0.5).clamp(0.0, 1.0)
    return weights


class PixelUpscaler:
    """SwinIR networks by scale on one device.

    Args:
        nets: RGB networks, each with the one head of its scale; one in float32 computes in `dtype` under autocast.
        device: Where they are.
        dtype: The compute type.
        tile_px: Side of the largest tile, in input pixels; a picture of at most its square is not tiled.
        halo_px: Overlap of a tile with each neighbor, in input pixels.
    """

    def __init__(
        self,
        nets: Mapping[int, LatentUpscaler],
        device: torch.device,
        dtype: torch.dtype,
        tile_px: int = TILE_PX,
        halo_px: int = HALO_PX,
    ) -> None:
        self.nets = dict(nets)
        self.device = device
        self.dtype = dtype
        self.tile_px = tile_px
        self.halo_px = halo_px

    @classmethod
    def open(cls, files: Mapping[int, Path], device: torch.device, dtype: torch.dtype) -> Self:
        """Read one file per scale (`read_lua`), to compute in `choose_upscaler_dtype`.

        Raises:
            FileNotFoundError: A file is not there.
            CheckpointError: A file is damaged, of another layout, of another scale, or not for RGB.
        """
        dtype = choose_upscaler_dtype(dtype, device)
        nets: dict[int, LatentUpscaler] = {}
        for scale, path in sorted(files.items()):
            net = read_lua(path, device)
            if net.spec.channels != RGB_CHANNELS or net.spec.scales != (scale,):
                raise CheckpointError(
                    f"{path}: found {net.spec.channels} channels and heads for scales {net.spec.scales}; "
                    f"expected a SwinIR of {RGB_CHANNELS} channels and the one scale {scale}"
                )
            nets[scale] = pack_lua(net, device, dtype)
        return cls(nets, device, dtype)

    @property
    def is_packed(self) -> bool:
        """Whether all networks run in the packed form."""
        return all(isinstance(net, PackedLua) for net in self.nets.values())

    @property
    def scales(self) -> tuple[int, ...]:
        """The scales that `upscale` takes."""
        return tuple(self.nets)

    @torch.inference_mode()
    def upscale(self, images: Tensor, scale: float, on_part: PartCallback | None = None) -> Tensor:
        """Upscale images of any size.

        Args:
            images: [batch, 3, height, width] in [0, 1].
            scale: One of `scales`.
            on_part: Called after each tile of an image that is large.

        Returns:
            [batch, 3, scale * height, scale * width] in [0, 1], float32, on the device of the networks. An image with a
            value that is not finite has NaN in it.

        Raises:
            ValueError: There is no network for the scale, or the images have another shape.
        """
        if scale not in self.nets:
            raise ValueError(f"scale {scale}: there are SwinIR networks for scales {self.scales}")
        if images.dim() != 4 or images.shape[1] != RGB_CHANNELS or 0 in images.shape or not images.is_floating_point():
            raise ValueError(
                f"SwinIR takes floats of shape [batch, 3, height, width]; found {images.dtype} {list(images.shape)}"
            )
        whole, (height, width) = int(scale), images.shape[-2:]
        net = self.nets[whole]
        upscaled = torch.empty(len(images), RGB_CHANNELS, whole * height, whole * width, device=self.device)
        is_large = height * width > self.tile_px**2
        # On a CPU one at a time: activations of several leave the cache (see `Route.decode_items`).
        at_once = 1 if is_large or self.device.type == "cpu" else self.tile_px**2 // (height * width)
        for start in range(0, len(images), at_once):
            part = images[start : start + at_once]
            if is_large:
                upscaled[start] = self._run_tiles(net, part, whole, part_of(on_part, start, len(images)))[0]
            else:
                upscaled[start : start + at_once] = self._run(net, part, whole)
        return upscaled.clamp_(0.0, 1.0)

    def upscale_pixels(
        self, images: Sequence[Tensor | None], scale: float, on_part: PartCallback | None = None
    ) -> list[Tensor | None]:
        """Upscale pixels one image at a time; None stays None.

        Shape:
            Each [height_px, width_px, 3], uint8 -> [scale * height_px, scale * width_px, 3], on the CPU.
        """
        upscaled: list[Tensor | None] = []
        for index, image in enumerate(images):
            report = part_of(on_part, index, len(images))
            if image is None:
                upscaled.append(None)
            else:
                values = image.to(self.device).permute(2, 0, 1)[None].float() / 255
                upscaled.append(to_pixels(self.upscale(values, scale, report))[0])
            if report is not None:
                report(1.0)
        return upscaled

    def _run(self, net: LatentUpscaler, images: Tensor, scale: int) -> Tensor:
        images = images.to(self.device, torch.float32)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            upscaled: Tensor = net(images, scale)
        return upscaled.float()

    def _run_tiles(self, net: LatentUpscaler, image: Tensor, scale: int, on_part: PartCallback | None) -> Tensor:
        """Add up the tiles, weighted by `blend_weights`."""
        height, width = image.shape[-2:]
        rows, columns = (plan_spans(side, self.tile_px, self.halo_px, net.spec.window) for side in (height, width))
        upscaled = torch.zeros(1, RGB_CHANNELS, scale * height, scale * width, device=self.device)
        done = 0
        for row in rows:
            down = blend_weights(row, height, scale, self.halo_px).to(self.device)
            for column in columns:
                across = blend_weights(column, width, scale, self.halo_px).to(self.device)
                tile = self._run(net, image[..., row.start : row.stop, column.start : column.stop], scale)
                area = upscaled[..., scale * row.start : scale * row.stop, scale * column.start : scale * column.stop]
                area += tile * down[:, None] * across
                done += 1
                if on_part is not None:
                    on_part(done / (len(rows) * len(columns)))
        return upscaled
