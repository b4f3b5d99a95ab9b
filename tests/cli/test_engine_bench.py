"""The table of engines has a row for each that runs here, and a reason for each that does not."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from giantleap.cli.bench.engines import EngineRow, Timing, interleave, to_table
from giantleap.cli.main import app


def test_every_engine_is_timed_or_says_why_not(
    tiny_bundle_dir: Path, tiny_onnx_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIANTLEAP_ENGINE_DIR", str(tiny_onnx_dir))
    monkeypatch.setenv("GIANTLEAP_LOG_LEVEL", "error")
    out = tmp_path / "rows.jsonl"
    words = ["bench", "engines", "--bundle", str(tiny_bundle_dir), "--device", "cpu", "--scale", "2"]
    ended = CliRunner().invoke(app, [*words, "--warmups", "1", "--runs", "2", "--json", str(out)])
    assert ended.exit_code == 0, ended.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    timed = {(row["engine"], row["dtype"]): row for row in rows if row["reason"] is None}
    assert set(timed) == {("torch", "float32"), ("torch", "bfloat16"), ("onnx", "artifact")}
    assert timed["torch", "float32"]["ratio"] == 1 and timed["torch", "float32"]["max_error"] == 0
    assert timed["onnx", "artifact"]["max_error"] < 1e-4 and timed["onnx", "artifact"]["psnr_db"] > 60
    assert timed["torch", "bfloat16"]["max_error"] > 0 and timed["torch", "bfloat16"]["latent"] == "8x8"
    reasons = {row["engine"]: row["reason"] for row in rows if row["reason"] is not None}
    assert set(reasons) == {"torch-compile", "tensorrt", "aoti"}
    assert "GPU" in reasons["tensorrt"] and "of engine onnx; expected aoti" in reasons["aoti"]
    assert all(reason in ended.output.replace("\n", " ") for reason in reasons.values())


def test_calls_take_turns_and_warmups_do_not_count() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = interleave(calls, 1, 2, torch.device("cpu"))
    assert order == list("ababab")
    assert [len(timings[name].wall_s) for name in "ab"] == [2, 2]


def test_the_fastest_of_a_scale_comes_first() -> None:
    slow, fast = (EngineRow("torch", name, 2, "8x8", ms, ms, 1.0, 0.0) for name, ms in (("slow", 9.0), ("fast", 3.0)))
    lines = to_table([EngineRow("aoti", "artifact", reason="not here"), slow, fast]).splitlines()
    assert [line.split()[1] for line in lines] == ["type", "fast", "slow", "artifact"]


def test_the_95th_percentile_of_twenty_calls_is_not_their_longest() -> None:
    assert Timing(tuple(float(n) for n in range(20, 0, -1))).p95_s == 19.0, (
        "nearest rank, as giantleap.service.worker.timing has it"
    )
