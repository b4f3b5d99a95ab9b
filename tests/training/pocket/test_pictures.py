"""Scenes of the adapter's pictures: a whole and its parts in four orientations, before the held-out ones by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from giantleap.training.losses import shrink
from giantleap.training.pocket import pictures
from giantleap.training.pocket.pictures import SceneKind, orient, write_scenes


@pytest.mark.parametrize("kind", ["calm", "drawn"])
def test_scene_gives_its_half_and_parts_of_it(kind: SceneKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "LARGE_PX", 64)
    monkeypatch.setattr(pictures, "CROP_PX", 32)
    write_scenes(tmp_path, kind, 1, seed=0)
    names = sorted(path.name for path in tmp_path.iterdir())
    parts = ("0", "1", "2", "whole")
    assert names == [f"{kind}_00000_{part}_{number}.png" for part in parts for number in range(4)]
    assert names[-1] < "held_out_00.png"
    made = {name: np.asarray(Image.open(tmp_path / name)) for name in names}
    assert all(picture.shape == (32, 32, 3) for picture in made.values())
    for part in parts:
        shown = [made[f"{kind}_00000_{part}_{number}.png"] for number in range(4)]
        turned = [orient(shown[0], turn) for turn in range(8)]
        found = [next(turn for turn in range(8) if np.array_equal(turned[turn], picture)) for picture in shown]
        assert len(set(found)) == 4, "four orientations of one picture"
    wholes = [orient(made[f"{kind}_00000_whole_0.png"], turn) for turn in range(8)]
    detail = torch.from_numpy(made[f"{kind}_00000_0_0.png"].copy()).permute(2, 0, 1)[None].float()
    small = shrink(detail, 2)[0].permute(1, 2, 0).round().numpy()
    whole = min((whole.astype(np.float32) for whole in wholes), key=lambda whole: min(_differences(whole, small)))
    places = _differences(whole, small)
    assert min(places) < 0.25 * np.median(places), "a part is a place of the whole, twice as large"


def _differences(whole: NDArray[np.float32], small: NDArray[np.float32]) -> list[float]:
    """Mean difference of a small picture to each place of the whole, without its borders."""
    return [
        float(np.abs(whole[y : y + 16, x : x + 16] - small)[2:-2, 2:-2].mean()) for y in range(17) for x in range(17)
    ]


def test_orientations_are_the_eight_of_a_square() -> None:
    picture = np.arange(3 * 3 * 3, dtype=np.uint8).reshape(3, 3, 3)
    turned = [orient(picture, turn) for turn in range(8)]
    assert len({one.tobytes() for one in turned}) == 8
    assert np.array_equal(turned[0], picture)
    assert np.array_equal(turned[1][:, 0], picture[0, ::-1]), "a quarter turn to the left"
    assert np.array_equal(turned[4], picture[:, ::-1])


def test_scenes_that_are_there_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "calm_00000_whole_3.png").write_bytes(b"mine")
    write_scenes(tmp_path, "calm", 1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["calm_00000_whole_3.png"]
