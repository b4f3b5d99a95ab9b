"""Scenes show what their slots say, and the same seed shows the same scene."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from giantleap.training.pocket.drawing.captions import (
    COLORS,
    SHAPES,
    Slots,
    draw_slots,
    mirror,
    to_caption,
    vary_caption,
)
from giantleap.training.pocket.drawing.scenes import PALETTE, draw_scene, plain_scene, render

SLOTS = Slots("sphere", "red", "green", "blue", "left", "large")


def test_palette_holds_every_color_word() -> None:
    assert tuple(PALETTE) == COLORS


def test_scene_depends_on_its_seed_alone() -> None:
    first = draw_scene(np.random.default_rng([3, 5]))
    assert draw_scene(np.random.default_rng([3, 5])) == first
    assert draw_scene(np.random.default_rng([3, 6])) != first


def test_object_never_has_the_color_of_its_background() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_slots(rng) for _ in range(300)]
    assert all(slots.color not in (slots.floor, slots.sky) for slots in drawn)
    assert {slots.shape for slots in drawn} == set(SHAPES)


@pytest.mark.parametrize("shape", SHAPES)
def test_floor_sky_and_object_have_their_colors(shape: str) -> None:
    image, mask = render([plain_scene(replace(SLOTS, shape=shape))], 64)
    assert image.shape == (1, 3, 64, 64) and mask.shape == (1, 1, 64, 64)
    inside = image[0][:, mask[0, 0] > 0.99].mean(1)
    assert inside.argmax() == 0
    assert image[0, :, -3:].mean((1, 2)).argmax() == 1
    assert image[0, :, :3].mean((1, 2)).argmax() == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_has_the_requested_position_and_size(shape: str) -> None:
    centers, areas = [], []
    for position, size in (("left", "small"), ("centre", "medium"), ("right", "large")):
        _, mask = render([plain_scene(replace(SLOTS, shape=shape, position=position, size=size))], 64)
        centers.append(float((mask[0, 0].sum(0) * torch.arange(64)).sum() / mask.sum() / 64))
        areas.append(float(mask.mean()))
    assert np.allclose(centers, (0.26, 0.5, 0.74), atol=0.03)
    assert 0.02 < areas[0] < areas[1] < areas[2] < 0.25


def test_mixed_shapes_render_as_they_do_alone() -> None:
    scenes = [draw_scene(np.random.default_rng(i), replace(SLOTS, shape=shape)) for i, shape in enumerate(SHAPES)]
    together, masks = render(scenes, 32)
    for index, scene in enumerate(scenes):
        alone, mask = render([scene], 32)
        assert torch.allclose(together[index], alone[0], atol=1e-5)
        assert torch.equal(masks[index], mask[0])


def test_object_throws_a_shadow_on_the_floor() -> None:
    image, _ = render([plain_scene(replace(SLOTS, floor="white"))], 64)
    floor = image[0, :, 44:].mean(0)
    assert floor.min() < 0.7 * floor.median()


def test_mirrored_slots_describe_the_mirrored_picture() -> None:
    scene = plain_scene(replace(SLOTS, shape="cone"))
    other = plain_scene(mirror(scene.slots))
    _, mask = render([scene], 64)
    _, mirrored = render([other], 64)
    assert (mask.flip(-1) - mirrored).abs().mean() < 0.01
    assert mirror(mirror(SLOTS)) == SLOTS


def test_plain_caption_says_every_slot_once() -> None:
    assert to_caption(SLOTS) == "a large red sphere on a green floor under a blue sky, on the left"
    assert to_caption(replace(SLOTS, color="orange", size=None, position=None)).startswith("an orange sphere on a")


def test_varied_captions_never_contradict_their_slots() -> None:
    rng = np.random.default_rng(1)
    captions = [vary_caption(SLOTS, rng) for _ in range(400)]
    wrong = (set(COLORS) - {"red", "green", "blue"}) | {"right", "centre", "small", "cube", "cone", "cylinder"}
    assert not any(wrong & set(caption.replace(",", "").split()) for caption in captions)
    assert len(set(captions)) > 100
    assert any("green" not in caption for caption in captions)


def test_drop_share_is_the_share_of_captions_that_leave_slots_out() -> None:
    def without_floor(share: float) -> int:
        rng = np.random.default_rng(1)
        return sum("green" not in vary_caption(SLOTS, rng, share) for _ in range(400))

    assert without_floor(0.0) == 0 < without_floor(0.35) < without_floor(0.7)
