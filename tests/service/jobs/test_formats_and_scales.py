"""Planning against what a file format holds, and the scale that reaches a size where none is given."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.pixels.image_formats import FileOptions, ImageFormat
from giantleap.service.errors import InvalidFields
from giantleap.service.jobs.latents import to_blob
from giantleap.service.jobs.planning import choose_scale, plan_generate, prepare_upscale
from giantleap.service.jobs.requests import GenerateRequest, UpscaleQuery
from giantleap.service.settings import POCKET_BUNDLE, read_settings

POCKET = read_bundle(POCKET_BUNDLE)
SETTINGS = read_settings()
CHANNELS, STRIDE_PX = POCKET.latent_space.channels, POCKET.latent_space.stride_px


def upscale(latent_height: int, latent_width: int, output_format: ImageFormat, **query: Any) -> Any:
    latent = np.zeros((1, CHANNELS, latent_height, latent_width), np.float32)
    asked = UpscaleQuery.model_validate({"scale": 1} | query)
    return prepare_upscale(asked, to_blob(latent), None, POCKET, SETTINGS, output_format)[0]


@pytest.mark.parametrize(("output_format", "limit_px"), [("webp", 16_383), ("jpeg", 65_500)])
def test_a_side_that_the_format_does_not_hold_is_refused_before_the_work(
    output_format: ImageFormat, limit_px: int
) -> None:
    longest = limit_px // STRIDE_PX
    upscale(2, longest, output_format)
    for size in ((2, longest + 1), (longest + 1, 2)):
        with pytest.raises(
            InvalidFields, match=f"output_format: is {output_format}, which holds sides up to {limit_px}"
        ):
            upscale(*size, output_format)
        assert upscale(*size, "png").output_format == "png"
        upscale(*size, output_format, output="latent")


def test_a_quality_needs_a_format_that_has_one() -> None:
    assert upscale(4, 4, "webp", quality="80", compression="small").file == FileOptions("small", 80)
    assert upscale(4, 4, "png").file == FileOptions("fast", None)
    with pytest.raises(InvalidFields, match="quality: applies to jpeg and webp; a png keeps every pixel"):
        upscale(4, 4, "png", quality="80")
    request = GenerateRequest.model_validate({"prompt": "a red sphere", "quality": 80, "compression": "small"})
    assert plan_generate(request, POCKET, SETTINGS, 0, "jpeg").file == FileOptions("small", 80)
    with pytest.raises(InvalidFields, match="quality: applies to jpeg and webp"):
        plan_generate(request, POCKET, SETTINGS, 0, "png")


@pytest.mark.parametrize(("name", "value"), [("compression", "fast"), ("quality", "80")])
def test_a_latent_takes_no_option_of_an_image_file(name: str, value: str) -> None:
    with pytest.raises(InvalidFields, match=f"{name}: applies to images; leave it out with output=latent"):
        upscale(4, 4, "png", output="latent", **{name: value})


def test_the_limit_is_that_of_the_encoder() -> None:
    """libjpeg and libwebp take the longest side and not one more."""
    import io

    from PIL import Image

    for name, limit_px in (("webp", 16_383), ("jpeg", 65_500)):
        Image.new("RGB", (limit_px, 1)).save(io.BytesIO(), name)
        with pytest.raises((ValueError, OSError)):
            Image.new("RGB", (limit_px + 1, 1)).save(io.BytesIO(), name)


@pytest.mark.parametrize(
    ("size", "scale"),
    [((512, 512), 4), ((256, 256), 2), ((512, None), 4), ((None, None), 2), ((333, 333), 2), ((128, 128), None)],
)
def test_the_scale_that_reaches_the_size_is_taken_where_none_is_given(
    size: tuple[int | None, int | None], scale: int | None
) -> None:
    default = POCKET.defaults.scale
    found = choose_scale(POCKET, "lua", None, size)
    if scale is not None:
        assert found == (default if size == (333, 333) else scale)
    else:
        assert POCKET.base_size(128, 128, found, "lua"), "whichever it is, it reaches the size"


def test_a_size_beyond_the_default_scale_is_drawn_at_the_next_one() -> None:
    request = GenerateRequest.model_validate({"prompt": "a red sphere", "width": 512, "height": 512})
    params = plan_generate(request, POCKET, SETTINGS, 1, "png")
    assert (params.scale, params.width_px, params.base_size_px) == (4, 512, (128, 128))


def test_a_scale_that_does_not_reach_the_size_names_the_one_that_does() -> None:
    request = GenerateRequest.model_validate({"prompt": "a red sphere", "width": 512, "height": 512, "scale": 2})
    with pytest.raises(InvalidFields, match="scale 4 reaches 512x512"):
        plan_generate(request, POCKET, SETTINGS, 1, "png")


@pytest.mark.parametrize("name", ["flux1", "flux2", "qwen-image", "qwen-image-21", "wan21", "sdxl", "sd3"])
def test_a_scaled_latent_that_is_not_packed_becomes_the_same_raw_one(name: str) -> None:
    space = LATENT_SPACES[name]
    if space.statistics_in_vae:
        ones = [1.0 + index / 128 for index in range(4 * space.channels)]
        space = space.with_statistics(ones, ones)
    raw = np.random.default_rng(0).standard_normal((2, space.channels, 4, 6)).astype(np.float32)
    scaled = space.from_raw(raw)
    if space.is_packed:
        height_px, width_px = 4 * space.stride_px, 6 * space.stride_px
        plain = space._unpack(scaled, height_px, width_px)
    else:
        plain = scaled[:, :, 0] if space.packing == "frame" else scaled
    np.testing.assert_allclose(space.unscale(plain), raw, atol=1e-5)


def test_a_refusal_names_the_shape_that_was_sent() -> None:
    for shape in ((CHANNELS + 1, 4, 6), (1, CHANNELS + 1, 4, 6), (4, 6)):
        blob = to_blob(np.zeros(shape, np.float32))
        with pytest.raises(InvalidFields) as caught:
            prepare_upscale(UpscaleQuery.model_validate({}), blob, None, POCKET, SETTINGS, "png")
        assert f"found {list(shape)}" in caught.value.detail


def test_a_size_beside_a_latent_that_tells_its_own_must_be_its_own() -> None:
    assert upscale(4, 6, "png", width=6 * STRIDE_PX, height=4 * STRIDE_PX).latent_width == 6
    for wrong in ({"width": 2 * STRIDE_PX}, {"height": 100 * STRIDE_PX}):
        with pytest.raises(InvalidFields, match="leave it out"):
            upscale(4, 6, "png", **wrong)
    assert replace(POCKET.latent_space, has_frames=True).is_one_frame((CHANNELS, 1, 4, 6))
