"""Decoded pixels as the bytes of an image file, PNG, JPEG or WebP without any metadata; and how alike two images are.

The pixels come from `giantleap.models.route`; the bytes go to the blobs of `giantleap.service.worker.items` or to a
file.
"""

import io
import math

import torch
from PIL import Image
from torch import Tensor

from giantleap.models.image_formats import ImageFormat

# A low PNG level: here the time of encoding counts for more than the size of the file.
_OPTIONS: dict[str, dict[str, int]] = {
    "png": {"compress_level": 3},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95, "method": 2},
}

MAX_PSNR_DB = 150.0  # of images that are equal: JSON has no infinity


def to_signed(pixels: Tensor) -> Tensor:
    """Pixels as a diffusion pipeline takes them.

    Shape:
        [height_px, width_px, 3], uint8 -> [3, height_px, width_px], float32 in [-1, 1].
    """
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0


def to_pixels(values: Tensor) -> Tensor:
    """Round images to bytes.

    Args:
        values: [batch, 3, height_px, width_px], clamped to [0, 1].

    Returns:
        [batch, height_px, width_px, 3], uint8, on the CPU.
    """
    return (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def to_image_bytes(pixels: Tensor, output_format: ImageFormat) -> bytes:
    """Encode one image. Nothing but the pixels and their size goes into the file.

    Shape:
        [height_px, width_px, 3], uint8, on the CPU.

    Raises:
        ValueError: The tensor has another shape or type, or the format is unknown.
    """
    if output_format not in _OPTIONS:
        raise ValueError(f"image format {output_format!r} is not known; there are {sorted(_OPTIONS)}")
    if pixels.dim() != 3 or pixels.shape[-1] != 3 or str(pixels.dtype) != "torch.uint8":
        raise ValueError(f"an image is uint8 [height, width, 3]; found {pixels.dtype} {list(pixels.shape)}")
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format=output_format.upper(), **_OPTIONS[output_format])
    return buffer.getvalue()


def psnr_db(image: Tensor, expected: Tensor, max_db: float = MAX_PSNR_DB) -> float:
    """Peak signal-to-noise ratio of what is shown: images in [-1, 1], clamped to it and not rounded.

    `giantleap.training.evaluation.metrics.psnr_db` is that of 8-bit files.

    Returns:
        dB, `max_db` at most; minus infinity where a value is not a number.

    Shape:
        Both [..., 3, height_px, width_px].
    """
    error = float((image.double().clamp(-1, 1) - expected.double().clamp(-1, 1)).square().mean())
    if not math.isfinite(error):
        return -math.inf
    return max_db if error == 0 else min(max_db, 10 * math.log10(4 / error))
