"""Takes a PNG file apart: its pixels, and what of the rest says how to show them.

Pillow refuses a whole picture for a broken comment, or for a long one such as the workflow that ComfyUI stores. It
imports no torch, which the API process does not have.
"""

import zlib
from dataclasses import dataclass

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE_BYTES = 8 << 20  # of a decompressed color profile; those of printers have some MiB
_TRANSPARENCY_BYTES = {0: (2, 2), 2: (6, 6), 3: (1, 256)}  # fewest and most, by color type
_ANCILLARY = 0x20  # bit of the first letter


@dataclass(frozen=True, slots=True)
class PngParts:
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


def read_png(content: bytes) -> PngParts:
    """Take a file apart; an ancillary chunk that is damaged counts as missing, and a critical one stays as it is."""
    view = memoryview(content)
    kept, found = [view[: len(SIGNATURE)]], dict[bytes, bytes]()
    start, color_type = len(SIGNATURE), -1
    while (stop := start + 12 + int.from_bytes(view[start : start + 4])) <= len(view):
        name, data = bytes(view[start + 4 : start + 8]), view[start + 8 : stop - 4]
        if not name[0] & _ANCILLARY:
            kept.append(view[start:stop])
            color_type = data[9] if name == b"IHDR" and len(data) > 9 else color_type
        elif name in (b"tRNS", b"iCCP", b"eXIf", b"acTL") and zlib.crc32(view[start + 4 : stop - 4]) == int.from_bytes(
            view[stop - 4 : stop]
        ):
            fewest, most = _TRANSPARENCY_BYTES.get(color_type, (1, 0))
            if name != b"tRNS":
                found[name] = bytes(data)
            elif fewest <= len(data) <= most:
                kept.append(view[start:stop])
        start = stop
        if name == b"IEND":
            break
    else:
        kept.append(view[start:])  # cut off: Pillow decides whether the pixels are whole
    frames = int.from_bytes(found.get(b"acTL", b"")[:4])
    exif = b"Exif\0\0" + found[b"eXIf"] if b"eXIf" in found else None
    return PngParts(b"".join(kept), _inflate_profile(found.get(b"iCCP", b"")), exif, max(1, frames))


def _inflate_profile(chunk: bytes) -> bytes | None:
    """A profile from its chunk: a name, a zero byte, the method 0, compressed data."""
    _, _, packed = chunk.partition(b"\0")
    if packed[:1] != b"\0":
        return None
    inflater = zlib.decompressobj()
    try:
        profile = inflater.decompress(packed[1:], MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    return profile if inflater.eof else None
