"""The sheet and the times of the methods, on random weights."""

import json
from pathlib import Path

from PIL import Image

from benchmarks import methods
from giantleap.cli.paper.sheet import CELL_PX, HEAD_PX


def test_every_method_has_a_cell_and_a_time(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    out, sheet = tmp_path / "methods.json", tmp_path / "methods.png"
    methods.main(tiny_bundle_dir, out, sheet, threads=1, warmups=0, runs=1)
    with Image.open(sheet) as image:
        assert image.size == (5 * CELL_PX, 2 * (HEAD_PX + CELL_PX))
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100, "the cells are not blank"
    record = json.loads(out.read_text())
    timed = [(result["method"], result["scale"]) for result in record["results"]]
    assert timed == [(method, scale) for method in ("lua", "direct", "bicubic", "swinir") for scale in (2, 4)]
    assert all(result["stages"]["total"]["median_s"] > 0 for result in record["results"])
    assert record["machine"]["versions"]["torch"]
