"""The image formats that are written, with their content types. Imports nothing, since the API process has no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

ImageFormat = Literal["png", "jpeg", "webp"]
Compression = Literal["fast", "small"]
CONTENT_TYPES: Final[Mapping[ImageFormat, str]] = MappingProxyType(
    {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
)
MAX_SIDE_PX: Final[Mapping[ImageFormat, int]] = MappingProxyType({"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383})
"""Longest side of an image: of PNG by its specification, of JPEG in libjpeg, of WebP by its 14 bits."""
LOSSY: Final[tuple[ImageFormat, ...]] = ("jpeg", "webp")
DEFAULT_QUALITY: Final = 95


@dataclass(frozen=True, slots=True)
class FileOptions:
    """How an image file is compressed.

    Args:
        compression: `fast`, or `small`, which takes several times the processor time for the same pixels in less bytes.
        quality: 1 to 100, of the formats in `LOSSY`; None for `DEFAULT_QUALITY`.
    """

    compression: Compression = "fast"
    quality: int | None = None


DEFAULT_FILE: Final = FileOptions()
