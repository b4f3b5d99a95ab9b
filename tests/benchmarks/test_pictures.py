"""Pictures of the training benchmarks: each follows from its number, and none is drawn twice."""

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.pictures import write_pictures
from giantleap.training.pocket.drawing.leaves import draw_leaves


def test_pictures_are_seeded_and_not_drawn_twice(tmp_path: Path) -> None:
    leaves = np.stack([draw_leaves(np.random.default_rng((7, i)), 96) for i in range(2)])
    write_pictures(tmp_path, leaves, range(6), 64)
    paths = sorted(tmp_path.iterdir())
    before = [np.asarray(Image.open(path)) for path in paths]
    assert len(before) == 6 and before[0].shape == (64, 64, 3) and not np.array_equal(before[1], before[2])
    paths[1].unlink()
    written_ns = paths[0].stat().st_mtime_ns
    write_pictures(tmp_path, leaves, range(6), 64)
    assert np.array_equal(np.asarray(Image.open(paths[1])), before[1])
    assert paths[0].stat().st_mtime_ns == written_ns
