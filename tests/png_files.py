"""PNG files built chunk by chunk, for what Pillow does not write."""

import struct
import zlib
from collections.abc import Sequence

Chunk = tuple[bytes, bytes]
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def to_chunk(name: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """A chunk with its own checksum or another."""
    actual = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", actual)


def to_png(
    size: tuple[int, int], depth: int, color_type: int, rows: Sequence[bytes], before: Sequence[Chunk] = ()
) -> bytes:
    """A file of rows as they are stored, without filters; `before` are the chunks in front of the pixels."""
    header = struct.pack(">2I5B", *size, depth, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *before, (b"IDAT", pixels), (b"IEND", b"")]
    return SIGNATURE + b"".join(to_chunk(*chunk) for chunk in chunks)


def insert(png: bytes, chunk: bytes, before: bytes = b"IDAT") -> bytes:
    """The file with one more chunk in front of the first one of a name."""
    place = png.index(before) - 4
    return png[:place] + chunk + png[place:]
