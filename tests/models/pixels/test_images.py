"""Image files: right pixels, right format, nothing else inside."""

import io
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from giantleap.models.pixels.image_formats import CONTENT_TYPES, LOSSY, Compression, FileOptions, ImageFormat
from giantleap.models.pixels.images import MAX_PSNR_DB, psnr_db, to_image_bytes


@pytest.fixture
def pixels() -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(40), indexing="ij")
    return torch.stack([rows * 10, columns * 6, (rows + columns) * 4], dim=-1).to(torch.uint8)


def read(file: bytes) -> Tensor:
    with Image.open(io.BytesIO(file)) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


def test_png_keeps_every_pixel(pixels: Tensor) -> None:
    image = Image.open(io.BytesIO(to_image_bytes(pixels, "png")))
    assert image.size == (40, 24), "width before height"
    assert torch.equal(torch.tensor(list(image.tobytes()), dtype=torch.uint8), pixels.flatten())


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_lossy_formats_stay_close(pixels: Tensor, output_format: ImageFormat) -> None:
    image = Image.open(io.BytesIO(to_image_bytes(pixels, output_format)))
    found = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.uint8)
    assert image.format == output_format.upper() and image.size == (40, 24)
    assert (found.int() - pixels.flatten().int()).abs().float().mean() < 6


@pytest.mark.parametrize("output_format", list(CONTENT_TYPES))
def test_nothing_but_pixels_is_written(pixels: Tensor, output_format: ImageFormat) -> None:
    content = to_image_bytes(pixels, output_format)
    image = Image.open(io.BytesIO(content))
    image.load()
    known = {"jfif", "jfif_version", "jfif_unit", "jfif_density", "loop", "background", "timestamp", "duration"}
    assert set(image.info) <= known
    assert not image.getexif() and b"tEXt" not in content and b"tIME" not in content and b"Exif" not in content


def test_a_small_file_is_smaller_and_keeps_the_quality() -> None:
    read_photograph: Callable[[], NDArray[np.uint8]] = skimage.data.astronaut
    photograph = torch.from_numpy(read_photograph())
    grain = torch.randn(photograph.shape, generator=torch.Generator().manual_seed(0)) * 4
    for image in (photograph, (photograph + grain).clamp(0, 255).to(torch.uint8)):
        for name in CONTENT_TYPES:
            fast, small = (to_image_bytes(image, name, options=FileOptions(each)) for each in get_args(Compression))
            errors = [float((read(file).float() - image.float()).square().mean()) for file in (fast, small)]
            assert len(small) < len(fast), name
            assert errors[1] <= errors[0] * 1.1, name


@pytest.mark.parametrize("output_format", LOSSY)
def test_a_lower_quality_gives_a_smaller_file_and_the_default_is_95(pixels: Tensor, output_format: ImageFormat) -> None:
    sizes = [len(to_image_bytes(pixels, output_format, options=FileOptions(quality=each))) for each in (1, 60, 95, 100)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
    assert len(to_image_bytes(pixels, output_format)) == sizes[2]


def test_equal_pixels_give_equal_bytes(pixels: Tensor) -> None:
    formats: tuple[ImageFormat, ...] = ("png", "jpeg", "webp")
    assert all(to_image_bytes(pixels, f) == to_image_bytes(pixels.clone(), f) for f in formats)


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(4, 4, 3), torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4, dtype=torch.uint8)],
    ids=["float", "gray", "channels first"],
)
def test_what_is_no_image_is_refused(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="uint8"):
        to_image_bytes(bad, "png")


def test_an_unknown_format_is_refused(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="gif"):
        to_image_bytes(pixels, "gif")  # type: ignore[arg-type]


def test_psnr_is_of_what_is_shown_and_a_number_wherever_there_is_an_image() -> None:
    image = torch.zeros(1, 3, 4, 4)
    assert psnr_db(image - 1.0, image + 1.0) == pytest.approx(0.0)
    assert psnr_db(image + 0.2, image) == pytest.approx(20.0, abs=1e-4)
    assert psnr_db(image + 9.0, image + 1.0) == MAX_PSNR_DB and psnr_db(image, image, 100.0) == 100.0
    assert psnr_db(image * math.nan, image) == -math.inf
