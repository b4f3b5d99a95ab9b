"""Reads an image from a request, PNG, JPEG or WebP, and refuses damaged and too large ones.

Works on bytes and numpy only, so that the API process needs no torch. The API checks an image with `check_image` and
stores the file as the job's input; the worker reads the same bytes with `read_image`.
"""

import binascii
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from giantleap.models.pixels.rgb import DAMAGE, open_picture, to_alpha, to_rgb
from giantleap.service.errors import InvalidRequest, MalformedRequest, PayloadTooLarge, UnsupportedMediaType
from giantleap.service.jobs.media_types import OCTETS_TYPE, name_format, read_media_type

Pixels = npt.NDArray[np.uint8]

DECODES_AT_ONCE = 4
"""Images that the threads of one API process decode at once. An image of 16 million pixels, 75 kB as a file, takes up
to 250 MB meanwhile, and the default thread pool has up to 32 threads."""
_DECODES = threading.Semaphore(DECODES_AT_ONCE)

_STARTS = {"image/png": (b"\x89PNG\r\n\x1a\n",), "image/jpeg": (b"\xff\xd8\xff",), "image/webp": (b"RIFF",)}
_FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Size of an image as it is shown: with the rotation of its EXIF data."""

    width_px: int
    height_px: int


def is_image(body: bytes, content_type: str | None) -> bool:
    """Whether a body is meant as an image: by its declared type, or by its first bytes where the type says nothing."""
    declared = read_media_type(content_type)
    return declared.startswith("image/") or (declared in ("", OCTETS_TYPE) and _type_of(body) != "")


def check_image(body: bytes, content_type: str | None, max_px: int) -> ImageSize:
    """Check that `read_image` can read an image, and return its size.

    Args:
        body: The file.
        content_type: Declared type, for the message; the first bytes decide.
        max_px: Most pixels that the image may have.

    Raises:
        UnsupportedMediaType: Another format than PNG, JPEG or WebP, or an animation.
        MalformedRequest: The bytes are damaged or cut off.
        PayloadTooLarge: More pixels than `max_px`.
    """
    _check_type(body, content_type)
    with _DECODES:
        pixels = read_image(body, max_px)
    return ImageSize(pixels.shape[1], pixels.shape[0])


def read_image(body: bytes, max_px: int) -> Pixels:
    """The pixels of an image in sRGB, upright, transparency on white; the size is checked before a pixel is decoded.

    Returns:
        Array [height_px, width_px, 3], uint8.

    Raises:
        UnsupportedMediaType: An animation.
        MalformedRequest: The bytes are damaged or cut off.
        PayloadTooLarge: More pixels than `max_px`.
    """
    with _opened(body, max_px) as image:
        return np.array(to_rgb(image))  # a writable copy: torch warns of read-only arrays


@contextmanager
def _opened(body: bytes, max_px: int) -> Iterator[Image.Image]:
    """The image of a file, not decoded yet; turns Pillow's errors for a damaged file into an error of the request."""
    try:
        opened, frames = open_picture(body, _FORMATS)
        with opened as image:
            if image.width * image.height > max_px:
                raise PayloadTooLarge(
                    f"the image has {image.width}x{image.height} pixels; send at most {max_px} in all"
                )
            if frames > 1:
                raise UnsupportedMediaType("the image is animated; send one frame")
            yield image
    except Image.DecompressionBombError as error:
        raise PayloadTooLarge(f"the image has too many pixels; send at most {max_px}") from error
    except DAMAGE as error:
        raise MalformedRequest("the image is damaged or cut off; send a complete PNG, JPEG or WebP file") from error


@contextmanager
def decoded_image(body: bytes, max_px: int) -> Iterator[Image.Image]:
    """An image of a client as RGB, as `read_image` reads it. Do not nest: few images at once are in memory.

    Raises:
        GiantleapError: As `check_image`.
    """
    _check_type(body, None)
    with _DECODES:
        yield Image.fromarray(read_image(body, max_px))


def open_alpha(body: bytes, max_px: int) -> Image.Image | None:
    """How opaque an image of a client is, as "L" and upright; None if it has no transparency.

    Raises:
        GiantleapError: As `check_image`.
    """
    _check_type(body, None)
    with _DECODES, _opened(body, max_px) as image:
        return to_alpha(image)


def read_base64(text: str) -> bytes:
    """Decode base64 text, with or without the head of a `data:` URL.

    Raises:
        InvalidRequest: It is not base64.
    """
    if text.startswith(("http://", "https://")):
        raise InvalidRequest("the image is a URL, which this service does not fetch; send the file as base64")
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise InvalidRequest("the data: URL is not base64; send data:image/png;base64,...")
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("the image is not valid base64; send a PNG, JPEG or WebP file as base64") from error


def _type_of(body: bytes) -> str:
    for media_type, starts in _STARTS.items():
        if body.startswith(starts) and (media_type != "image/webp" or body[8:12] == b"WEBP"):
            return media_type
    return ""


def _check_type(body: bytes, content_type: str | None) -> None:
    """Among the types that are read the first bytes decide: clients declare what a file's name says, often wrongly."""
    if not body:
        raise MalformedRequest("the image is empty; send a PNG, JPEG or WebP file")
    declared = read_media_type(content_type) or OCTETS_TYPE
    if (name := name_format(body)) is not None:
        raise UnsupportedMediaType(f"the body is {name}; send a PNG, JPEG or WebP file")
    if not _type_of(body) or declared not in (*_STARTS, OCTETS_TYPE):
        raise UnsupportedMediaType(f"the content type is {declared[:80]!r}; send an image as {', '.join(_STARTS)}")
