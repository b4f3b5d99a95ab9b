"""Bulk work on a local Ray with two actors: killed in the middle and run again. `make ray-test` runs it."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.processes import run_process
from giantleap.batch.manifest import read_entries
from giantleap.batch.ray import RowActor
from giantleap.batch.rows import BatchOptions
from giantleap.batch.store import BatchError, Store
from tests.batch.conftest import Loaded, write_latents
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


def _contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.png")}


def test_an_actor_draws_a_batch_once_and_answers_each_row(tiny_bundle_dir: Path, latents: Path, tmp_path: Path) -> None:
    files = [path.read_bytes() for path in sorted(latents.iterdir())]
    batch = {"key": np.array(["a", "b", "c"], object), "latent": np.array([files[0], files[1], b"bad"], object)}
    entries = RowActor(str(tmp_path / "out"), bundle=str(tiny_bundle_dir), device="cpu")(batch)
    assert list(entries["key"]) == ["a", "b", "c"] and list(entries["output"]) == ["a.png", "b.png", None]
    assert entries["error"][2] is not None
    (tmp_path / "out" / "a.png").unlink()
    again = RowActor(str(tmp_path / "out"), bundle=str(tiny_bundle_dir), device="cpu")(batch)
    assert list(again["sha256"]) == list(entries["sha256"]) and not (tmp_path / "out" / "a.png").exists(), "not again"
    with pytest.raises(BatchError, match="another output"):
        RowActor(str(tmp_path / "out"), BatchOptions(seed=1), bundle=str(tiny_bundle_dir), device="cpu")
    with pytest.raises(BatchError, match="column key"):
        RowActor(str(tmp_path / "other"), bundle=str(tiny_bundle_dir), device="cpu")({"latent": batch["latent"]})


@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_the_example_draws_each_row_though_it_is_killed_in_between(
    loaded: Loaded, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    write_latents(tmp_path / "in", 200)
    single = loaded.run(tmp_path / "in", tmp_path / "single", BatchOptions(scale=2))
    command = [sys.executable, "examples/ray_batch.py", str(tmp_path / "in"), str(tmp_path / "out")]
    command += ["--bundle", str(tiny_bundle_dir), "--batch-size", "2"]
    with run_process(command, directory=ROOT, output=subprocess.DEVNULL, stop_timeout_s=0.1):
        wait_until(lambda: len(_contents(tmp_path / "out")) > 5, "outputs of both actors", within_s=900)
    before = read_entries(Store(str(tmp_path / "out")))
    assert 0 < len(before) < 200, "it was killed in between"
    with run_process(command, directory=ROOT, output=subprocess.DEVNULL) as process:
        assert process.wait(1800) == 0
    manifests = (tmp_path / "out" / "_batch" / "manifest").iterdir()
    lines = [line for path in manifests for line in path.read_text().splitlines()]
    assert len(lines) == 200, "nothing that an entry names is drawn again"
    after = read_entries(Store(str(tmp_path / "out")))
    assert Counter(entry.sha256 for entry in after.values()) == Counter(entry.sha256 for entry in single.values())
    assert _contents(tmp_path / "out") == _contents(tmp_path / "single"), "byte for byte those of one process"
