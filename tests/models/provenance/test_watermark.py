"""The watermark: found again after what happens to images, never where there is none, and hardly to be seen."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from giantleap.models.provenance.marker import ImageMarker
from giantleap.models.provenance.watermark import (
    MAX_NUMBER,
    THRESHOLD,
    Pixels,
    add_watermark,
    find_watermark,
    strongest_match,
)
from giantleap.models.provenance.xmp import Origin
from giantleap.training.pocket.drawing.leaves import draw_leaves


@pytest.fixture(scope="module")
def picture() -> Pixels:
    """Dead leaves, which have the statistics of photographs."""
    return draw_leaves(np.random.default_rng(3), 512)


@pytest.fixture(scope="module")
def marked(picture: Pixels) -> Image.Image:
    return Image.fromarray(add_watermark(picture, 4711))


def as_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=75)
    return Image.open(buffer)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "unchanged": lambda image: image,
    "JPEG 75": as_jpeg,
    "half the size": lambda image: image.resize((256, 256), Image.Resampling.LANCZOS),
    "half the size, JPEG 75": lambda image: as_jpeg(image.resize((256, 256), Image.Resampling.LANCZOS)),
    "cropped": lambda image: image.crop((31, 19, 492, 480)),
    "larger": lambda image: image.resize((768, 768), Image.Resampling.BICUBIC),
    "transparent": lambda image: image.convert("RGBA"),
    "gray": lambda image: image.convert("L"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_mark_survives(marked: Image.Image, change: Callable[[Image.Image], Image.Image]) -> None:
    found = find_watermark(change(marked))
    assert found is not None and found.number == 4711 and found.score > THRESHOLD


@pytest.mark.parametrize("number", [0, 1, 0xAAAA, MAX_NUMBER])
def test_every_number_is_read_back(number: int) -> None:
    flat = np.full((200, 300, 3), 255, np.uint8)
    found = find_watermark(Image.fromarray(add_watermark(flat, number)))
    assert found is not None and found.number == number


def test_an_image_without_a_mark_has_none(picture: Pixels) -> None:
    assert find_watermark(Image.fromarray(picture)) is None
    assert 3 < strongest_match(Image.fromarray(picture)) < THRESHOLD


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (40, 40)])
def test_an_image_too_small_for_a_mark_is_an_image_without_one(size: tuple[int, int]) -> None:
    small = np.zeros((*size, 3), np.uint8)
    assert add_watermark(small, 5).shape == small.shape and find_watermark(Image.fromarray(small)) is None


def test_a_mark_changes_no_level_by_much_and_an_image_of_many_strips_as_one(picture: Pixels) -> None:
    tall = np.concatenate([picture] * 3)
    strips, whole = add_watermark(tall, 9), add_watermark(picture, 9)
    assert np.array_equal(strips[:500], whole[:500]), "the last rows see what lies below them"
    error = strips.astype(np.float64) - tall
    assert np.abs(error).max() < 16 and 10 * np.log10(255**2 / np.mean(error**2)) > 40


def test_the_marker_marks_the_pixels_only_where_a_number_is_set(picture: Pixels) -> None:
    pixels = torch.from_numpy(picture.copy())
    files = {number: ImageMarker(watermark=number).to_file(pixels, "webp", Origin()) for number in (None, 0, 77)}
    numbers = {}
    for number, content in files.items():
        found = find_watermark(Image.open(io.BytesIO(content)))
        numbers[number] = None if found is None else found.number
    assert numbers == {None: None, 0: 0, 77: 77}
    assert np.array_equal(pixels.numpy(), picture), "the pixels of the caller stay as they are"
