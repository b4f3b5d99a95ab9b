"""The images of a /generate job as its input blob: sizes, masks of both conventions, EXIF turns, refusals."""

import base64
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from giantleap.service.errors import InvalidFields, InvalidRequest
from giantleap.service.jobs.edits.inputs import InputImages, read_input, to_input, to_mask
from giantleap.service.jobs.job import GenerateParams
from giantleap.service.jobs.requests import GenerateRequest
from tests.service.fakes import GENERATE

MAX_PX = 2048 * 2048
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
# The right third is white, and in OpenAI's convention transparent.
WHITE = np.zeros((48, 64), np.uint8)
WHITE[:, 40:] = 255
BASE = replace(GENERATE, scale=2, width_px=128, height_px=96)  # its base image is as large as PIXELS


def to_file(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format=kind, **options)
    return buffer.getvalue()


def to_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def round_trip(params: GenerateParams, **fields: Any) -> InputImages:
    request = GenerateRequest.model_validate({"prompt": "a red sphere", **fields})
    return read_input(to_input(request, params, MAX_PX) or b"", params)


def edited(**fields: Any) -> InputImages:
    start = {"init_image": to_text(to_file(PIXELS))}
    return round_trip(replace(BASE, strength=1.0, mask=True), **start | fields)


def test_an_image_and_its_mask_come_back_as_they_were_sent() -> None:
    images = edited(mask=to_text(to_file(WHITE)))
    assert images.init_image is not None and images.mask is not None and images.references == ()
    np.testing.assert_array_equal(images.init_image, PIXELS)
    np.testing.assert_array_equal(images.mask, WHITE > 0)


def test_without_images_there_is_no_blob() -> None:
    request = GenerateRequest.model_validate({"prompt": "a red sphere"})
    assert to_input(request, BASE, MAX_PX) is None and read_input(b"", BASE) == InputImages()


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(WHITE).convert("1"),
        Image.fromarray(WHITE).convert("RGB"),
        Image.fromarray(WHITE).convert("P"),
        Image.fromarray(WHITE.astype(np.uint16) * 257),
        Image.merge("LA", [Image.new("L", (64, 48), 0), Image.fromarray(255 - WHITE)]),  # transparent counts as white
    ],
    ids=lambda image: image.mode,
)
def test_a_mask_of_any_mode_is_white_where_it_is_drawn_anew(mask: Image.Image) -> None:
    images = edited(mask=to_text(to_file(mask)))
    np.testing.assert_array_equal(images.mask, WHITE > 0)


def test_a_mask_is_turned_as_its_exif_data_say() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn clockwise makes it upright
    turned = Image.fromarray(WHITE).rotate(90, expand=True)
    images = edited(mask=to_text(to_file(turned, "PNG", exif=exif)))
    np.testing.assert_array_equal(images.mask, WHITE > 0)


def test_a_line_in_a_large_mask_is_not_lost_in_a_small_one() -> None:
    large, line = np.zeros((480, 640, 3), np.uint8), np.zeros((480, 640), np.uint8)
    line[:, 405] = 255
    images = edited(init_image=to_text(to_file(large)), mask=to_text(to_file(line)))
    assert images.mask is not None and images.mask[:, 40].all() and images.mask.sum() == 48


def test_reference_images_keep_their_shape_up_to_a_megapixel() -> None:
    small, wide = PIXELS.repeat(2, 0).repeat(2, 1), np.zeros((600, 2400, 3), np.uint8)
    images = round_trip(replace(BASE, images=2), images=[to_text(to_file(small)), to_text(to_file(wide))])
    first, second = images.references
    np.testing.assert_array_equal(first, small)
    assert second.shape == (512, 2048, 3) and images.init_image is None


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"mask": to_text(to_file(WHITE[:40]))}, "mask", "of 64x40 px, the init_image of 64x48 px"),
        ({"mask": to_text(to_file(np.zeros_like(WHITE)))}, "mask", "black everywhere"),
        ({"mask": to_text(to_file(WHITE)[:50])}, "mask", "damaged"),
        ({"mask": "https://example.com/mask.png"}, "mask", "a URL, which this service does not fetch"),
        ({"init_image": "http://example.com/photo.png", "mask": "AAAA"}, "init_image", "does not fetch"),
    ],
)
def test_an_image_or_mask_that_cannot_be_used_names_its_field(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidFields) as refusal:
        edited(**fields)
    assert [name for name, _ in refusal.value.fields] == [field] and words in refusal.value.fields[0][1]


@pytest.mark.parametrize(
    ("size", "words"), [((63, 100), "63x100 px; send sides of at least 64 px"), ((64, 520), "at most 8 times")]
)
def test_a_reference_image_too_small_or_too_narrow_is_refused(size: tuple[int, int], words: str) -> None:
    good, bad = (to_text(to_file(Image.new("RGB", each))) for each in ((64, 64), size))
    with pytest.raises(InvalidFields) as refusal:
        round_trip(replace(BASE, images=2), images=[good, bad])
    ((name, reason),) = refusal.value.fields
    assert name == "images.1" and words in reason


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    large = to_text(to_file(Image.new("L", (300, 300))))
    request = GenerateRequest.model_validate({"prompt": "a red sphere", "images": [large]})
    with pytest.raises(InvalidFields, match="300x300 pixels; send at most 10000"):
        to_input(request, replace(BASE, images=1), 10_000)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_mask_of_openai_is_drawn_anew_where_it_is_transparent(kind: str) -> None:
    mask = Image.fromarray(PIXELS)
    mask.putalpha(Image.fromarray(255 - WHITE))
    with Image.open(io.BytesIO(to_mask(to_file(mask, kind), MAX_PX))) as white:
        np.testing.assert_array_equal(np.asarray(white), WHITE)


def test_a_mask_of_openai_may_have_a_palette_and_a_turn() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    palette = Image.fromarray((WHITE[::-1, ::-1] > 0).astype(np.uint8)).convert("P")
    content = to_file(palette, "PNG", transparency=1, exif=exif)
    with Image.open(io.BytesIO(to_mask(content, MAX_PX))) as white:
        np.testing.assert_array_equal(np.asarray(white), WHITE)


@pytest.mark.parametrize("mask", [Image.fromarray(PIXELS), Image.new("RGBA", (64, 48), "white")], ids=["RGB", "opaque"])
def test_a_mask_of_openai_without_a_transparent_part_is_refused(mask: Image.Image) -> None:
    with pytest.raises(InvalidRequest, match="no transparent area"):
        to_mask(to_file(mask), MAX_PX)
