"""The image formats that are written, with their content types. Imports nothing, since the API process has no torch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

ImageFormat = Literal["png", "jpeg", "webp"]
CONTENT_TYPES: Final[Mapping[ImageFormat, str]] = MappingProxyType(
    {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
)
MAX_SIDE_PX: Final[Mapping[ImageFormat, int]] = MappingProxyType({"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383})
"""Longest side of an image: of PNG by its specification, of JPEG in libjpeg, of WebP by its 14 bits."""
