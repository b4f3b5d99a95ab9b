"""A picture of any kind becomes the RGB that a viewer shows, or is refused; none is clipped to white in silence."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from giantleap.models.rgb import to_rgb

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
def test_grey_of_16_bits_keeps_its_upper_eight(form: str) -> None:
    found = shown(reopened(Image.fromarray(RAMP.astype(np.uint16)), form))
    np.testing.assert_array_equal(found, np.repeat((RAMP.astype(np.uint16) >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (200, 10, 10, 0)).convert(mode)
    assert shown(reopened(clear)).min() == 255


def test_grey_and_cmyk_are_shown() -> None:
    assert shown(reopened(Image.new("L", (4, 4), 77))).tolist() == [[[77] * 3] * 4] * 4
    assert shown(reopened(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "TIFF")).max() == 0


@pytest.mark.parametrize(
    "values", [RAMP.astype(np.float32), (RAMP * 2).astype(np.int32), (RAMP - 9).astype(np.int32)], ids=str
)
def test_values_without_a_known_range_are_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="grey values"):
        to_rgb(reopened(Image.fromarray(values), "TIFF"))
