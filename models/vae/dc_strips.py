"""Decodes an AutoencoderDC in overlapping strips, with the image of the whole decode.

Its residual blocks normalize each position on its own, so a row of the image depends on a few rows of the latent: a
strip that is decoded with that many rows more on either side is exact. A block with attention (EfficientViT, in the
deep stages of Sana's autoencoder) sees the whole map: stages up to the last such block run on the whole latent, only
those after it in strips.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC, DCUpBlock2d, Decoder, ResBlock
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from giantleap.models.device import PartCallback
from giantleap.models.live_storage import LiveStorage
from giantleap.models.vae.decode import choose_memory_format
from giantleap.models.vae.decoder_check import UnknownDecoderError, convolution_problem, has_hook
from giantleap.models.vae.strip_plan import MAX_ELEMENTS, DecodeBudgetError

HALOS_PER_STRIP = 8  # rows of a strip over those of one overlap, where no budget decides: a quarter of the work repeats
STRIPS_FAST_PX = 1024 * 1024  # of an image, on a CPU in float32: strips take no longer from here on (docs/lab/vae.md)
PROBE_SIDE = 16  # latent pixels of the square that memory is measured with
_POINTWISE = (RMSNorm, nn.SiLU, nn.ReLU, nn.ReLU6, nn.GELU, nn.Mish, nn.Identity, nn.Sequential)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Peak memory of a part of the decoder, measured; it grows with the pixels of its input map.

    Args:
        bytes_per_px: Of live tensors beyond weights and input.
        elements_per_px: Of the largest tensor.
    """

    bytes_per_px: float
    elements_per_px: float

    @classmethod
    def measure(cls, run: Callable[[Tensor], Tensor], channels: int, dtype: torch.dtype) -> Self:
        """Run a part on shapes alone."""
        with torch.inference_mode(), LiveStorage() as live:
            run(_probe(channels, dtype))
        return cls(live.peak_bytes / PROBE_SIDE**2, live.largest_elements / PROBE_SIDE**2)


@dataclass(frozen=True, slots=True)
class DcStrips:
    """How one decoder is cut. The first steps run on the whole latent and leave a map; the rest runs in strips of it.

    Args:
        dtype: What it computes in.
        whole_steps: Steps that run on the whole latent: the first convolution and stages. With 0 the map is the latent.
        map_scale: Rows of the map per latent row.
        row_px: Rows of the image per row of the map.
        halo_rows: Rows of the map that a strip needs on either side beyond its own.
        image_bytes_per_px: Of the image, per latent pixel.
        whole_decode: Of a decode without strips, per latent pixel.
        first_steps: Of the steps on the whole latent, per latent pixel.
        map_bytes_per_px: Of the map or the reordered latent that strips are cut from, per latent pixel.
        strip: Of the rest, per pixel of the map.
    """

    dtype: torch.dtype
    whole_steps: int
    map_scale: int
    row_px: int
    halo_rows: int
    image_bytes_per_px: int
    whole_decode: Footprint
    first_steps: Footprint
    map_bytes_per_px: int
    strip: Footprint

    @classmethod
    def of(cls, vae: Any, dtype: torch.dtype) -> Self | None:
        """The cut of a VAE in this type.

        Returns:
            None for another class, and for a decoder whose last stage is not known to depend on near rows only.
        """
        count = _count_whole_steps(vae)
        if count is None:
            return None
        halo_rows, row_px = _reach([*_steps(vae.decoder)[count:], vae.decoder.conv_out])
        with torch.device("meta"):
            twin: Any = AutoencoderDC.from_config(vae.config)
        decoder, channels = twin.decoder.to(dtype), vae.config["latent_channels"]
        with torch.inference_mode():
            cut_map = _run_first(decoder, _probe(channels, dtype), count)
        map_scale = cut_map.shape[2] // PROBE_SIDE
        return cls(
            dtype=dtype,
            whole_steps=count,
            map_scale=map_scale,
            row_px=row_px,
            halo_rows=halo_rows,
            image_bytes_per_px=vae.config["in_channels"] * (map_scale * row_px) ** 2 * dtype.itemsize,
            map_bytes_per_px=cut_map.shape[1] * map_scale**2 * dtype.itemsize,
            whole_decode=Footprint.measure(decoder, channels, dtype),
            first_steps=Footprint.measure(lambda latent: _run_first(decoder, latent, count), channels, dtype),
            strip=Footprint.measure(lambda rows: _run_rest(decoder, rows, count), cut_map.shape[1], dtype),
        )

    def prefers_strips(
        self, height: int, width: int, *, batch: int = 1, device: str = "cpu", budget_bytes: int | None = None
    ) -> bool:
        """Whether a decode of latents of this size is better done in strips than whole; the image is the same.

        Args:
            height: Of the latent.
            width: Of the latent.
            batch: Images decoded in one call.
            device: Its type, "cpu" or "cuda".
            budget_bytes: Memory that the decode may use beyond weights and latents; None for no limit.
        """
        if self.needs_strips(height, width, batch=batch, budget_bytes=budget_bytes):
            return True
        image_px = height * width * (self.map_scale * self.row_px) ** 2
        return device == "cpu" and self.dtype == torch.float32 and image_px >= STRIPS_FAST_PX

    def needs_strips(self, height: int, width: int, *, batch: int = 1, budget_bytes: int | None = None) -> bool:
        """Whether the whole decode exceeds the budget or makes a tensor that a kernel cannot index."""
        latent_px = batch * height * width
        if budget_bytes is not None and self.whole_decode.bytes_per_px * latent_px > budget_bytes:
            return True
        return self.whole_decode.elements_per_px * latent_px > MAX_ELEMENTS

    def peak_bytes(self, height: int, width: int, rows: int, *, batch: int = 1) -> int:
        """Memory of a decode in strips of `rows` rows beyond weights and latents."""
        latent_px = height * width
        strip_px = min(rows + 2 * self.halo_rows, height * self.map_scale) * width * self.map_scale
        in_strips = self.map_bytes_per_px * latent_px + self.strip.bytes_per_px * strip_px
        first_steps = self.first_steps.bytes_per_px * latent_px
        return int(batch * self.image_bytes_per_px * latent_px + max(in_strips, first_steps))

    def choose_rows(self, height: int, width: int, *, batch: int = 1, budget_bytes: int | None = None) -> int:
        """Rows of the map per strip, without the overlap.

        Raises:
            DecodeBudgetError: The budget is below what strips of one row need.
        """
        map_height, map_width = height * self.map_scale, width * self.map_scale
        fitting = int(MAX_ELEMENTS / (self.strip.elements_per_px * map_width)) - 2 * self.halo_rows
        if budget_bytes is None:
            return max(1, min(map_height, HALOS_PER_STRIP * self.halo_rows, fitting))
        needed_bytes = self.peak_bytes(height, width, 1, batch=batch)
        if needed_bytes > budget_bytes:
            raise DecodeBudgetError(
                f"an exact decode of a {height}x{width} latent needs {needed_bytes} bytes with the thinnest strips; "
                f"{budget_bytes} are allowed: decode a smaller image"
            )
        kept_bytes = (batch * self.image_bytes_per_px + self.map_bytes_per_px) * height * width
        row_bytes = self.strip.bytes_per_px * map_width
        return max(1, min(map_height, fitting, int((budget_bytes - kept_bytes) / row_bytes) - 2 * self.halo_rows))

    @torch.inference_mode()
    def decode(self, vae: Any, latents: Tensor, rows: int, on_part: PartCallback | None = None) -> Tensor:
        """Decode in strips of `rows` rows of the map, one image after the other.

        Args:
            vae: The one that this cut is of, in the dtype and on the device of the latents.
            latents: Raw ones.
            rows: From `choose_rows`.
            on_part: Called after each strip.

        Shape:
            [batch, channels, h, w] -> [batch, 3, stride * h, stride * w].

        Raises:
            UnknownDecoderError: The decoder was changed and cannot be cut like this any more.
        """
        if _count_whole_steps(vae) != self.whole_steps:
            raise UnknownDecoderError("the decoder has another part or a hook since it was loaded; load it again")
        latents = latents.contiguous(memory_format=choose_memory_format(latents))
        batch, _, height, width = latents.shape
        stride_px = self.map_scale * self.row_px
        images = latents.new_empty((batch, vae.config["in_channels"], height * stride_px, width * stride_px))
        total, done = batch * -(-height * self.map_scale // rows), 0
        for latent, image in zip(latents.split(1), images.split(1), strict=True):
            cut_map = _run_first(vae.decoder, latent, self.whole_steps)
            for top in range(0, cut_map.shape[2], rows):
                first = max(top - self.halo_rows, 0)
                skipped_px = (top - first) * self.row_px
                target = image[:, :, top * self.row_px : (top + rows) * self.row_px]
                strip = cut_map[:, :, first : top + rows + self.halo_rows]
                # The strip's image must be free before the next is made: no name is bound to it.
                target.copy_(
                    _run_rest(vae.decoder, strip, self.whole_steps)[:, :, skipped_px : skipped_px + target.shape[2]]
                )
                done += 1
                if on_part is not None:
                    on_part(done / total)
        return images


def _probe(channels: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(1, channels, PROBE_SIDE, PROBE_SIDE, device="meta", dtype=dtype)


def _count_whole_steps(vae: Any) -> int | None:
    """How many steps must run on the whole latent; None if nothing can run in strips."""
    if type(vae) is not AutoencoderDC or type(vae.decoder) is not Decoder or has_hook(vae.decoder):
        return None
    decoder: Any = vae.decoder
    steps, tail = _steps(decoder), (decoder.norm_out, decoder.conv_act, decoder.conv_out)
    count = 1 + max((index for index, step in enumerate(steps) if not _is_local(step)), default=-1)
    return count if count < len(steps) and all(_is_local(part) for part in tail) else None


def _steps(decoder: Any) -> list[nn.Module]:
    """What the decoder runs before its last norm: the first convolution, then the stages from the smallest map on."""
    return [decoder.conv_in, *reversed(decoder.up_blocks)]


def _run_first(decoder: Any, latent: Tensor, count: int) -> Tensor:
    """The first `count` steps."""
    steps = _steps(decoder)[:count]
    current = _run_conv_in(decoder, latent) if steps else latent
    for stage in steps[1:]:
        current = stage(current)
    return current


def _run_rest(decoder: Any, current: Tensor, count: int) -> Tensor:
    """What follows the first `count` steps."""
    if count == 0:
        current = _run_conv_in(decoder, current)
    for stage in _steps(decoder)[max(count, 1) :]:
        current = stage(current)
    current = decoder.norm_out(current.movedim(1, -1)).movedim(-1, 1)
    image: Tensor = decoder.conv_out(decoder.conv_act(current))
    return image


def _run_conv_in(decoder: Any, latent: Tensor) -> Tensor:
    current: Tensor = decoder.conv_in(latent)
    return current + latent.repeat_interleave(decoder.in_shortcut_repeats, dim=1) if decoder.in_shortcut else current


def _is_local(step: nn.Module) -> bool:
    """Whether a row of the result depends on near rows only, as `_reach` counts them."""
    return all(map(_is_known, step.modules()))


def _is_known(part: nn.Module) -> bool:
    if has_hook(part):
        return False
    if type(part) is nn.Conv2d:
        return convolution_problem(part) is None
    if type(part) is ResBlock:
        return part.norm_type == "rms_norm" and type(part.norm) is RMSNorm
    if type(part) is DCUpBlock2d:
        return part.interpolation_mode == "nearest"
    return type(part) in _POINTWISE


def _reach(steps: Sequence[nn.Module]) -> tuple[int, int]:
    """How many rows above or below a row matter to what is made of it, and how many rows are made of one."""
    rows, scale = 0.0, 1
    for step in steps:
        for block in step if isinstance(step, nn.Sequential) else [step]:
            rows += (2 if isinstance(block, ResBlock) else 1) / scale  # 3x3 convolutions, in rows of their input
            scale *= 2 if isinstance(block, DCUpBlock2d) else 1
    return math.ceil(rows), scale
