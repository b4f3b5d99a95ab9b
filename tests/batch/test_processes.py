"""The command `giantleap batch`: its exit codes, processes side by side, and processes that are killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from giantleap.batch.manifest import FOLDER
from giantleap.batch.rows import BatchOptions
from giantleap.cli.main import app
from tests.batch.conftest import Loaded, write_latents
from tests.waiting import wait_until

SMALL = ("--batch-size", "2", "--shard-rows", "4", "--lease", "1")
OPTIONS = BatchOptions(batch_size=2, shard_rows=4)


@pytest.fixture(autouse=True)
def settings(tiny_bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle of random weights, on the CPU."""
    monkeypatch.setenv("GIANTLEAP_BUNDLE", str(tiny_bundle_dir))
    monkeypatch.setenv("GIANTLEAP_DEVICE", "cpu")
    monkeypatch.setenv("GIANTLEAP_LOG_LEVEL", "error")


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["batch", *map(str, arguments)])


def _start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "giantleap", "batch", str(source), str(output), *SMALL]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def _entries(output: Path) -> list[dict[str, object]]:
    lines = [line for path in (output / FOLDER).glob("*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def _contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.png")}


def _has_outputs(output: Path, count: int) -> bool:
    return len(list(output.glob("*.png"))) >= count


def test_the_command_ends_with_a_code_that_tells_of_failed_rows(latents: Path, tmp_path: Path) -> None:
    ended = _run(latents, tmp_path / "out", "--scale", "2", "--format", "jpeg")
    assert ended.exit_code == 0, ended.output
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 6
    (latents / "bad.npy").write_bytes(b"damaged")
    ended = _run(latents, tmp_path / "out", "--scale", "2", "--format", "jpeg")
    assert ended.exit_code == 4 and "1 of them here" in ended.output, ended.output


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--size", "big"), "give WIDTHxHEIGHT"),
        (("--scale", "3"), "scale: is 3"),
        (("--method", "swinir", "--out", "latents"), "choose another method"),
    ],
)
def test_what_no_row_could_use_ends_the_command_before_the_work(
    latents: Path, tmp_path: Path, options: tuple[str, ...], reason: str
) -> None:
    ended = _run(latents, tmp_path / "out", *options)
    assert ended.exit_code == 2 and reason in ended.output and not (tmp_path / "out").exists()


def test_two_processes_share_the_work_and_draw_each_row_once(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_latents(tmp_path / "in", 12)
    loaded.run(tmp_path / "in", tmp_path / "single", OPTIONS)
    running = [_start(tmp_path / "in", tmp_path / "out") for _ in range(2)]
    assert [process.wait(300) for process in running] == [0, 0]
    assert Counter(entry["key"] for entry in _entries(tmp_path / "out")) == Counter(f"{n:03d}" for n in range(12))
    assert _contents(tmp_path / "out") == _contents(tmp_path / "single")


def test_a_signal_ends_the_process_after_its_batch_and_frees_the_shard(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_latents(tmp_path / "in", 200)
    process = _start(tmp_path / "in", tmp_path / "out")
    wait_until(lambda: _contents(tmp_path / "out"), "the first output", within_s=300)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 130
    entries = _entries(tmp_path / "out")
    assert len(entries) < 200 and {f"{entry['key']}.png" for entry in entries} == set(_contents(tmp_path / "out"))
    held = {path.name for path in (tmp_path / "out" / "_batch" / "claims").iterdir()}
    assert all(name.endswith((".done", ".free")) or {f"{name}.done", f"{name}.free"} & held for name in held)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_latents_survive_random_kills_of_both_processes(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_latents(tmp_path / "in", 200)
    loaded.run(tmp_path / "in", tmp_path / "single", OPTIONS)
    drawn = random.Random(os.urandom(8))
    running = [_start(tmp_path / "in", tmp_path / "out") for _ in range(2)]
    for least in sorted(drawn.sample(range(1, 190), 8)):
        wait_until(partial(_has_outputs, tmp_path / "out", least), f"{least} outputs", within_s=600)
        victim = drawn.randrange(2)
        running[victim].kill()
        running[victim].wait()
        running[victim] = _start(tmp_path / "in", tmp_path / "out")
    assert [process.wait(1800) for process in running] == [0, 0]
    entries = _entries(tmp_path / "out")
    assert Counter(entry["key"] for entry in entries) == Counter(f"{n:03d}" for n in range(200)), "each exactly once"
    contents = _contents(tmp_path / "out")
    assert contents == _contents(tmp_path / "single"), "byte for byte those of the single run"
    assert all(entry["sha256"] == hashlib.sha256(contents[str(entry["output"])]).hexdigest() for entry in entries)
