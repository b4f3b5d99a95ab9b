"""The measure reads true renders rightly and notices every wrong slot."""

import numpy as np
import pytest
import torch

from benchmarks.quality.prompt_following import CHOICES, SLOTS, Judge, object_core, read_color, score, train_judge
from giantleap.training.pocket.captions import COLORS, Slots, draw_prompts
from giantleap.training.pocket.scenes import PALETTE, draw_scene, render


@pytest.fixture(scope="module")
def requested() -> list[Slots]:
    return [slots for _, slots in draw_prompts(24, seed=3)]


@pytest.fixture(scope="module")
def images(requested: list[Slots]) -> torch.Tensor:
    return render([draw_scene(np.random.default_rng([3, i]), slots) for i, slots in enumerate(requested)], 128)[0]


def test_colors_of_true_renders_are_read_without_error(images: torch.Tensor, requested: list[Slots]) -> None:
    shares = score(images, requested, Judge().eval())
    assert shares["floor"] == shares["sky"] == shares["color"] == 1.0


def test_colors_of_other_pictures_score_at_chance(images: torch.Tensor, requested: list[Slots]) -> None:
    shares = score(images.roll(1, 0), requested, Judge().eval())
    assert max(shares["floor"], shares["sky"], shares["color"]) < 0.5


def test_an_object_at_the_wrong_place_loses_its_color(requested: list[Slots]) -> None:
    moved = [
        Slots(s.shape, s.color, s.floor, s.sky, "right" if s.position == "left" else "left", s.size) for s in requested
    ]
    pictures, _ = render([draw_scene(np.random.default_rng([4, i]), slots) for i, slots in enumerate(moved)], 128)
    assert score(pictures, requested, Judge().eval())["color"] < 0.2


@pytest.mark.parametrize("color", COLORS)
def test_a_shaded_palette_color_is_read_as_itself(color: str) -> None:
    pixels = torch.tensor([PALETTE[color]]) * torch.linspace(0.55, 1.0, 20).unsqueeze(1)
    assert read_color(pixels, (0.5, 0.65, 0.8, 1.0)) == color


def test_core_of_an_object_lies_inside_every_jittered_mask(requested: list[Slots]) -> None:
    for index, slots in enumerate(requested[:8]):
        _, mask = render([draw_scene(np.random.default_rng([5, index]), slots)], 128)
        core = object_core(slots, 128)
        assert core.sum() >= 16
        assert (mask[0, 0][core] > 0.5).float().mean() > 0.9


@pytest.mark.slow
def test_judge_names_shape_position_and_size_of_unseen_renders(images: torch.Tensor, requested: list[Slots]) -> None:
    shares = score(images, requested, train_judge())
    assert min(shares["shape"], shares["position"], shares["size"]) >= 0.9


def test_every_slot_has_its_choices() -> None:
    assert set(CHOICES) == set(SLOTS)
