"""A picture of any kind becomes the RGB that a viewer shows, or is refused; none is clipped to white in silence."""

import io
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from giantleap.models.pixels.rgb import open_picture, to_rgb
from tests.icc_profiles import (
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    Floats,
    cmyk_profile,
    gray_profile,
    linear_to_srgb,
    rgb_profile,
    shown_in_srgb,
    srgb_to_linear,
)
from tests.png_files import insert, to_chunk, to_png

RAMP = np.linspace(0, 65535, 64).reshape(8, 8)


def reopened(image: Image.Image, form: str = "PNG", **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    buffer.seek(0)
    return Image.open(buffer)


def shown(image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    return np.asarray(rgb)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_gray_of_16_bits_keeps_its_upper_eight(form: str) -> None:
    found = shown(reopened(Image.fromarray(RAMP.astype(np.uint16)), form))
    np.testing.assert_array_equal(found, np.repeat((RAMP.astype(np.uint16) >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (200, 10, 10, 0)).convert(mode)
    assert shown(reopened(clear)).min() == 255


def test_gray_and_cmyk_are_shown() -> None:
    assert shown(reopened(Image.new("L", (4, 4), 77))).tolist() == [[[77] * 3] * 4] * 4
    assert shown(reopened(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "TIFF")).max() == 0


@pytest.mark.parametrize(
    "values", [RAMP.astype(np.float32), (RAMP * 2).astype(np.int32), (RAMP - 9).astype(np.int32)], ids=str
)
def test_values_without_a_known_range_are_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="gray values"):
        to_rgb(reopened(Image.fromarray(values), "TIFF"))


def gamma_of_adobe(values: Floats) -> Floats:
    return values**2.19921875


def linear(values: Floats) -> Floats:
    return values


PROFILES: dict[str, tuple[Floats, Callable[[Floats], Floats]]] = {
    "Display P3": (DISPLAY_P3, srgb_to_linear),
    "Adobe RGB": (ADOBE_RGB, gamma_of_adobe),
    "linear sRGB": (SRGB, linear),
}
COLOR = (185, 71, 58)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("name", PROFILES)
def test_a_color_profile_is_applied(name: str, form: str) -> None:
    matrix, to_linear = PROFILES[name]
    settings: dict[str, dict[str, Any]] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    options = settings.get(form, {})
    image = reopened(Image.new("RGB", (16, 16), COLOR), form, icc_profile=rgb_profile(matrix, to_linear), **options)
    expected = shown_in_srgb(COLOR, matrix, to_linear)
    found = shown(image)[8, 8].astype(int)
    assert np.abs(found - expected).max() <= 2 and np.abs(found - COLOR).max() > 6


def test_display_p3_of_a_photograph_comes_out_as_its_srgb() -> None:
    profile = rgb_profile(DISPLAY_P3, srgb_to_linear)
    found = shown(reopened(Image.new("RGB", (2, 2), COLOR), icc_profile=profile))[0, 0].astype(int)
    assert np.abs(found - (200, 60, 50)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "L"])
def test_a_profile_applies_to_the_colors_of_every_mode_and_not_to_what_is_transparent(mode: str) -> None:
    profile = rgb_profile(SRGB, linear)
    image = Image.new("RGBA", (2, 1), (60, 60, 60, 255))
    if mode in ("RGBA", "LA"):
        image.putpixel((1, 0), (60, 60, 60, 0))
    found = shown(reopened(image.convert(mode), icc_profile=profile))
    expected = round(255 * float(linear_to_srgb(np.array(60 / 255))))
    assert abs(int(found[0, 0, 0]) - expected) <= 2
    assert found[0, 1].tolist() == ([255] * 3 if mode in ("RGBA", "LA") else found[0, 0].tolist())


@pytest.mark.parametrize("depth", [8, 16])
def test_gray_of_a_linear_profile_is_shown_at_its_depth(depth: int) -> None:
    values = np.array([[0, 80, 1000, 65535]], np.uint16)
    image = Image.fromarray(values if depth == 16 else (values >> 8).astype(np.uint8))
    stored = values / 65535 if depth == 16 else (values >> 8) / 255
    expected = np.rint(255 * linear_to_srgb(stored)).astype(int)
    found = shown(reopened(image, icc_profile=gray_profile(linear)))[..., 0].astype(int)
    assert np.abs(found - expected).max() <= 2


def test_inks_are_shown_as_their_profile_says() -> None:
    """Pillow alone would make pure cyan (0, 255, 255)."""
    profile = cmyk_profile(lambda ink: 60.0 if ink == (1, 0, 0, 0) else 100.0 - 25.0 * sum(ink))
    image = reopened(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF", icc_profile=profile)
    luminance = ((60.0 + 16.0) / 116.0) ** 3
    expected = round(255 * float(linear_to_srgb(np.array(luminance))))
    assert np.abs(shown(image).astype(int) - expected).max() <= 3


@pytest.mark.parametrize(
    "profile",
    [rgb_profile(SRGB, srgb_to_linear), b"no profile", rgb_profile(DISPLAY_P3, linear)[:200], gray_profile(linear)],
    ids=["sRGB", "damaged", "cut off", "for gray"],
)
def test_a_profile_of_srgb_or_one_that_cannot_be_used_changes_no_value(profile: bytes) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(shown(reopened(Image.fromarray(pixels), icc_profile=profile)), pixels)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_gray_is_white_at_every_depth(depth: int) -> None:
    """The second of two pixels is transparent; one whose lower byte differs is not."""
    row = b"\x01\x00\x01\x02" if depth == 16 else bytes([0, 1]) if depth == 8 else bytes([1 << (8 - 2 * depth)])
    clear = 0x0102 if depth == 16 else 1
    png = to_png((2, 1), depth, 0, [row], [(b"tRNS", clear.to_bytes(2))])
    for image in (Image.open(io.BytesIO(png)), open_picture(png)[0]):
        found = shown(image)[0, :, 0].tolist()
        assert found == [(0x0100 >> 8) if depth == 16 else 0, 255]


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_color_is_white_at_every_depth(depth: int) -> None:
    clear = (0x1234, 0x5678, 0x9ABC) if depth == 16 else (0x12, 0x56, 0x9A)
    other = (0x1234, 0x5678, 0x9ABD) if depth == 16 else (0x12, 0x56, 0x9B)
    bytes_each = depth // 8
    row = b"".join(value.to_bytes(bytes_each) for value in (*clear, *other))
    png = to_png((2, 1), depth, 2, [row], [(b"tRNS", b"".join(value.to_bytes(2) for value in clear))])
    for image in (Image.open(io.BytesIO(png)), open_picture(png)[0]):
        expected = [value >> 8 if depth == 16 else value for value in other]
        assert shown(image)[0].tolist() == [[255] * 3, expected]


PIXELS = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)
PNG = to_png((9, 6), 8, 2, [row.tobytes() for row in PIXELS])
LONG = zlib.compress(b"a workflow of ComfyUI " * 70_000)
ANCILLARY = {
    "text of 1.5 MB, compressed": to_chunk(b"zTXt", b"workflow\0\0" + LONG),
    "international text of 1.5 MB": to_chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
    "text that does not inflate": to_chunk(b"zTXt", b"workflow\0\0nothing"),
    "text of an unknown method": to_chunk(b"zTXt", b"workflow\0\7nothing"),
    "EXIF that is none": to_chunk(b"eXIf", b"nothing"),
    "EXIF of a broken entry": to_chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\xff\xff\xff\xff\0\0"),
    "a profile of an unknown method": to_chunk(b"iCCP", b"name\0\7nothing"),
    "a profile without a name": to_chunk(b"iCCP", b"name"),
    "a profile of 2 MB": to_chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2 << 20))),
    "transparency cut off": to_chunk(b"tRNS", b"\0"),
    "a gamma cut off": to_chunk(b"gAMA", b"\0"),
    "chromaticities cut off": to_chunk(b"cHRM", b"\0" * 7),
    "a size cut off": to_chunk(b"pHYs", b"\0"),
    "an animation of no frames": to_chunk(b"acTL", bytes(8)),
    "an animation cut off": to_chunk(b"acTL", b"\0"),
    "a wrong checksum": to_chunk(b"tEXt", b"Title\0a picture", checksum=1),
    "a wrong checksum of EXIF": to_chunk(b"eXIf", b"nothing", checksum=1),
}


@pytest.mark.parametrize("place", [b"IDAT", b"IEND"], ids=["before the pixels", "after them"])
@pytest.mark.parametrize("chunk", ANCILLARY.values(), ids=ANCILLARY.keys())
def test_what_a_png_needs_not_cannot_make_it_unreadable(chunk: bytes, place: bytes) -> None:
    image, frames = open_picture(insert(PNG, chunk, place))
    np.testing.assert_array_equal(shown(image), PIXELS)
    assert frames == 1


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"Exif\0\0nothing", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\0\0\0\0"])
def test_broken_exif_data_leave_a_picture_as_it_is(form: str, exif: bytes) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    image, _ = open_picture(buffer.getvalue())
    assert shown(image).shape == (6, 9, 3)


def test_damaged_pixels_are_damage() -> None:
    broken = PNG[: PNG.index(b"IDAT") + 10] + b"\xff" * 8 + PNG[PNG.index(b"IDAT") + 18 :]
    with pytest.raises((OSError, SyntaxError)):
        to_rgb(open_picture(broken)[0])


def test_a_camera_picture_with_a_preview_is_its_first_picture() -> None:
    buffer = io.BytesIO()
    first, second = Image.new("RGB", (32, 24), (200, 60, 50)), Image.new("RGB", (16, 12), (0, 0, 255))
    first.save(buffer, "MPO", save_all=True, append_images=[second], quality=95)
    image, frames = open_picture(buffer.getvalue(), ("PNG", "JPEG", "WEBP"))
    assert frames == 1 and image.size == (32, 24)
    assert np.abs(shown(image).astype(int) - (200, 60, 50)).max() <= 3


def test_a_huge_jpeg_is_refused_by_its_header() -> None:
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG")
    content = buffer.getvalue()
    place = content.index(b"\xff\xc0") + 5
    huge = content[:place] + b"\xff\xff\xff\xff" + content[place + 4 :]
    with pytest.raises(Image.DecompressionBombError):
        open_picture(huge)
