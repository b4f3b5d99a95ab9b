"""Reads any picture that Pillow opens as upright sRGB: color profiles applied, 16-bit gray unclipped, on white.

Requests (`service/jobs/images.py`), training pairs and evaluations (`training/`) use it. It imports no torch, which the
API process does not have.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, JpegImagePlugin, PngImagePlugin

MAX_JPEG_PX = 178_956_970  # where `Image.open` stops
_MAX_GRAY = 2**16 - 1
_PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG_START = b"\xff\xd8\xff"
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
# What it raises on damaged EXIF data and color profiles, without which a picture is shown as well.
_DAMAGED_METADATA = (*DAMAGE, ArithmeticError, AssertionError, AttributeError, LookupError, ImageCms.PyCMSError)
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
_PROFILE_MODES = {"GRAY": ("L", "I;16"), "RGB ": ("L", "I;16", "RGB"), "CMYK": ("CMYK",)}
_MAX_PROFILE_BYTES = 8 << 20  # of a decompressed color profile; those of printers have some MiB
_TRANSPARENCY_BYTES = {0: (2, 2), 2: (6, 6), 3: (1, 256)}  # fewest and most, by color type
_ANCILLARY = 0x20  # bit of the first letter
_SRGB_LEVELS = 2  # by which two versions of the sRGB profile differ


def open_picture(content: bytes, formats: Sequence[str] | None = None) -> tuple[Image.Image, int]:
    """Open a file for `to_rgb`, and count its frames: 1 unless it is an animation.

    What else is in the file cannot make it unreadable. Of the pictures of a camera's JPEG (previews, gain maps) the
    first counts.

    Args:
        content: The file.
        formats: Pillow's names of the formats to read; None for all.

    Raises:
        OSError, SyntaxError, ValueError: As the others of `DAMAGE`: no picture of these formats.
    """
    with _no_warnings():
        return _open(content, formats)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence Pillow's warnings of metadata that it cannot read, and of large pictures, which callers limit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(content: bytes, formats: Sequence[str] | None) -> tuple[Image.Image, int]:
    if content.startswith(_PNG_START):
        parts = _read_png(content)
        image: Image.Image = Image.open(io.BytesIO(parts.picture), formats=("PNG",))
        for name, value in (("icc_profile", parts.icc_profile), ("exif", parts.exif)):
            if value is not None:
                image.info[name] = value
        return image, parts.frames
    if content.startswith(_JPEG_START):
        jpeg = JpegImagePlugin.JpegImageFile(io.BytesIO(content))  # `Image.open` would read the other pictures too
        if jpeg.width * jpeg.height > MAX_JPEG_PX:
            raise Image.DecompressionBombError(f"a JPEG of {jpeg.width}x{jpeg.height} px; at most {MAX_JPEG_PX} px")
        return jpeg, 1
    image = Image.open(io.BytesIO(content), formats=None if formats is None else tuple(formats))
    return image, int(getattr(image, "n_frames", 1))


@dataclass(frozen=True, slots=True)
class _PngParts:
    """The parts of a PNG file.

    Args:
        picture: A PNG file with nothing but what the pixels need.
        icc_profile: The color profile; None where there is none that can be read.
        exif: As Pillow names it, with the head that JPEG files have; None where there is none.
        frames: Number of frames, more than 1 for an animation.
    """

    picture: bytes
    icc_profile: bytes | None = None
    exif: bytes | None = None
    frames: int = 1


def _read_png(content: bytes) -> _PngParts:
    """Take a PNG file apart; a damaged ancillary chunk counts as missing, a damaged critical one stays as it is."""
    view = memoryview(content)
    chunks, found = [view[: len(_PNG_START)]], dict[bytes, bytes]()
    start, color_type = len(_PNG_START), -1
    while (stop := start + 12 + int.from_bytes(view[start : start + 4])) <= len(view):
        name, data = bytes(view[start + 4 : start + 8]), view[start + 8 : stop - 4]
        if not name[0] & _ANCILLARY:
            chunks.append(view[start:stop])
            color_type = data[9] if name == b"IHDR" and len(data) > 9 else color_type
        elif name in (b"tRNS", b"iCCP", b"eXIf", b"acTL") and zlib.crc32(view[start + 4 : stop - 4]) == int.from_bytes(
            view[stop - 4 : stop]
        ):
            fewest, most = _TRANSPARENCY_BYTES.get(color_type, (1, 0))
            if name != b"tRNS":
                found[name] = bytes(data)
            elif fewest <= len(data) <= most:
                chunks.append(view[start:stop])
        start = stop
        if name == b"IEND":
            break
    else:
        chunks.append(view[start:])  # cut off: Pillow decides whether the pixels are whole
    frames = int.from_bytes(found.get(b"acTL", b"")[:4])
    exif = b"Exif\0\0" + found[b"eXIf"] if b"eXIf" in found else None
    return _PngParts(b"".join(chunks), _inflate_profile(found.get(b"iCCP", b"")), exif, max(1, frames))


def _inflate_profile(chunk: bytes) -> bytes | None:
    """A profile from its chunk: a name, a zero byte, the method 0, compressed data."""
    _, _, packed = chunk.partition(b"\0")
    if packed[:1] != b"\0":
        return None
    inflater = zlib.decompressobj()
    try:
        profile = inflater.decompress(packed[1:], _MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    return profile if inflater.eof else None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to upright sRGB, with transparent parts on white.

    Raises:
        ValueError: The values have no known range (floats, or integers beyond 16 bits), or cannot be converted to RGB.
    """
    color, alpha, turn = _split(image)
    color = _to_srgb(color, image.info.get("icc_profile"))
    if alpha is not None:
        color.putalpha(alpha)
        color = Image.alpha_composite(Image.new("RGBA", color.size, "white"), color).convert("RGB")
    return color if turn is None else color.transpose(turn)


def to_alpha(image: Image.Image) -> Image.Image | None:
    """The opacity of a picture, upright, "L": 0 where it is transparent; None if it has none.

    Raises:
        ValueError: As `to_rgb`.
    """
    _, alpha, turn = _split(image)
    return alpha if alpha is None or turn is None else alpha.transpose(turn)


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None, Image.Transpose | None]:
    """The colors of a picture as "L", "I;16", "RGB" or "CMYK", its opacity, and the turn that makes it upright."""
    deep_alpha = _read_clear_color(image)
    image.load()  # a PNG may store its orientation after the pixels
    turn = _TURNS.get(_orientation(image))
    if image.mode == "F":
        raise ValueError("gray values in floating point have no known range")
    color, alpha = _split_deep_gray(image) if image.mode.startswith("I") else _split_alpha(image)
    return color, deep_alpha or alpha, turn


def _read_clear_color(image: Image.Image) -> Image.Image | None:
    """Correct the transparent color of a PNG that is not loaded yet, which Pillow compares as if samples had 8 bits.

    Returns:
        Of 16-bit color the mask of what is shown, since Pillow keeps the upper bytes only; else None.
    """
    clear = image.info.get("transparency")
    if clear is None or not isinstance(image, PngImagePlugin.PngImageFile) or not image.tile or image.fp is None:
        return None
    stored = image.tile[0].args
    if stored in ("L;2", "L;4"):
        most = 2 ** int(stored[2:]) - 1
        image.info["transparency"] = (clear & most) * (255 // most)
    if stored != "RGB;16B":
        return None
    place = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(place)
    upper, lower = (_read_stored(content, raw_mode) for raw_mode in ("RGB;16B", "RGB;16L"))
    del image.info["transparency"]
    is_clear = ((upper << 8 | lower) == clear).all(axis=-1)
    return Image.fromarray(np.where(is_clear, 0, 255).astype(np.uint8))


def _read_stored(content: bytes, raw_mode: str) -> npt.NDArray[np.int64]:
    """The pixels of a PNG, unpacked by another of Pillow's raw modes than its own."""
    with Image.open(io.BytesIO(content)) as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        image.tile = [image.tile[0]._replace(args=raw_mode)]
        return np.asarray(image).astype(np.int64)


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation; Pillow's `exif_transpose` fails on odd EXIF data, which it rewrites."""
    try:
        with _no_warnings():
            return image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGED_METADATA:
        return None


def _split_deep_gray(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The values of 16-bit gray as "I;16", which Pillow would clip at 255 elsewhere, and the mask of what is shown."""
    gray = np.asarray(image).astype(np.int64)
    if gray.size and not 0 <= int(gray.min()) <= int(gray.max()) <= _MAX_GRAY:
        raise ValueError(f"gray values from {gray.min()} to {gray.max()}: only up to {_MAX_GRAY} are read")
    clear = image.info.get("transparency")
    alpha = None if clear is None else Image.fromarray(np.where(gray == clear, 0, 255).astype(np.uint8))
    return Image.fromarray(gray.astype(np.uint16)), alpha


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colors as "L", "RGB" or "CMYK", and what is transparent of them."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert({"1": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")), None
    shown = image.convert("RGBA")
    is_gray = image.mode in ("1", "L", "LA")
    return shown.getchannel("R") if is_gray else shown.convert("RGB"), shown.getchannel("A")


def _to_srgb(color: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert "L", "I;16", "RGB" or "CMYK" to RGB by a profile; a damaged one, or one for other colors, is ignored."""
    if profile:
        try:
            return _apply(color, ImageCms.ImageCmsProfile(io.BytesIO(profile)))
        except _DAMAGED_METADATA:
            pass
    return _to_8_bits(color).convert("RGB")


def _apply(color: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """Convert to RGB by a profile.

    Raises:
        ValueError: The profile is for other colors, or is that of sRGB, which would change a color by its rounding.
    """
    space = profile.profile.xcolor_space
    if color.mode not in _PROFILE_MODES.get(space, ()):
        raise ValueError(f"a profile of {space} does not fit a picture of {color.mode}")
    if color.mode in ("RGB", "CMYK"):
        return _transform(color, profile)
    # Gray by a table of all levels: littlecms' own has few points, which miss the dark ones of a linear profile.
    color = color if space == "GRAY" else _to_8_bits(color)
    levels = np.arange(2**16 if color.mode == "I;16" else 2**8, dtype=np.uint16 if color.mode == "I;16" else np.uint8)
    ramp = Image.fromarray(levels.reshape(256, -1))
    table = _transform(ramp if space == "GRAY" else ramp.convert("RGB"), profile, ImageCms.Flags.NOOPTIMIZE)
    return Image.fromarray(np.asarray(table).reshape(-1, 3)[np.asarray(color)])


def _transform(
    color: Image.Image, profile: ImageCms.ImageCmsProfile, flags: ImageCms.Flags = ImageCms.Flags.NONE
) -> Image.Image:
    """Convert to RGB by a profile.

    Raises:
        ValueError: The profile is that of sRGB.
    """
    srgb, flags = ImageCms.createProfile("sRGB"), flags | ImageCms.Flags.BLACKPOINTCOMPENSATION
    to_srgb = ImageCms.buildTransform(profile, srgb, color.mode, "RGB", flags=flags)
    if color.mode == "RGB" and _changes_nothing(to_srgb):
        raise ValueError("the profile is that of sRGB")
    return ImageCms.applyTransform(color, to_srgb)  # type: ignore[return-value]  # None only in place


def _to_8_bits(color: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(color) >> 8).astype(np.uint8)) if color.mode == "I;16" else color


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    levels = np.linspace(0, 255, 16).astype(np.uint8)
    probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    changed = np.asarray(ImageCms.applyTransform(Image.fromarray(probe), transform)).astype(int)
    return int(np.abs(changed - probe).max()) <= _SRGB_LEVELS
