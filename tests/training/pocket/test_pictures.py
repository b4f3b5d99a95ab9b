"""Scenes of the adapter's pictures: each gives a whole and its parts, in files that sort before the held-out ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from giantleap.training.losses import shrink
from giantleap.training.pocket import pictures
from giantleap.training.pocket.pictures import SceneKind, write_scenes


@pytest.mark.parametrize("kind", ["calm", "drawn"])
def test_scene_gives_its_half_and_parts_of_it(kind: SceneKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "LARGE_PX", 64)
    monkeypatch.setattr(pictures, "CROP_PX", 32)
    write_scenes(tmp_path, kind, 1, seed=0)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{kind}_00000_{part}.png" for part in ("0", "1", "2", "whole")]
    assert names[-1] < "held_out_00.png"
    made = {name: np.asarray(Image.open(tmp_path / name)) for name in names}
    assert all(picture.shape == (32, 32, 3) for picture in made.values())
    part = torch.from_numpy(made[names[0]].copy()).permute(2, 0, 1)[None].float()
    small = shrink(part, 2)[0].permute(1, 2, 0).round().numpy()
    whole = made[names[3]].astype(np.float32)
    places = [np.abs(whole[y : y + 16, x : x + 16] - small)[2:-2, 2:-2].mean() for y in range(17) for x in range(17)]
    assert min(places) < 0.25 * np.median(places), "a part is a place of the whole, twice as large"


def test_scenes_that_are_there_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "calm_00000_whole.png").write_bytes(b"mine")
    write_scenes(tmp_path, "calm", 1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["calm_00000_whole.png"]
