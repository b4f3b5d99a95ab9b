"""Any picture that Pillow opens as RGB, as a viewer shows it: upright, 16-bit grey unclipped, transparency on white.

Requests (`service/jobs/images.py`), pairs for a training and evaluations (`training/`) all read pictures through this.
It imports no torch, since the API process has none.
"""

import struct
import zlib

import numpy as np
from PIL import ExifTags, Image

_MAX_GREY = 2**16 - 1
# What Pillow was seen to raise on pictures that are damaged, cut off or absurdly large.
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
# What shows an image upright, by its orientation (EXIF 2.32, tag 0x0112); 1 is upright.
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
    """The picture in RGB, upright; what is transparent is laid on white.

    Raises:
        ValueError: The values have no known range (floats, or integers beyond 16 bits), or no way to RGB.
    """
    image.load()  # a PNG may say behind its pixels how it lies
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
    """Pillow's own `exif_transpose` also writes the EXIF data anew, which fails on odd ones."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)
