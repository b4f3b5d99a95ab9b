"""Colors are read from shaded pixels, and only where the object must be."""

import numpy as np
import pytest
import torch

from benchmarks.quality.colors import SHADES, object_core, read_color
from giantleap.training.pocket.drawing.captions import COLORS, draw_slots
from giantleap.training.pocket.drawing.scenes import PALETTE, draw_scene, render


@pytest.mark.parametrize("color", COLORS)
def test_a_shaded_palette_color_is_read_as_itself(color: str) -> None:
    pixels = torch.tensor([PALETTE[color]]) * torch.linspace(0.55, 1.0, 20).unsqueeze(1)
    assert read_color(pixels, SHADES) == color


def test_core_of_an_object_lies_inside_every_jittered_mask() -> None:
    rng = np.random.default_rng(3)
    for index, slots in enumerate(draw_slots(rng) for _ in range(8)):
        _, mask = render([draw_scene(np.random.default_rng([5, index]), slots)], 128)
        core = object_core(slots, 128)
        assert core.sum() >= 16
        assert (mask[0, 0][core] > 0.5).float().mean() > 0.9
