"""The times of the methods and the pictures of the README, on random weights."""

import json
from pathlib import Path

import torch

from benchmarks.methods import run as methods
from benchmarks.pocket_pictures import run as pocket_pictures
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.route import Route


def test_every_method_has_a_time(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "methods.json"
    methods.run(tiny_bundle_dir, out, threads=1, warmups=0, runs=1)
    record = json.loads(out.read_text())
    timed = [(result["method"], result["scale"]) for result in record["results"]]
    assert timed == [(method, scale) for method in ("lua", "direct", "bicubic", "swinir") for scale in (2, 4)]
    assert all(result["stages"]["total"]["median_s"] > 0 for result in record["results"])
    assert record["machine"]["versions"]["torch"]


def test_every_way_enlarges_the_same_picture(tiny_bundle_dir: Path) -> None:
    bundle = read_bundle(tiny_bundle_dir)
    route = Route.open(bundle, torch.device("cpu"), torch.float32)
    row = pocket_pictures.draw_prompt_row(route, bundle, "a red sphere", 0, 2)
    side = bundle.defaults.base_height_px
    assert tuple(row) == pocket_pictures.COLUMNS
    assert [image.height for image in row.values()] == [side, 2 * side, 2 * side, 2 * side]
    assert all(len(image.getcolors(1 << 24) or []) > 100 for image in row.values()), "the pictures are not blank"
