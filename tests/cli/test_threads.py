"""Every command that loads a network takes the number of threads from one place, where the setting comes first."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from giantleap.cli.main import app
from giantleap.export.manifest import FILE
from giantleap.service.errors import BadConfiguration
from giantleap.service.settings import read_settings
from giantleap.service.worker.process import run_worker

THREADS = 3
# Each ends early, most with an error, once it has its threads.
COMMANDS = {
    "generate": "generate words -o {tmp}/out.png --steps 1 --scale 1",
    "upscale": "upscale {tmp}/latent.npy -o {tmp}/out.safetensors",
    "bench protocol": "bench protocol --runs 1 --warmups 0 --steps 1 --scale 1",
    "bench engines": "bench engines --runs 1 --warmups 0 --scale 2",
    "bundle check": "bundle check {bundle}",
    "export": "export --engine aoti --part decoder",
    "export check": "export check {tmp}/exported",
    "train prepare": "train prepare {tmp}/empty --bundle {bundle} --out {tmp}/out",
    "train run": "train run --config {tmp}/run.toml --out {tmp}/out",
    "train transfer": "train transfer --from {bundle} --to-bundle {bundle} --pairs {tmp}/empty --out {tmp}/out",
    "train evaluate": "train evaluate --bundle {bundle} --out {tmp}/out --images {tmp}/empty",
    "train statistics": "train statistics --lua {tmp}/lua.safetensors --pairs {tmp}/empty --out {tmp}/new.safetensors",
}


@pytest.fixture(autouse=True)
def three_threads(tiny_bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setenv("GIANTLEAP_TORCH_THREADS", str(THREADS))
    monkeypatch.setenv("GIANTLEAP_BUNDLE", str(tiny_bundle_dir))
    monkeypatch.setenv("GIANTLEAP_DEVICE", "cpu")
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("line", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_command_uses_the_threads_of_the_setting(line: str, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "latent.npy", np.zeros((16, 4, 4), np.float32))
    (tmp_path / "empty").mkdir()
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / FILE).write_text("{}")
    (tmp_path / "lua.safetensors").touch()
    run = f'bundle = "{tiny_bundle_dir}"\npairs = "empty"\n[lua]\nstart = "lua.safetensors"\n'
    (tmp_path / "run.toml").write_text(run)
    CliRunner().invoke(app, line.format(tmp=tmp_path, bundle=tiny_bundle_dir).split())
    assert torch.get_num_threads() == THREADS


def test_a_worker_uses_the_threads_of_the_setting(tmp_path: Path) -> None:
    settings = read_settings(redis_url="redis://127.0.0.1:1/0", bundle=(tmp_path,))
    with pytest.raises(BadConfiguration):
        run_worker(settings, threading.Event())
    assert torch.get_num_threads() == THREADS
