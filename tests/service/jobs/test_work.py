"""The work of a job in pixel-steps: every pass of every method, images that come in, and the final pixels once."""

from dataclasses import replace

import pytest

from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.bundle.descriptor import Method
from giantleap.models.generation.refinement import Refinement
from giantleap.service.jobs.grid import Charge, count_pixel_steps
from giantleap.service.jobs.job import GenerateParams, UpscaleParams
from tests.service.fakes import GENERATE
from tests.service.paper_bundle import write_paper_bundle

BASE_PX = 128 * 96
DRAWN = replace(GENERATE, width_px=256, height_px=192, scale=2, steps=10, num_images=1)
LATENT = UpscaleParams(2, "flux1", 1, 16, 12, 16, "image", "png")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of stride 8."""
    return read_bundle(write_paper_bundle(tmp_path_factory.mktemp("bundles") / "paper"))


@pytest.mark.parametrize(
    ("method", "drawn"),
    [
        ("lua", 10),
        ("bicubic", 10),
        ("swinir", 10),
        ("direct", 40),
        ("hidiffusion", 40),
        ("scalecrafter", 40),
        ("rectifiedhr", 6 + 4 * 4),
        ("demofusion", 10 * (1 + 13)),
        ("lsrna", 10 + 6 * 13),
    ],
)
def test_a_drawing_is_its_sampling_passes_and_the_final_pixels_once(bundle: Bundle, method: Method, drawn: int) -> None:
    assert count_pixel_steps(replace(DRAWN, method=method), bundle) == BASE_PX * (drawn + 4)


@pytest.mark.parametrize(
    ("changed", "pixel_steps"),
    [
        ({"num_images": 3}, 3 * BASE_PX * 14),
        ({"strength": 0.35}, BASE_PX * (3 + 4)),
        ({"scale": 1, "width_px": 128, "height_px": 96, "method": "lsrna"}, BASE_PX * 11),
        ({"scale": 1.5, "width_px": 192, "height_px": 144}, BASE_PX * 10 + 192 * 144),
        ({"refine": Refinement(0.15, 4)}, BASE_PX * (10 + 4 * 4 + 4)),
    ],
)
def test_images_strength_scale_and_refine_count(bundle: Bundle, changed: dict[str, object], pixel_steps: int) -> None:
    params: GenerateParams = replace(DRAWN, **changed)  # type: ignore[arg-type]
    assert count_pixel_steps(params, bundle) == pixel_steps


def test_windows_of_a_refine_pass_count_where_they_overlap(bundle: Bundle) -> None:
    side_px = bundle.max_side_px
    wide = replace(DRAWN, width_px=2 * side_px, height_px=side_px, refine=Refinement(0.15, 4))
    once = count_pixel_steps(replace(wide, refine=None), bundle)
    assert count_pixel_steps(wide, bundle) - once == 4 * 3 * side_px**2, "three windows a quarter over each other"


def test_an_enlarged_latent_or_image_is_its_final_pixels(bundle: Bundle) -> None:
    assert count_pixel_steps(LATENT, bundle) == 256 * 192
    assert count_pixel_steps(replace(LATENT, batch_items=2, output="latent"), bundle) == 2 * 256 * 192
    photo = replace(LATENT, image_width_px=125, image_height_px=90)
    assert count_pixel_steps(photo, bundle) == 250 * 180
    refined = replace(LATENT, refine=Refinement(0.15, 4), prompt="a red sphere", seed=1)
    assert count_pixel_steps(refined, bundle) == 256 * 192 * 5


def test_a_charge_is_the_time_in_which_the_budget_allows_as_much_again() -> None:
    assert Charge(2_000_000, 60).cost_us == 2_000_000 and not Charge(60_000_000, 60).is_too_large
    assert Charge(60_000_001, 60).is_too_large
