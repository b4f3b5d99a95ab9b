"""Images from clients: what is read, and that nothing damaged, huge or of another kind is."""

import io
import struct
import threading
import time
import zipfile
import zlib
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from giantleap.service.errors import (
    GiantleapError,
    InvalidRequest,
    MalformedRequest,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from giantleap.service.jobs import images as images_in
from giantleap.service.jobs.images import ImageSize, check_image, decoded_image, is_image, read_base64, read_image
from giantleap.service.jobs.latents import read_values
from tests.icc_profiles import DISPLAY_P3, rgb_profile, srgb_to_linear

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def to_file(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


PNG = to_file(Image.fromarray(PIXELS))


@pytest.mark.parametrize(
    ("image_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100})]
)
def test_each_format_is_read_by_its_type_or_its_first_bytes(image_format: str, options: dict[str, Any]) -> None:
    body = to_file(Image.fromarray(PIXELS), image_format, **options)
    for content_type in (f"image/{image_format.lower()}; q=1", None, "application/octet-stream"):
        assert is_image(body, content_type)
        size = check_image(body, content_type, 54)
        assert (size.width_px, size.height_px) == (9, 6)
    pixels = read_image(body, 54)
    assert pixels.shape == (6, 9, 3) and pixels.dtype == np.uint8
    if image_format != "JPEG":
        np.testing.assert_array_equal(pixels, PIXELS)


def test_size_is_refused_from_the_header_alone() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    body = PNG[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + PNG[33:]
    with pytest.raises(PayloadTooLarge, match="pixels"):
        check_image(body, "image/png", 10**6)
    with pytest.raises(PayloadTooLarge, match="9x6 pixels; send at most 53"):
        check_image(PNG, "image/png", 53)


def test_deep_and_transparent_and_rotated_images_become_upright_rgb() -> None:
    deep = Image.fromarray(np.full((2, 2), 0x80FF, dtype=np.uint16))
    assert read_image(to_file(deep), 100).tolist() == [[[128] * 3] * 2] * 2
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert read_image(to_file(clear), 100).tolist() == [[[255, 255, 255]]]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    turned = to_file(Image.fromarray(PIXELS), exif=exif)
    assert (check_image(turned, None, 100).width_px, read_image(turned, 100).shape) == (6, (9, 6, 3))
    np.testing.assert_array_equal(read_image(turned, 100), np.rot90(PIXELS, -1))


@pytest.mark.parametrize("orientation", range(10))
def test_an_image_is_turned_as_pillow_does_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation  # 0 and 9 mean nothing
    body = to_file(Image.fromarray(PIXELS), exif=exif)
    with Image.open(io.BytesIO(body)) as image:
        np.testing.assert_array_equal(read_image(body, 100), np.asarray(ImageOps.exif_transpose(image)))


def test_a_turned_image_is_read_whatever_else_its_exif_data_hold() -> None:
    """Pillow cannot write a description that is a number, and need not."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    written = exif.tobytes()
    entry = written.index(b"\x01\x0e\x00\x02")
    rational = struct.pack(">HHLL", 0x010E, 5, 1, 8)  # tag, type, count, offset
    odd = written[:entry] + rational + written[entry + len(rational) :]
    assert read_image(to_file(Image.fromarray(PIXELS), exif=odd), 100).shape == (9, 6, 3)


@pytest.mark.parametrize(
    ("body", "content_type", "error"),
    [
        (b"", "image/png", MalformedRequest),
        (PNG[:60], "image/png", MalformedRequest),
        (PNG, "image/gif", UnsupportedMediaType),
        (PNG, "text/plain", UnsupportedMediaType),
        (to_file(Image.fromarray(PIXELS), "BMP"), "application/octet-stream", UnsupportedMediaType),
        (to_file(Image.fromarray(PIXELS), "GIF"), "image/gif", UnsupportedMediaType),
        (b"RIFF\x00\x00\x00\x00WEBPnothing", "image/webp", MalformedRequest),
    ],
)
def test_other_bodies_are_refused(body: bytes, content_type: str, error: type[GiantleapError]) -> None:
    with pytest.raises(error):
        check_image(body, content_type, 10**6)


def test_few_images_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of some kilobytes may be an image that takes a quarter of a gigabyte while it is read."""
    lock, running, seen = threading.Lock(), 0, []

    def read(body: bytes, max_px: int) -> Any:
        nonlocal running
        with lock:
            running += 1
            seen.append(running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return PIXELS

    monkeypatch.setattr(images_in, "read_image", read)

    def open_one() -> bool:
        with decoded_image(PNG, 54) as image:
            return image.size == (9, 6)

    with ThreadPoolExecutor(16) as pool:
        checked = [pool.submit(check_image, PNG, None, 54) for _ in range(16)]
        opened = [pool.submit(open_one) for _ in range(16)]
        assert all(each.result() for each in checked) and all(each.result() for each in opened)
    assert len(seen) == 32 and max(seen) <= images_in.DECODES_AT_ONCE


def test_animation_is_refused() -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    body = to_file(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(UnsupportedMediaType, match="animated"):
        check_image(body, "image/webp", 10**6)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_pixels_may_be_written_to_so_that_torch_takes_them_without_a_warning(mode: str) -> None:
    content = io.BytesIO()
    Image.new(mode, (4, 3)).save(content, "PNG")
    assert read_image(content.getvalue(), 12).flags.writeable


def test_latents_are_not_taken_for_images() -> None:
    assert not is_image(b"\x93NUMPY\x01\x00", None)
    assert not is_image(b"\x10\x00\x00\x00\x00\x00\x00\x00{", "application/octet-stream")
    assert not is_image(PNG, "application/x-safetensors")


@given(st.integers(0, len(PNG) - 1), st.binary(min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_damage_never_raises_another_error(at: int, damage: bytes) -> None:
    body = PNG[:at] + damage + PNG[at + len(damage) :]
    try:
        check_image(body, None, 10**6)
    except GiantleapError as error:
        assert error.status in (400, 413, 415)


def test_base64_with_and_without_a_data_url() -> None:
    text = b64encode(PNG).decode()
    assert read_base64(text) == PNG == read_base64(f"data:image/png;base64,{text}")
    for bad in ("no base64!", "data:image/png,abc", text[:-3]):
        with pytest.raises(InvalidRequest):
            read_base64(bad)


def to_npz(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


def to_zip(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


@pytest.mark.parametrize("declared", ["image/jpeg", "image/jpg", "image/webp", "image/x-png", None])
def test_the_bytes_tell_the_format_and_not_the_name_of_the_file(declared: str | None) -> None:
    assert check_image(PNG, declared, 100).width_px == 9


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (to_file(Image.fromarray(PIXELS), "BMP"), "a BMP image"),
        (to_file(Image.fromarray(PIXELS), "TIFF"), "a TIFF image"),
        (to_file(Image.fromarray(PIXELS), "GIF"), "a GIF image"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "an AVIF image"),
        (b"\0\0\0\x20ftypheic\0\0\0\0", "a HEIC image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG image"),
        (to_npz(PIXELS), "an .npz archive, not one array"),
        (to_zip("archive/data.pkl"), "a pickle, which is never loaded"),
        (to_zip("notes.txt"), "a zip archive"),
    ],
)
@pytest.mark.parametrize("content_type", ["application/octet-stream", None, "image/png", "image/bmp"])
def test_other_formats_are_named(body: bytes, name: str, content_type: str | None) -> None:
    read: Any = check_image if is_image(body, content_type) else read_values
    with pytest.raises(UnsupportedMediaType, match=f"the body is {name}; send .*PNG, JPEG or WebP"):
        read(body, content_type, *((100,) if read is check_image else ()))


def test_the_first_picture_of_a_camera_counts_and_an_animation_is_refused() -> None:
    """Cameras and phones store previews and gain maps as further pictures of the file (MPO)."""
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    photo = to_file(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=100, subsampling=0)
    for content_type in ("image/jpeg", None):
        assert check_image(photo, content_type, 54) == ImageSize(9, 6)
    np.testing.assert_array_equal(
        read_image(photo, 54), read_image(to_file(frames[0], "JPEG", quality=100, subsampling=0), 54)
    )
    animation = to_file(frames[0], "PNG", save_all=True, append_images=frames[1:])
    with pytest.raises(UnsupportedMediaType, match="animated"):
        check_image(animation, "image/png", 10**6)


def test_the_workflow_that_comfyui_stores_in_a_png_may_be_long() -> None:
    info = PngInfo()
    info.add_text("workflow", "a node of many " * 200_000, zip=True)
    np.testing.assert_array_equal(read_image(to_file(Image.fromarray(PIXELS), pnginfo=info), 54), PIXELS)


def test_the_colors_of_a_profile_become_srgb() -> None:
    body = to_file(Image.new("RGB", (2, 2), (185, 71, 58)), icc_profile=rgb_profile(DISPLAY_P3, srgb_to_linear))
    assert np.abs(read_image(body, 4).astype(int) - (200, 60, 50)).max() <= 1
