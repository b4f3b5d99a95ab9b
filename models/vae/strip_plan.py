"""Plans a decode: strip heights from a byte budget, and whether strips are better than the whole decode.

All figures are bytes of live tensors beyond the weights and the latent. `models/vae/decode.py` follows the plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

ELEMENT_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
MAX_STRIP_BYTES = 16 * 2**20  # fits the caches of a large CPU or GPU; larger strips were not faster
MIN_STRIP_BYTES = 2**20
STRIPS_PER_MAP = 32  # a strip needs about four times its size: an eighth of the largest map in all
MAX_QUERIES = 1024  # attention scores of one chunk then stay below the full-resolution maps at any image size
MAX_ELEMENTS = 2**31 - 1  # of one tensor; several GPU kernels index with 32 bits
STRIPS_FASTER_PX = 256 * 256  # of an image: where strips became faster than the whole decode on a CPU in float32


class DecodeBudgetError(ValueError):
    """A budget that is too small even for strips of one row."""


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The numbers of a decoder that decide its memory.

    Args:
        latent_channels: Of its input.
        image_channels: Of its output.
        channels: Of each up block in order; each but the last doubles the resolution.
    """

    latent_channels: int
    image_channels: int
    channels: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the `config.json` of a diffusers AutoencoderKL or AutoencoderKLFlux2.

        Raises:
            ValueError: It describes blocks other than UpDecoderBlock2D.
        """
        blocks = tuple(config["up_block_types"])
        channels = config.get("decoder_block_out_channels") or config["block_out_channels"]
        if set(blocks) != {"UpDecoderBlock2D"} or len(blocks) != len(channels):
            raise ValueError(f"expected UpDecoderBlock2D, one per channel count; found {blocks}")
        return cls(config["latent_channels"], config["out_channels"], tuple(reversed(channels)))

    @property
    def stride_px(self) -> int:
        """Image pixels per latent pixel."""
        return int(2 ** (len(self.channels) - 1))

    def stage_input(self, stage: int) -> int:
        """Input channels of a stage."""
        return self.channels[max(stage - 1, 0)]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How an exact decode is cut.

    Args:
        strip_rows: Rows of a strip at each stage; even after the first, so that an upsampled strip has whole rows.
        attention_queries: Latent pixels that the middle attention handles at a time.
        peak_bytes: Estimated peak memory beyond weights and latents.
    """

    strip_rows: tuple[int, ...]
    attention_queries: int
    peak_bytes: int


def plan_decode(
    shape: DecoderShape,
    latent_height: int,
    latent_width: int,
    dtype: str,
    *,
    batch: int = 1,
    budget_bytes: int | None = None,
    strip_bytes: int | None = None,
    min_strip_bytes: int = MIN_STRIP_BYTES,
) -> DecodePlan:
    """Plan an exact decode of this size.

    Args:
        shape: Of the decoder.
        latent_height: Of the raw latent.
        latent_width: Of the raw latent.
        dtype: The type that the decoder computes in.
        batch: Number of images; they are decoded one after the other.
        budget_bytes: Memory limit; the strips shrink to fit.
        strip_bytes: Largest strip, to override the default.
        min_strip_bytes: Smallest default strip.

    Raises:
        DecodeBudgetError: The budget is below what one-row strips need.
        ValueError: A size is not positive or the dtype is unknown.
    """
    element_bytes = _check(latent_height, latent_width, batch, dtype)
    largest_bytes = max(_stage_elements(shape, latent_height, latent_width)) * element_bytes
    if strip_bytes is None:
        strip_bytes = min(MAX_STRIP_BYTES, max(min_strip_bytes, largest_bytes // STRIPS_PER_MAP))
    while True:
        rows = _strip_rows(shape, latent_height, latent_width, strip_bytes // element_bytes)
        peak, middle = _exact_elements(shape, latent_height, latent_width, rows, batch, dtype)
        if budget_bytes is None or peak * element_bytes <= budget_bytes:
            break
        if strip_bytes == 0:
            raise DecodeBudgetError(
                f"an exact decode of a {latent_height}x{latent_width} latent in {dtype} needs {peak * element_bytes} "
                f"bytes with the thinnest strips; {budget_bytes} are allowed: decode a smaller image"
            )
        strip_bytes //= 2
    tokens = latent_height * latent_width
    spare_queries = (peak - middle) * element_bytes // (2 * 4 * tokens)  # float32 scores, before and after softmax
    queries = max(1, min(MAX_QUERIES, tokens, MAX_ELEMENTS // tokens, max(spare_queries, 16)))
    return DecodePlan(rows, queries, peak * element_bytes)


def plain_decode_bytes(shape: DecoderShape, latent_height: int, latent_width: int, dtype: str, batch: int = 1) -> int:
    """Peak memory of the whole decode beyond weights and latents, with an attention that keeps no score matrix.

    Raises:
        ValueError: A size is not positive or the dtype is unknown.
    """
    element_bytes = _check(latent_height, latent_width, batch, dtype)
    return batch * _plain_elements(shape, latent_height, latent_width) * element_bytes


def prefers_strips(
    shape: DecoderShape,
    latent_height: int,
    latent_width: int,
    dtype: str,
    *,
    batch: int = 1,
    device: str = "cpu",
    budget_bytes: int | None = None,
) -> bool:
    """Whether an exact decode of this size is better done in strips than whole; the image is the same.

    Strips are used if the whole decode exceeds the budget or makes a tensor that a kernel cannot index, and where they
    were measured to be faster (docs/lab/vae.md): on a CPU in float32 from `STRIPS_FASTER_PX` on.

    Args:
        shape: Of the decoder.
        latent_height: Of the raw latent.
        latent_width: Of the raw latent.
        dtype: The type that the decoder computes in.
        batch: Images decoded in one call.
        device: Its type, "cpu" or "cuda".
        budget_bytes: Memory that the decode may use beyond weights and latents; None for no limit.

    Raises:
        ValueError: A size is not positive or the dtype is unknown.
    """
    whole_bytes = plain_decode_bytes(shape, latent_height, latent_width, dtype, batch)
    if budget_bytes is not None and whole_bytes > budget_bytes:
        return True
    if batch * max(_stage_elements(shape, latent_height, latent_width)) > MAX_ELEMENTS:
        return True
    image_px = latent_height * latent_width * shape.stride_px**2
    return device == "cpu" and dtype == "float32" and image_px >= STRIPS_FASTER_PX


def _check(latent_height: int, latent_width: int, batch: int, dtype: str) -> int:
    if min(latent_height, latent_width, batch) < 1:
        raise ValueError(f"a decode needs positive sizes; found batch {batch} of {latent_height}x{latent_width}")
    if dtype not in ELEMENT_BYTES:
        raise ValueError(f"dtype {dtype}: decoders compute in {', '.join(ELEMENT_BYTES)}")
    return ELEMENT_BYTES[dtype]


def _stage_elements(shape: DecoderShape, height: int, width: int) -> list[int]:
    """Elements of the widest map at each stage."""
    return [
        max(shape.stage_input(stage), channels) * (height << stage) * (width << stage)
        for stage, channels in enumerate(shape.channels)
    ]


def _strip_rows(shape: DecoderShape, height: int, width: int, strip_elements: int) -> tuple[int, ...]:
    rows = []
    for stage, channels in enumerate(shape.channels):
        row_elements = max(shape.stage_input(stage), channels) * (width << stage)
        rows_fitting = min(strip_elements // row_elements, height << stage)
        rows.append(max(rows_fitting, 1) if stage == 0 else max(rows_fitting // 2 * 2, 2))
    return tuple(rows)


def _exact_elements(
    shape: DecoderShape, height: int, width: int, strip_rows: tuple[int, ...], batch: int, dtype: str
) -> tuple[int, int]:
    """Peak elements over all steps of `models/vae/strips.py`, and of the middle attention alone."""
    image = batch * shape.image_channels * (height * width) * shape.stride_px**2
    peaks = []
    for stage, channels in enumerate(shape.channels):
        incoming, stage_width = shape.stage_input(stage), width << stage
        pixels = (height << stage) * stage_width
        strip = strip_rows[stage] * stage_width
        # Two maps while a block runs: its input or shortcut, and the hidden one. Working strips: one normalized and
        # one padded copy, or the padded copy and the convolution's output.
        live = 2 * channels if stage and incoming == channels else max(incoming, 2 * channels)
        halo = 2 * stage_width
        peaks.append(live * pixels + max(incoming, channels) * (2 * strip + halo))
        if stage:  # the upsampled map, filled while its source is given back
            source = strip_rows[stage - 1] * (stage_width // 2)
            kernels = 16 * incoming if dtype == "float32" else 0  # four 2x2 kernels per channel
            peaks.append(incoming * (pixels + source + strip + strip // 4 + halo + kernels))
    tokens = height * width
    middle = shape.channels[0] * (3 * tokens + 4 * strip_rows[0] * width)
    return image + max(*peaks, middle), image + middle


def _plain_elements(shape: DecoderShape, height: int, width: int) -> int:
    """Peak elements of diffusers' Decoder.forward: the input of each block stays alive until the block ends."""
    first = shape.channels[0]
    peaks = [8 * first * height * width]  # the middle attention: input, residual, norm, q, k, v, result, projection
    for stage, channels in enumerate(shape.channels):
        incoming, pixels = shape.stage_input(stage), (height << stage) * (width << stage)
        shortcut = incoming != channels
        # norm and SiLU beside the input; then the sum and its division by the output scale beside both branches
        peaks.append(max(3 * incoming, incoming + (4 if shortcut else 3) * channels) * pixels)
        peaks.append((incoming + 4 * channels) * pixels)
        if stage + 1 < len(shape.channels):
            peaks.append((incoming + channels + 8 * channels) * pixels)
    return max(peaks)
