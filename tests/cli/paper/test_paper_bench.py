"""`giantleap bench paper` on random weights: what it fills, how it goes on, and what it refuses."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from giantleap.cli.paper.measure import (
    Cell,
    PaperBenchError,
    TablePlan,
    measure_table,
    plan_cells,
    read_captions,
)
from giantleap.cli.paper.report import PAPER_S, to_markdown
from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.bundle.descriptor import METHODS, Method
from giantleap.models.generation.items import GenerationItem
from giantleap.models.route import Route


@pytest.fixture(scope="module")
def bundle(tiny_bundle_dir: Path) -> Bundle:
    return read_bundle(tiny_bundle_dir)


@pytest.fixture(scope="module")
def route(bundle: Bundle) -> Route:
    return Route.open(bundle, torch.device("cpu"), torch.float32)


def plan_of(*cells: Cell, **change: int) -> TablePlan:
    numbers = {"steps": 2, "seed": 1, "warmups": 1, "runs": 2} | change
    return TablePlan(cells, ("a red sphere", "a green cone"), **numbers)


def test_every_method_has_its_cells_and_the_base_size_is_measured_once(bundle: Bundle) -> None:
    cells = plan_cells(bundle, (), (1, 2, 4))
    assert [cell.method for cell in cells if cell.scale == 2] == list(METHODS)
    assert [cell.method for cell in cells if cell.scale == 1] == ["direct"]
    assert plan_cells(bundle, ("lua",), (2,)) == [Cell("lua", 2)]


def test_what_the_bundle_lacks_is_named(bundle: Bundle) -> None:
    with pytest.raises(PaperBenchError, match="scale 3: bundle tiny has 1, 2, 4"):
        plan_cells(bundle, (), (3,))
    with pytest.raises(PaperBenchError, match="method nearest: unknown; choose from lua, direct"):
        plan_cells(bundle, ("lua", "nearest"), (2,))
    sd3 = Bundle(Path("nowhere"), bundle.descriptor)
    with pytest.raises(PaperBenchError, match=r"method demofusion: .*; choose from lua"):
        plan_cells(sd3, ("demofusion",), (2,))


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', "[1]", '[""]', "["])
def test_captions_are_a_list_of_texts(tmp_path: Path, content: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(PaperBenchError, match=r"captions\.json: "):
        read_captions(path)
    path.write_text('["a red sphere", "a green cone"]')
    assert read_captions(path) == ("a red sphere", "a green cone")


def test_a_run_that_ended_early_goes_on_where_it_was(
    route: Route, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = (Cell("lua", 2), Cell("hidiffusion", 2))
    measure_table(route, bundle, plan_of(cells[0]), tmp_path)
    first = (tmp_path / "lua_x2.json").read_bytes()
    measured: list[tuple[str, float]] = []
    generate = route.generate

    def record(items: Sequence[GenerationItem], method: Method, scale: float) -> list[Tensor | None]:
        measured.append((method, scale))
        return generate(items, method, scale)

    monkeypatch.setattr(route, "generate", record)
    table = measure_table(route, bundle, plan_of(*cells), tmp_path)
    assert measured == [("hidiffusion", 2)] * 3, "one warm-up and two runs"
    assert (tmp_path / "lua_x2.json").read_bytes() == first
    assert "| x2 | lua | 128x128 |" in table and "| x2 | hidiffusion | 128x128 |" in table
    assert (tmp_path / "paper.md").read_text() == table
    record_ = json.loads((tmp_path / "paper.json").read_text())
    assert [cell["method"] for cell in record_["cells"]] == ["lua", "hidiffusion"]
    assert set(record_["cells"][1]["median_s"]) == {"generate", "decode", "total"}
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 256, 256 + 20)
    with pytest.raises(PaperBenchError, match="under other conditions"):
        measure_table(route, bundle, plan_of(*cells, steps=3), tmp_path)


def test_the_table_has_the_papers_ratios_beside_ours() -> None:
    def cell(method: str, total_s: float) -> dict[str, object]:
        shared = {"scale": 2, "image_px": "256x256", "peak_bytes": 5e6, "peak_source": "cuda_allocated"}
        return {"method": method, "median_s": {"generate": 0.5, "total": total_s}, **shared}

    conditions = {"bundle": "tiny", "steps": 4, "guidance_scale": 3.0, "warmups": 1, "runs": 2}
    lines = to_markdown([cell("demofusion", 6.0), cell("lua", 1.5)], conditions, {"torch": "2"}).splitlines()
    assert "| x2 | lua | 256x256 | 0.500 |  |  | 1.500 | 1.00 | 3.52 | 1.00 | 5 cuda_allocated |" in lines
    assert "| x2 | demofusion | 256x256 | 0.500 |  |  | 6.000 | 4.00 | 28.99 | 8.24 | 5 cuda_allocated |" in lines


@pytest.mark.parametrize(
    ("scale", "ratios"),
    [
        (2, {"hidiffusion": 1.41, "demofusion": 8.24, "lsrna": 5.90, "direct": 2.05, "swinir": 1.79}),
        (4, {"hidiffusion": 17.8, "demofusion": 32.9, "lsrna": 13.3, "direct": 21.6, "swinir": 1.06}),
    ],
)
def test_the_papers_figures_give_the_papers_ratios(scale: int, ratios: dict[str, float]) -> None:
    figures = PAPER_S[scale]
    found = {method: seconds / figures["lua"] for method, seconds in figures.items() if method != "lua"}
    assert found == pytest.approx(ratios, rel=0.005)
