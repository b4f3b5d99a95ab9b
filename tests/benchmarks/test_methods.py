"""The sheet and the times of the methods, on random weights."""

import json
from pathlib import Path

from PIL import Image

from benchmarks import methods


def test_every_method_has_a_cell_and_a_time(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    out, sheet = tmp_path / "methods.json", tmp_path / "methods.png"
    methods.main(tiny_bundle_dir, out, sheet, threads=1, warmups=0, runs=1)
    with Image.open(sheet) as image:
        assert image.size == (5 * methods.CELL_PX, 2 * (methods.HEAD_PX + methods.CELL_PX))
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100, "the cells are not blank"
    record = json.loads(out.read_text())
    timed = [(result["method"], result["scale"]) for result in record["results"]]
    assert timed == [(method, scale) for method in ("lua", "direct", "bicubic", "swinir") for scale in (2, 4)]
    assert all(result["stages"]["total"]["median_s"] > 0 for result in record["results"])
    assert record["machine"]["versions"]["torch"]


def test_cells_of_a_row_show_the_same_part() -> None:
    base = Image.new("L", (128, 128))
    base.paste(255, (48, 48, 80, 80))
    for largest_px, width_px in ((256, 64), (512, 128)):  # 32 px of 128, of which the cell shows all or the inner half
        larger = base.resize((largest_px, largest_px), Image.Resampling.NEAREST)
        cells = [methods.to_cell(image, largest_px) for image in (base, larger)]
        assert cells[0].tobytes() == cells[1].tobytes() and cells[0].size == (methods.CELL_PX,) * 2
        assert cells[0].histogram()[255] == width_px**2
