"""Reads an image from a request, PNG, JPEG or WebP, and refuses what is damaged or would not fit before decoding it.

Works on bytes and numpy only, so that the API process needs no torch. The API checks an image with `check_image` and
keeps the file as the job's input; the worker reads the same bytes with `read_image`.
"""

import binascii
import io
import struct
import threading
import warnings
from base64 import b64decode
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from giantleap.models.rgb import to_rgb
from giantleap.service.errors import InvalidRequest, MalformedRequest, PayloadTooLarge, UnsupportedMediaType

Pixels = npt.NDArray[np.uint8]

DECODES_AT_ONCE = 4
"""By the threads of one API process: an image of 16 million pixels, 75 kB as a file, takes up to 250 MB while it is
read, and the default pool has up to 32 threads."""
_DECODES = threading.Semaphore(DECODES_AT_ONCE)

_STARTS = {"image/png": (b"\x89PNG\r\n\x1a\n",), "image/jpeg": (b"\xff\xd8\xff",), "image/webp": (b"RIFF",)}
INPUT_IMAGE_TYPES = tuple(_STARTS)
_FORMATS = ("PNG", "JPEG", "WEBP")
# What Pillow raises on a damaged file, by format and by place in it.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error)


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Pixels of an image as it is shown: a rotation in its EXIF data is applied."""

    width_px: int
    height_px: int


def is_image(body: bytes, content_type: str | None) -> bool:
    """Whether a body is meant as an image: by its declared type, or by its first bytes where that says nothing."""
    declared = (content_type or "").partition(";")[0].strip().lower()
    unsaid = declared in ("", "application/octet-stream")
    return declared.startswith("image/") or (unsaid and _type_of(body) != "")


def check_image(body: bytes, content_type: str | None, max_px: int) -> ImageSize:
    """The size of an image that `read_image` will read; its header is checked before a pixel is decoded.

    Args:
        body: The file.
        content_type: As declared; None or application/octet-stream leaves it to the first bytes.
        max_px: Most pixels it may have.

    Raises:
        UnsupportedMediaType: another format than PNG, JPEG or WebP, or an animation.
        MalformedRequest: the bytes are damaged, cut off, or not of the declared type.
        PayloadTooLarge: more pixels than `max_px`.
    """
    _check_type(body, content_type)
    with _DECODES:
        pixels = read_image(body, max_px)
    return ImageSize(pixels.shape[1], pixels.shape[0])


def read_image(body: bytes, max_px: int) -> Pixels:
    """The pixels of an image in RGB, upright; what is transparent is laid on white.

    Returns:
        [height_px, width_px, 3], uint8.

    Raises:
        UnsupportedMediaType: an animation.
        MalformedRequest: the bytes are damaged or cut off.
        PayloadTooLarge: more pixels than `max_px`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the stricter one
            opened = Image.open(io.BytesIO(body), formats=_FORMATS)
        with opened as image:
            if image.width * image.height > max_px:
                raise PayloadTooLarge(
                    f"the image has {image.width}x{image.height} pixels; at most {max_px} in all are allowed"
                )
            if getattr(image, "n_frames", 1) > 1:
                raise UnsupportedMediaType("the image is animated; send a single frame")
            image.load()
            return np.array(to_rgb(image))  # a copy, which may be written to: torch warns of others
    except Image.DecompressionBombError as error:
        raise PayloadTooLarge(f"the image has far more pixels than the {max_px} that are allowed") from error
    except _DAMAGED as error:
        raise MalformedRequest("the image is damaged or cut off; send a complete PNG, JPEG or WebP file") from error


def fit_image(body: bytes, max_px: int, width_px: int, height_px: int) -> bytes:
    """A PNG file of the image at another size, its sides stretched where the shapes differ.

    Raises:
        MalformedRequest, UnsupportedMediaType, PayloadTooLarge: as `check_image`.
    """
    _check_type(body, None)
    with _DECODES:
        image = Image.fromarray(read_image(body, max_px)).resize((width_px, height_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def read_base64(text: str) -> bytes:
    """The bytes of base64 text, with or without a `data:` URL's head.

    Raises:
        InvalidRequest: it is not base64.
    """
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise InvalidRequest("a data: URL of an image must be base64")
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("the image is not valid base64") from error


def _type_of(body: bytes) -> str:
    for media_type, starts in _STARTS.items():
        if body.startswith(starts) and (media_type != "image/webp" or body[8:12] == b"WEBP"):
            return media_type
    return ""


def _check_type(body: bytes, content_type: str | None) -> None:
    declared = (content_type or "application/octet-stream").partition(";")[0].strip().lower()
    found = _type_of(body)
    if not body:
        raise MalformedRequest("the image is empty; send a PNG, JPEG or WebP file")
    if not found or declared not in (*INPUT_IMAGE_TYPES, "application/octet-stream"):
        raise UnsupportedMediaType(f"content type {declared[:80]!r}; images are sent as {', '.join(INPUT_IMAGE_TYPES)}")
    if declared not in (found, "application/octet-stream"):
        raise MalformedRequest(f"the image is declared as {declared} but starts like {found}")
