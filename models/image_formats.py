"""The image formats that are written, with their content types. Imports nothing, since the API process has no torch."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

ImageFormat = Literal["png", "jpeg", "webp"]
CONTENT_TYPES: Final[Mapping[ImageFormat, str]] = MappingProxyType(
    {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
)
