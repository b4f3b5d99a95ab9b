"""Rendered scenes: seeded, of the caption's colors, with shadows that are soft and patterns that fade."""

import numpy as np
import pytest
import torch

from giantleap.training.pocket.drawing.captions import SHAPES, Slots
from giantleap.training.pocket.drawing.scenes import PALETTE
from giantleap.training.pocket.drawing.still_life import draw_still_life, render_still_life
from giantleap.training.pocket.drawing.surfaces import GROUNDS, PATTERNS, Finish, Ground, NoiseFields, fade, sample


@pytest.fixture(scope="module")
def noise() -> NoiseFields:
    return NoiseFields.draw(np.random.default_rng(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_scene_follows_from_its_seed(shape: str) -> None:
    slots = Slots(shape, "red", "white", "blue", "centre", "large")
    first, again = (render_still_life(draw_still_life(np.random.default_rng(3), slots), 48) for _ in range(2))
    assert first.shape == (3, 48, 48)
    assert torch.equal(first, again)
    assert 0.0 <= float(first.min()) < float(first.max()) <= 1.0


def test_solids_stand_apart() -> None:
    counts = []
    for seed in range(40):
        solids = draw_still_life(np.random.default_rng(seed)).solids
        counts.append(len(solids))
        places = [(solid.x, solid.z) for solid in solids]
        gaps = [np.hypot(a[0] - b[0], a[1] - b[1]) for i, a in enumerate(places) for b in places[:i]]
        assert all(gap > 0.2 for gap in gaps)
    assert min(counts) == 1 and max(counts) >= 4


@pytest.mark.parametrize("pattern", GROUNDS)
def test_grounds_keep_their_color_and_lose_their_pattern_in_the_distance(pattern: str, noise: NoiseFields) -> None:
    ground = Ground(pattern, PALETTE["orange"], 1.0, 0.5, 0.3)
    x, z = torch.meshgrid(torch.linspace(-2, 2, 96), torch.linspace(2, 6, 96), indexing="ij")
    near, far = (ground.albedo(x, z, torch.full_like(x, size), noise) for size in (0.001, 2.0))
    assert near.shape == (3, 96, 96)
    red, green, blue = near.mean(dim=(1, 2))
    assert red > green > blue
    assert float(far.std(dim=(1, 2)).mean()) <= float(near.std(dim=(1, 2)).mean()) + 1e-6


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_shares(pattern: str, noise: NoiseFields) -> None:
    place = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    share = Finish(pattern, (1.0, 1.0, 1.0), 0.3, 0.0).mix(place, torch.zeros(16, 16), noise)
    assert share.shape == (16, 16) and 0.0 <= float(share.min()) <= float(share.max()) <= 1.0


def test_noise_repeats_and_patterns_finer_than_a_pixel_fade(noise: NoiseFields) -> None:
    x, y = torch.rand(2, 64, generator=torch.Generator().manual_seed(0))
    assert (sample(noise.soft, x, y) - sample(noise.soft, x + 2.0, y - 1.0)).abs().max() < 1e-2
    assert float(fade(torch.tensor(0.0), 0.1)) == 1.0
    assert float(fade(torch.tensor(0.2), 0.1)) < 1e-4


def test_shadows_darken_the_floor_softly() -> None:
    slots = Slots("sphere", "red", "white", "blue", "centre", "large")
    scene = draw_still_life(np.random.default_rng(3), slots)
    picture = render_still_life(scene, 96).mean(dim=0)
    floor = picture[60:, :]
    assert float(floor.max() - floor.min()) > 0.2
