"""Reads any picture that Pillow opens as upright RGB: 16-bit grey unclipped, transparency on white.

Requests (`service/jobs/images.py`), training pairs and evaluations (`training/`) use it. It imports no torch, which the
API process does not have.
"""

import struct
import zlib

import numpy as np
from PIL import ExifTags, Image

_MAX_GREY = 2**16 - 1
# What Pillow raises on damaged, truncated or oversized pictures.
DAMAGE = (
    EOFError,
    IndexError,
    OSError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# The turn that makes an image upright, by its orientation (EXIF 2.32, tag 0x0112); 1 is upright.
_TURNS: dict[object, Image.Transpose] = dict(
    zip(
        range(2, 9),
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        strict=True,
    )
)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to upright RGB, with transparent parts on white.

    Raises:
        ValueError: The values have no known range (floats, or integers beyond 16 bits), or cannot be converted to RGB.
    """
    image.load()  # a PNG may store its orientation after the pixels
    image = _to_upright(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.size and not 0 <= int(grey.min()) <= int(grey.max()) <= _MAX_GREY:
            raise ValueError(f"grey values from {grey.min()} to {grey.max()}: only up to {_MAX_GREY} are read")
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("grey values in floating point have no known range")
    if "A" in image.getbands() or "transparency" in image.info:
        shown = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    return image.convert("RGB")


def _to_upright(image: Image.Image) -> Image.Image:
    """Turn a picture by its EXIF orientation; Pillow's `exif_transpose` fails on odd EXIF data, which it rewrites."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)
