"""Encodes decoded pixels as image files, and measures how similar two images are."""

import io
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from giantleap.models.pixels.image_formats import (
    DEFAULT_FILE,
    DEFAULT_QUALITY,
    MAX_SIDE_PX,
    Compression,
    FileOptions,
    ImageFormat,
)
from giantleap.models.pixels.png import to_png, to_small_png

# What Pillow takes. `python -m benchmarks.images.encode` measures both; 4:2:0 would cost 3 dB and blur colored edges.
_OPTIONS: Final[Mapping[tuple[ImageFormat, Compression], Mapping[str, int | bool]]] = MappingProxyType(
    {
        ("jpeg", "fast"): {"subsampling": 0},
        ("jpeg", "small"): {"subsampling": 0, "optimize": True, "progressive": True},
        ("webp", "fast"): {"method": 2},
        ("webp", "small"): {"method": 6},
    }
)

MAX_PSNR_DB = 150.0  # of images that are equal: JSON has no infinity


def to_signed(pixels: Tensor) -> Tensor:
    """Convert pixels to the input of a diffusion pipeline.

    Args:
        pixels: [height_px, width_px, 3], uint8.

    Returns:
        [3, height_px, width_px], float32 in [-1, 1].
    """
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0


def finite_items(batch: Tensor) -> list[bool]:
    """For each item of a batch, whether all of its values are finite."""
    finite: list[bool] = batch.isfinite().flatten(1).all(dim=1).tolist()
    return finite


def to_pixels(values: Tensor) -> Tensor:
    """Round images to bytes.

    Args:
        values: [batch, 3, height_px, width_px], clamped to [0, 1].

    Returns:
        [batch, height_px, width_px, 3], uint8, on the CPU.
    """
    return (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def to_image_bytes(
    pixels: Tensor, output_format: ImageFormat, xmp: bytes | None = None, options: FileOptions = DEFAULT_FILE
) -> bytes:
    """Encode one image. The file holds the pixels, their size and the packet, nothing else.

    Args:
        pixels: [height_px, width_px, 3], uint8, on the CPU.
        output_format: Of the file.
        xmp: Packet of metadata (`giantleap.models.provenance.xmp`).
        options: How it is compressed.

    Raises:
        ValueError: The tensor has another shape or type, or the format is unknown.
    """
    if output_format not in MAX_SIDE_PX:
        raise ValueError(f"image format {output_format!r} is not known; there are {sorted(MAX_SIDE_PX)}")
    if pixels.dim() != 3 or pixels.shape[-1] != 3 or str(pixels.dtype) != "torch.uint8":
        raise ValueError(f"an image is uint8 [height, width, 3]; found {pixels.dtype} {list(pixels.shape)}")
    if output_format == "png":
        return (to_png if options.compression == "fast" else to_small_png)(pixels.numpy(), xmp)
    buffer = io.BytesIO()
    how = {**_OPTIONS[output_format, options.compression], "quality": options.quality or DEFAULT_QUALITY}
    metadata: dict[str, object] = {} if xmp is None else {"xmp": xmp}
    Image.fromarray(pixels.numpy()).save(buffer, format=output_format.upper(), **how, **metadata)
    return buffer.getvalue()


def psnr_db(image: Tensor, expected: Tensor, max_db: float = MAX_PSNR_DB) -> float:
    """Peak signal-to-noise ratio of images in [-1, 1], clamped to that range and not rounded.

    PSNR = 10 log10(2^2 / mean squared error). `giantleap.training.evaluation.metrics.psnr_db` is that of 8-bit files.

    Args:
        image: [..., 3, height_px, width_px].
        expected: The reference, of the same shape.
        max_db: The value for equal images.

    Returns:
        dB, at most `max_db`; minus infinity if a value is not a number.
    """
    error = float((image.double().clamp(-1, 1) - expected.double().clamp(-1, 1)).square().mean())
    if not math.isfinite(error):
        return -math.inf
    return max_db if error == 0 else min(max_db, 10 * math.log10(4 / error))
