"""Without a GPU the check refuses; with one it measures."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.gpu_check.cases import METHODS
from benchmarks.gpu_check.decode import cases_of
from benchmarks.gpu_check.run import app
from giantleap.models.device import compiler_fault


def test_it_refuses_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["decode", "--out", str(tmp_path / "out.json")])
    assert result.exit_code == 2
    assert "needs a CUDA device" in result.output
    assert not (tmp_path / "out.json").exists()


def test_every_method_and_strip_size_is_a_row() -> None:
    rows = cases_of("flux1", 2048, "bfloat16", [4, 64], METHODS)
    assert [(row.method, row.strip_mib) for row in rows] == [
        ("plain", None), ("exact", None), ("tiled", None), ("tiny", None),
        ("channels-last", None), ("compiled", None), ("exact", 4), ("exact", 64),
    ]  # fmt: skip


def test_a_cpu_checks_the_rows_and_claims_no_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = [
        "decode",
        "--device",
        "cpu",
        "--family",
        "pocket24",
        "--px",
        "64",
        "--dtype",
        "float32",
        "--out",
        str(out),
    ]
    methods = ("plain", "exact", "channels-last", "compiled")
    result = CliRunner().invoke(app, [*options, *(part for name in methods for part in ("--method", name))])
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert record["machine"]["card"] is None and "no figures of a GPU" in record["machine"]["note"]
    rows = {row["method"]: row for row in record["rows"]}
    assert tuple(rows) == methods
    for name in methods:
        if name == "compiled" and compiler_fault(torch.device("cpu")):
            assert "compiler" in rows[name]["error"]
            continue
        assert rows[name]["error"] is None and rows[name]["ratio"] > 0 and rows[name]["peak_bytes"] is None
        assert name == "plain" or rows[name]["max_difference"] <= 1e-4


def test_figures_of_a_cpu_never_go_where_those_of_a_gpu_are() -> None:
    result = CliRunner().invoke(app, ["decode", "--device", "cpu"])
    assert result.exit_code == 2 and "figures of a GPU only" in result.output


@pytest.mark.gpu
def test_it_measures_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["decode", "--px", "512", "--family", "sdxl", "--dtype", "float32", "--strip-mib", "4", "--out", str(out)]
    assert CliRunner().invoke(app, options).exit_code == 0
    rows = json.loads(out.read_text())["rows"]
    assert all(row["error"] is None for row in rows)
    assert all(row["max_difference"] <= 1e-4 for row in rows if row["method"] == "exact")
