"""Content types of request bodies: the one parser of a Content-Type header, and what a body is by its first bytes."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

JSON_TYPE: Final = "application/json"
SAFETENSORS_TYPE: Final = "application/x-safetensors"
NPY_TYPE: Final = "application/x-npy"
OCTETS_TYPE: Final = "application/octet-stream"
FORM_TYPE: Final = "multipart/form-data"
_ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-png": "image/png"}
)
"""Types that clients send and no registry has."""
_STARTS: Final = (
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"GIF8", "a GIF image"),
    (b"\0\0\1\0", "an ICO image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"8BPS", "a Photoshop file"),
    (b"v/1\x01", "an OpenEXR image"),
    (b"%PDF", "a PDF file"),
    (b"<svg", "an SVG image"),
    (b"<?xml", "an XML file"),
    (b"\x80\x02", "a pickle, which is never loaded"),
    (b"\x80\x03", "a pickle, which is never loaded"),
    (b"\x80\x04", "a pickle, which is never loaded"),
    (b"\x80\x05", "a pickle, which is never loaded"),
    (b"\x1f\x8b", "a gzip file"),
)
_BRANDS: Final[Mapping[bytes, str]] = MappingProxyType(
    {
        b"avif": "an AVIF image",
        b"avis": "an AVIF image",
        b"heic": "a HEIC image",
        b"heix": "a HEIC image",
        b"mif1": "a HEIF image",
        b"msf1": "a HEIF image",
    }
)


def read_media_type(header: str | None) -> str:
    """The media type of a Content-Type header in lower case, without parameters; "" where there is no header."""
    declared = (header or "").partition(";")[0].strip().lower()
    return _ALIASES.get(declared, declared)


def name_format(body: bytes) -> str | None:
    """What a body is that is read neither as a latent nor as an image, with its article; None if that is not known."""
    if body[4:8] == b"ftyp":
        return _BRANDS.get(body[8:12], "an MP4 video")
    if body.startswith(b"PK\x03\x04"):  # a zip archive, whose first entry tells its kind
        name = body[30 : 30 + int.from_bytes(body[26:28], "little")]
        if name.endswith(b".npy"):
            return "an .npz archive, not one array"
        return "a pickle, which is never loaded" if name.endswith(b".pkl") else "a zip archive"
    return next((name for start, name in _STARTS if body.startswith(start)), None)
