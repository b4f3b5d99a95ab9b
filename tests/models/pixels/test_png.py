"""PNG files of the own writer are read alike by Pillow and by a decoder of the standard library alone."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from giantleap.models.pixels.png import to_png, to_small_png
from tests.png_files import SIGNATURE, to_chunk

PACKET = "<x:xmpmeta>\N{SNOWMAN}</x:xmpmeta>".encode()


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


def read_chunks(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Check signature and checksums on the way."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    place = 8
    while place < len(file):
        length, kind = struct.unpack(">I4s", file[place : place + 8])
        content = file[place + 8 : place + 8 + length]
        (check,) = struct.unpack(">I", file[place + 8 + length : place + 12 + length])
        assert check == zlib.crc32(kind + content)
        yield kind, content
        place += 12 + length


def decode(file: bytes) -> NDArray[np.uint8]:
    chunks = dict(read_chunks(file))
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0], "eight bits, RGB, deflate, adaptive filters, not interlaced"
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    pixels = np.zeros((height, 3 * width), np.uint8)
    for index, row in enumerate(rows):
        assert row[0] in (0, 2)
        pixels[index] = row[1:] + (pixels[index - 1] if row[0] == 2 else 0)
    return pixels.reshape(height, width, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (33, 65), (512, 384)])
def test_every_reader_finds_the_pixels(size: tuple[int, int]) -> None:
    pixels = noise(*size)
    file = to_png(pixels)
    with Image.open(io.BytesIO(file), formats=("PNG",)) as image:
        image.verify()
    with Image.open(io.BytesIO(file), formats=("PNG",)) as image:
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)
    assert np.array_equal(decode(file), pixels)
    assert [kind for kind, _ in read_chunks(file)] == [b"IHDR", b"IDAT", b"IEND"]


def test_extremes_and_views_are_encoded() -> None:
    steps = np.zeros((4, 5, 3), np.uint8)
    steps[1::2] = 255  # differences that wrap around
    assert np.array_equal(decode(to_png(steps)), steps)
    view = noise(20, 30)[::2, ::-1]
    assert np.array_equal(decode(to_png(view)), view)


@pytest.mark.parametrize("encode", [to_png, to_small_png])
def test_metadata_is_read_back(encode: Callable[[NDArray[np.uint8], bytes], bytes]) -> None:
    with Image.open(io.BytesIO(encode(noise(8, 8), PACKET))) as image:
        assert image.info["XML:com.adobe.xmp"] == PACKET.decode()
        assert np.array_equal(np.asarray(image), noise(8, 8))


@pytest.mark.parametrize("packet", [None, PACKET])
def test_a_file_is_its_signature_and_its_chunks(packet: bytes | None) -> None:
    file = to_png(noise(33, 65), packet)
    assert file == SIGNATURE + b"".join(to_chunk(*chunk) for chunk in read_chunks(file))


@pytest.mark.parametrize("size", [(1, 1), (7, 1), (33, 65)])
def test_a_small_file_has_the_same_pixels_and_chunks(size: tuple[int, int]) -> None:
    pixels = noise(*size)
    file = to_small_png(pixels)
    with Image.open(io.BytesIO(file), formats=("PNG",)) as image:
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels)
    assert [kind for kind, _ in read_chunks(file)] == [b"IHDR", b"IDAT", b"IEND"]


def test_smooth_images_become_small() -> None:
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    assert len(to_png(ramp)) < ramp.size / 50
