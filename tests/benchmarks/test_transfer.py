"""The comparison of a transferred adapter with one from scratch: equal but for start and length, the worst judged."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.transfer import HELD_OUT, judge, plan, table, variants_of, write_pictures
from giantleap.training.pocket.vae import Pool


def test_variants_differ_in_start_and_length_alone() -> None:
    variants = {variant.name: variant for variant in variants_of(30)}
    assert {name: (each.start, each.steps) for name, each in variants.items()} == {
        "transfer_fit": ("fit", 30),
        "transfer_slice": ("slice", 30),
        "transfer_fresh": ("fresh", 30),
        "scratch_short": (None, 30),
        "scratch": (None, 300),
    }
    folder = Path("somewhere")
    moved = plan(folder, folder, folder / "start.safetensors", 30, 1e-3, 4).model_dump()
    scratch = plan(folder, folder, None, 300, 1e-3, 4).model_dump()
    assert moved.pop("lua") != scratch.pop("lua")
    (moved_stage,), (scratch_stage,) = moved.pop("stages"), scratch.pop("stages")
    assert (moved_stage.pop("steps"), scratch_stage.pop("steps")) == (30, 300)
    assert moved_stage == scratch_stage and moved == scratch


def test_a_figure_says_how_far_the_transfer_is_ahead() -> None:
    names = ("held_out_x2_db", "held_out_x4_db", "photos_x2_db", "photos_x4_db")
    scratch = dict.fromkeys(names, 25.0)
    moved = scratch | {"held_out_x2_db": 25.5, "photos_x4_db": 24.6}
    figures = {"transfer_fit 0": scratch, "transfer_fit 30": moved, "scratch 300": scratch, "scratch_short 30": moved}
    assert judge(figures, 30) == pytest.approx(dict(zip(names, (0.5, 0.0, 0.0, -0.4), strict=True)))
    assert len(table(figures).splitlines()) == 5


def test_pictures_are_seeded_and_not_drawn_twice(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "pool", leaf_count=2, scene_count=2, held_out_count=2, leaf_px=64, scene_px=64)
    write_pictures(tmp_path / "pictures", pool, 1)
    paths = sorted((tmp_path / "pictures").iterdir())
    assert len(paths) == 1 + HELD_OUT
    before = [np.asarray(Image.open(path)) for path in paths]
    assert before[0].shape == (256, 256, 3) and not np.array_equal(before[1], before[2])
    paths[1].unlink()
    written_ns = paths[0].stat().st_mtime_ns
    write_pictures(tmp_path / "pictures", pool, 1)
    assert np.array_equal(np.asarray(Image.open(paths[1])), before[1])
    assert paths[0].stat().st_mtime_ns == written_ns
