"""The engine measurements of `benchmarks.gpu_check`, as far as they go without a GPU."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.engines.published_swinir import PublishedForward
from benchmarks.gpu_check.engines import (
    TARGETS,
    EngineCase,
    Variant,
    count_flops,
    line,
    measure_case,
    measure_matrix_rate,
    target_of,
)
from benchmarks.gpu_check.run import app
from giantleap.models.lua.network import Lua, preset
from giantleap.models.lua.spec import LuaSpec
from tests.random_lua import random_lua

CPU = torch.device("cpu")
TINY = LuaSpec(4, 12, (2,), 2, window=4, num_feat=8)
CASE = EngineCase("tiny", TINY, 8, 2, 3, torch.bfloat16)


def test_it_refuses_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["engines", "--out", str(tmp_path / "out.json")])
    assert result.exit_code == 2 and "needs a CUDA device" in result.output
    assert not (tmp_path / "out.json").exists()


def test_variants_are_timed_compared_and_excused(tmp_path: Path) -> None:
    variants: tuple[Variant, ...] = ("published float32", "published", "autocast", "prepared", "tensorrt")
    (tmp_path / "tiny_4_x2_bf16.onnx").write_bytes(b"")  # an export that is there already
    rows = {row.variant: row for row in measure_case(CASE, CPU, tmp_path, 1e12, variants, warmups=1, runs=2)}
    assert list(rows) == list(variants)
    assert "GPU" in str(rows["tensorrt"].error) and "GPU" in line(rows["tensorrt"])
    for variant in variants[:4]:
        row = rows[variant]
        assert row.error is None and row.median_ms is not None and row.std is not None and row.max_error is not None
        assert row.max_error < 0.1 * row.std if variant != "published float32" else row.max_error < 1e-5
        assert row.ratio is not None and row.share is not None and row.share > 0


def test_the_published_forward_is_that_of_the_network() -> None:
    net = random_lua(LuaSpec(4, 12, (2, 2), 2, window=4, num_feat=8, bicubic_skip=True))
    with torch.no_grad():
        latent = torch.randn(2, 4, 13, 10)
        for scale in (2, 4):
            expected = net(latent, scale)
            assert (PublishedForward(net)(latent, scale) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_flops_are_those_of_the_written_count() -> None:
    """102.1 GFLOP for x2 of a 64x64x4 latent; a quarter of the tokens here."""
    with torch.device("meta"):
        net = Lua(preset("medium", 4)).eval()
    published = PublishedForward(net)
    with torch.device("meta"), torch.no_grad():
        published.index = torch.zeros(64, 64, dtype=torch.long)
        flops = count_flops(lambda x: published(x, 2), torch.zeros(1, 4, 32, 32))
    assert flops == pytest.approx(102.1e9 / 4, rel=1e-3)


def test_targets_belong_to_the_requested_case() -> None:
    requested = EngineCase("medium", preset("medium", 4), 128, 2, 1, torch.bfloat16)
    assert target_of(requested, "compiled") == TARGETS[128] and target_of(requested, "onnx") is None
    assert target_of(CASE, "compiled") is None


def test_the_roof_is_a_rate() -> None:
    assert 1e6 < measure_matrix_rate(CPU, torch.float32, side=64) < 1e14


@pytest.mark.gpu
def test_it_measures_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["engines", "--preset", "medium", "--latent", "64", "--scale", "2", "--batch", "1", "--dtype", "bfloat16"]
    assert CliRunner().invoke(app, [*words, "--out", str(out)]).exit_code in (0, 1)
    assert out.exists()
