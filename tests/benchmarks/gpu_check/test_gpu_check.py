"""Without a GPU the check refuses; with one it measures."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.gpu_check.run import app, cases_of


def test_it_refuses_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["decode", "--out", str(tmp_path / "out.json")])
    assert result.exit_code == 2
    assert "needs a CUDA device" in result.output
    assert not (tmp_path / "out.json").exists()


def test_every_method_and_strip_size_is_a_row() -> None:
    rows = cases_of("flux1", 2048, "bfloat16", [4, 64])
    assert [(row.method, row.strip_mib) for row in rows] == [
        ("plain", None), ("exact", None), ("tiled", None), ("tiny", None), ("exact", 4), ("exact", 64),
    ]  # fmt: skip


@pytest.mark.gpu
def test_it_measures_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["decode", "--px", "512", "--family", "sdxl", "--dtype", "float32", "--strip-mib", "4", "--out", str(out)]
    assert CliRunner().invoke(app, options).exit_code == 0
    rows = json.loads(out.read_text())["rows"]
    assert all(row["error"] is None for row in rows)
    assert all(row["max_difference"] <= 1e-4 for row in rows if row["method"] == "exact")
