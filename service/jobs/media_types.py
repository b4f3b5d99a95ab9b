"""Content types of request bodies, and the one parser of a Content-Type header."""

from typing import Final

JSON_TYPE: Final = "application/json"
SAFETENSORS_TYPE: Final = "application/x-safetensors"
NPY_TYPE: Final = "application/x-npy"
OCTETS_TYPE: Final = "application/octet-stream"
FORM_TYPE: Final = "multipart/form-data"


def read_media_type(header: str | None) -> str:
    """The media type of a Content-Type header in lower case, without parameters; "" where there is no header."""
    return (header or "").partition(";")[0].strip().lower()
