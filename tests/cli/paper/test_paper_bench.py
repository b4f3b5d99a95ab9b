"""`giantleap bench paper` on random weights: what it fills, how it goes on, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from giantleap.cli.demo import PROMPT
from giantleap.cli.paper.measure import measure_table
from giantleap.cli.paper.plan import Cell, PaperBenchError, TablePlan, plan_cells, read_captions
from giantleap.cli.paper.report import PAPER_S, to_markdown
from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.bundle.descriptor import METHODS, Method
from giantleap.models.generation.items import GenerationItem
from giantleap.models.generation.refinement import Refinement
from giantleap.models.route import Route
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def bundle(tiny_bundle_dir: Path) -> Bundle:
    return read_bundle(tiny_bundle_dir)


@pytest.fixture(scope="module")
def route(bundle: Bundle) -> Route:
    return Route.open(bundle, torch.device("cpu"), torch.float32)


def plan_of(*cells: Cell, steps: int = 2, **options: Any) -> TablePlan:
    return TablePlan(cells, ("a red sphere", "a green cone"), steps, seed=1, warmups=1, runs=2, **options)


def test_every_method_has_its_cells_and_the_base_size_is_measured_once(bundle: Bundle) -> None:
    cells = plan_cells(bundle, (), (1, 2, 4))
    assert [cell.method for cell in cells if cell.scale == 2] == list(METHODS)
    assert [cell.method for cell in cells if cell.scale == 1] == ["direct"]
    assert plan_cells(bundle, ("lua",), (2,)) == [Cell("lua", 2)]
    refined = plan_cells(bundle, ("lua", "direct"), (2, 1), refines=True)
    assert [cell.name for cell in refined] == [
        "direct_x1", "lua_x2", "lua_x2_refined", "direct_x2", "direct_x2_refined"
    ]  # fmt: skip


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


@pytest.fixture
def drawn(route: Route, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Method and scale of each image that is generated."""
    calls: list[tuple[str, float]] = []
    generate = route.generate

    def record(items: Sequence[GenerationItem], method: Method, scale: float) -> list[Tensor | None]:
        calls.append((method, scale))
        return generate(items, method, scale)

    monkeypatch.setattr(route, "generate", record)
    return calls


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    cells = json.loads((out / "paper.json").read_text())["cells"]
    return {Cell(each["method"], each["scale"], each["is_refined"]).name: each for each in cells}


def test_a_run_that_ended_early_goes_on_where_it_was(
    route: Route, bundle: Bundle, tmp_path: Path, drawn: list[tuple[str, float]]
) -> None:
    cells = (Cell("lua", 2), Cell("hidiffusion", 2))
    measure_table(route, bundle, plan_of(cells[0]), tmp_path)
    first = (tmp_path / "lua_x2.json").read_bytes()
    drawn.clear()
    table = measure_table(route, bundle, plan_of(*cells), tmp_path)
    assert drawn == [("hidiffusion", 2)] * 3, "one warm-up and two runs"
    assert (tmp_path / "lua_x2.json").read_bytes() == first
    assert "| x2 | lua | 128x128 |" in table and "| x2 | hidiffusion | 128x128 |" in table
    assert (tmp_path / "paper.md").read_text() == table
    records = read_records(tmp_path)
    assert list(records) == ["lua_x2", "hidiffusion_x2"]
    assert set(records["hidiffusion_x2"]["median_s"]) == {"generate", "decode", "total"}
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 256, 256 + 20)
    with pytest.raises(PaperBenchError, match="under other conditions"):
        measure_table(route, bundle, plan_of(*cells, steps=3), tmp_path)


def test_a_run_that_was_killed_goes_on_without_its_finished_cells(
    route: Route, bundle: Bundle, tmp_path: Path, drawn: list[tuple[str, float]]
) -> None:
    options = ["--scale", "2", "--method", "bicubic", "--method", "demofusion", "--steps", "2", "--device", "cpu"]
    places = ["--bundle", str(bundle.directory), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "giantleap", "bench", "paper", *places, *options, "--warmups", "0", "--runs", "30"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        done = tmp_path / "bicubic_x2.json"
        wait_until(lambda: done.is_file() or process.poll() is not None, "the first cell", within_s=300)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "it was at work on the second cell"
    assert not (tmp_path / "demofusion_x2.json").exists()
    before = (tmp_path / "bicubic_x2.json").read_bytes()
    cells = plan_cells(bundle, ("bicubic", "demofusion"), (2,))
    plan = TablePlan(cells, (PROMPT,), 2, seed=42, warmups=0, runs=30)
    with pytest.raises(PaperBenchError, match="under other conditions"):
        measure_table(route, bundle, replace(plan, seed=1), tmp_path)
    measure_table(route, bundle, plan, tmp_path)
    assert drawn == [("demofusion", 2)] * 30 and (tmp_path / "bicubic_x2.json").read_bytes() == before


def test_weights_that_changed_are_other_conditions(route: Route, bundle: Bundle, tmp_path: Path) -> None:
    measure_table(route, bundle, plan_of(Cell("bicubic", 2)), tmp_path)
    files = {**bundle.descriptor.files, "lua.safetensors": "0" * 64}
    changed = replace(bundle, descriptor=bundle.descriptor.model_copy(update={"files": files}))
    with pytest.raises(PaperBenchError, match="under other conditions"):
        measure_table(route, changed, plan_of(Cell("bicubic", 2)), tmp_path)


def test_a_refined_cell_shares_the_generation_of_its_twin(
    route: Route, bundle: Bundle, tmp_path: Path, drawn: list[tuple[str, float]]
) -> None:
    cells = plan_cells(bundle, ("lua", "swinir", "demofusion"), (2,), refines=True)
    page = measure_table(route, bundle, plan_of(*cells, refine=Refinement(0.3, 2)), tmp_path)
    assert len(drawn) == 3 * 3
    records = read_records(tmp_path)
    stages = {name: set(record["median_s"]) for name, record in records.items()}
    assert stages["lua_x2_refined"] == stages["lua_x2"] | {"refine"} == {
        "generate", "upscale", "refine", "decode", "total"
    }  # fmt: skip
    assert stages["swinir_x2_refined"] == stages["swinir_x2"] | {"vae_encode", "refine"}
    assert records["lua_x2"]["median_s"]["generate"] == records["lua_x2_refined"]["median_s"]["generate"]
    assert (tmp_path / "lua_x2.png").read_bytes() != (tmp_path / "lua_x2_refined.png").read_bytes()
    assert "| x2 | demofusion + refine | 128x128 |" in page and "refine pass 0.3:2 (strength:steps)" in page
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 256, 2 * (256 + 20)), "one row plain and one refined"
    drawn.clear()
    (tmp_path / "lua_x2_refined.json").unlink()
    before = (tmp_path / "lua_x2.json").read_bytes()
    measure_table(route, bundle, plan_of(*cells, refine=Refinement(0.3, 2)), tmp_path)
    assert drawn == [("lua", 2)] * 3 and (tmp_path / "lua_x2.json").read_bytes() == before


def test_images_are_compared_with_the_base_image_of_their_seed(route: Route, bundle: Bundle, tmp_path: Path) -> None:
    cells = plan_cells(bundle, ("direct", "lua", "bicubic"), (1, 2))
    page = measure_table(route, bundle, plan_of(*cells), tmp_path)
    records = read_records(tmp_path)
    assert "this is the base image" in records["direct_x1"]["scores"]["base_psnr_db"]
    near, far = records["bicubic_x2"]["scores"], records["direct_x2"]["scores"]
    assert near["base_psnr_db"] > far["base_psnr_db"] and near["base_flip"] < far["base_flip"]
    assert "sides of 176 px" in near["base_ms_ssim"], "of a base of 64 px"
    assert "no weights were given (--inception)" in near["fid"] and "no weights" in near["clip_score"]
    assert "| x2 | bicubic | not available | not available |" in page
    assert page.count("no weights were given (--inception)") == 1
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 256, 256 + 20), "the base image first"


def test_without_base_images_nothing_is_compared_with_them(route: Route, bundle: Bundle, tmp_path: Path) -> None:
    page = measure_table(route, bundle, plan_of(Cell("lua", 2)), tmp_path)
    assert "- PSNR, dB, MS-SSIM, FLIP, JOD: not available: base images are those of `direct`" in page


def record_of(method: str, total_s: float, **fields: Any) -> dict[str, Any]:
    scores = dict.fromkeys(("patch_fid", "kid", "patch_kid", "clip_score", "base_ms_ssim", "base_jod"), "not available")
    return {
        "method": method, "scale": 2, "is_refined": False, "image_px": "256x256", "peak_bytes": 5e6,
        "peak_source": "cuda_allocated", "median_s": {"generate": 0.5, "total": total_s},
        "scores": scores | {"fid": 12.345, "base_psnr_db": 30.0, "base_flip": 0.1},
        "conditions": {"bundle": "tiny", "steps": 4, "guidance_scale": 3.0, "warmups": 1, "runs": 2, "refine": "",
                       "device": "cpu"},
    } | fields  # fmt: skip


def test_the_page_has_the_papers_figures_beside_ours() -> None:
    cells = [record_of("demofusion", 6.0), record_of("lua", 1.5), record_of("lua", 3.0, is_refined=True)]
    lines = to_markdown(cells, {"torch": "2"}).splitlines()
    assert "| x2 | lua | 256x256 | 0.500 |  |  |  | 1.500 | 1.00 | 3.52 | 1.00 | 5 cuda_allocated |" in lines
    assert "| x2 | lua + refine | 256x256 | 0.500 |  |  |  | 3.000 | 2.00 |  |  | 5 cuda_allocated |" in lines
    assert "| x2 | demofusion | 256x256 | 0.500 |  |  |  | 6.000 | 4.00 | 28.99 | 8.24 | 5 cuda_allocated |" in lines
    ours = "| x2 | demofusion | 12.35 (184.79) | not available (177.67) | not available (0.003) |"
    assert any(line.startswith(ours) and "| 30.00 | not available | 0.1000 |" in line for line in lines)
    assert any(line.startswith("| x2 | lua + refine | 12.35 | not available |") for line in lines)


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
