"""What commands and the API process import: neither torch nor the worker before they need them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = ("torch", "diffusers", "transformers", "onnxruntime")

RUN = """
import json, sys
from giantleap.cli.main import app
try:
    app(sys.argv[1:])
except SystemExit as ended:
    assert not ended.code, ended
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""

MISTAKE = """
import json, sys
from giantleap.cli.main import app
try:
    app(sys.argv[1:])
except SystemExit as ended:
    assert ended.code == 2, ended
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""

BUILD_API = """
import json, sys
import giantleap.models.allocator, giantleap.service.api.server, uvicorn
from giantleap.service.api.app import create_app
from giantleap.service.settings import read_settings
create_app(read_settings(redis_url="redis://127.0.0.1:1/0"))
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def imported_by(code: str, *arguments: str) -> set[str]:
    """The modules that a fresh process has imported after the code."""
    completed = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=dict(os.environ), capture_output=True, text=True, timeout=200
    )
    assert completed.returncode == 0, completed.stderr
    return set(json.loads(completed.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("models",), ("settings",), ("bundle", "list"), ("bundle", "show", "pocket"), ("generate", "--help"),
     ("bench", "--help"), ("train", "--help"), ("export", "--help"), ("keys", "--help")],
    ids=" ".join,
)  # fmt: skip
def test_a_command_that_runs_no_network_imports_neither_torch_nor_the_worker(arguments: tuple[str, ...]) -> None:
    modules = imported_by(RUN, *arguments)
    assert not modules & {*SLOW, "giantleap.service.worker", "redis", "fastapi", "uvicorn", "PIL"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("prepare", "no/photographs", "--bundle", "pocket", "--out", "pairs"),
        ("prepare", ".", "--bundle", "pockt", "--out", "pairs"),
        ("prepare", ".", "--bundle", "pocket", "--out", "pairs", "--device", "cuda0"),
        ("run", "--config", "no/run.toml", "--out", "run"),
        ("run", "--config", "wrong.toml", "--out", "run"),
        ("run", "--config", "run.toml", "--out", "run"),
        ("transfer", "--from", "no.pth", "--to-bundle", "pocket", "--pairs", ".", "--out", "run"),
        ("statistics", "--lua", "no.pth", "--pairs", ".", "--out", "out.safetensors"),
        ("evaluate", "--bundle", "pocket", "--out", "report"),
        ("evaluate", "--bundle", "sdxl", "--images", ".", "--out", "report"),
    ],
    ids=" ".join,
)
def test_a_mistake_in_train_ends_it_before_torch_is_imported(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wrong.toml").write_text('bundle = "pocket"\npairs = "pairs"\nlua = {preset = "medium"}\nsede = 1\n')
    (tmp_path / "run.toml").write_text('bundle = "pocket"\npairs = "no/pairs"\nlua = {start = "pocket"}\n')
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    assert not imported_by(MISTAKE, "train", *arguments) & set(SLOW)


def test_the_api_process_imports_neither_torch_nor_diffusers() -> None:
    modules = imported_by(BUILD_API)
    assert not modules & {*SLOW, "giantleap.service.worker"}
    assert "fastapi" in modules


def test_the_package_is_a_command() -> None:
    completed = subprocess.run([sys.executable, "-m", "giantleap", "--version"], capture_output=True, text=True)
    assert completed.returncode == 0 and completed.stdout.startswith("giantleap ")


def test_the_startup_benchmark_measures_this_checkout(tmp_path: Path) -> None:
    from benchmarks.startup import Checkout, measure_help, to_medians

    checkout = Checkout("now", Path(__file__).parents[2], "giantleap")
    assert measure_help(checkout, checkout.environment("redis://127.0.0.1:1/0")) > 0
    assert to_medians([{"help_cpu_s": 3.0}, {"help_cpu_s": 1.0}, {"help_cpu_s": 2.0}]) == {"help_cpu_s": 2.0}
