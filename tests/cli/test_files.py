"""Inputs and outputs of commands: `-` for standard input and output, and outputs that are checked before the work."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from giantleap.cli.main import app
from giantleap.models.lua.checkpoints import read_lua
from tests.tiny_bundle import write_tiny_lua, write_tiny_swinir

Run = Callable[..., Result]


@pytest.fixture
def run(tiny_settings: None) -> Run:
    return lambda *arguments, **more: CliRunner().invoke(app, [str(argument) for argument in arguments], **more)


def _latent(path: Path) -> Path:
    save_file({"latent": np.random.default_rng(0).standard_normal((16, 8, 8)).astype(np.float32)}, path)
    return path


def test_a_prompt_an_input_and_an_image_go_through_pipes(run: Run, tmp_path: Path) -> None:
    drawn = run("generate", "-", "-o", "-", "--steps", "1", input="a red sphere\n")
    assert drawn.exit_code == 0, drawn.stderr
    with Image.open(io.BytesIO(drawn.stdout_bytes)) as image:
        assert (image.format, image.size) == ("PNG", (128, 128))
    assert "decode" in drawn.stderr, "times are no part of the image"
    larger = run("upscale", "-", "-o", tmp_path / "larger.png", "--scale", "2", input=drawn.stdout_bytes)
    assert larger.exit_code == 0, larger.output
    with Image.open(tmp_path / "larger.png") as image:
        assert image.size == (256, 256)


def test_weights_in_a_file_take_the_place_of_the_bundles_own(run: Run, tmp_path: Path) -> None:
    latent = _latent(tmp_path / "latent.safetensors")
    write_tiny_lua(tmp_path / "other.safetensors", seed=1)
    for name, more in (("own", ()), ("other", ("--lua", tmp_path / "other.safetensors"))):
        ended = run("upscale", latent, "-o", tmp_path / f"{name}.png", "--scale", "2", *more)
        assert ended.exit_code == 0, ended.output
    own, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("own", "other"))
    assert own != other
    assert read_lua(tmp_path / "other.safetensors").spec.scales == (2, 4)


def test_weights_of_other_latents_are_refused(run: Run, tmp_path: Path) -> None:
    write_tiny_swinir(tmp_path / "pixels.safetensors", 2)
    ended = run("generate", "a", "-o", tmp_path / "out.png", "--lua", tmp_path / "pixels.safetensors")
    assert ended.exit_code == 2 and "LUA weights of 3 channels do not fit bundle tiny" in ended.output


OUTPUTS = [
    ("generate", "a", "-o", "{}.png"),
    ("upscale", "{latent}", "-o", "{}.png"),
    ("upscale", "{latent}", "-o", "{}.safetensors"),
    ("bench", "protocol", "--json", "{}.json"),
    ("bench", "engines", "--json", "{}.json"),
    ("train", "statistics", "--lua", "{latent}", "--pairs", "{folder}", "--out", "{}.safetensors"),
]


@pytest.mark.parametrize("words", OUTPUTS, ids=lambda words: " ".join(words[:2]))
@pytest.mark.parametrize(
    ("place", "reason"),
    [("no/such/out", "mkdir -p"), ("file/out", "there is no directory"), ("dir", "it is a directory")],
)
def test_outputs_are_checked_before_the_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], place: str, reason: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the work began")

    for module in ("giantleap.cli.local", "giantleap.cli.bench.commands"):
        monkeypatch.setattr(f"{module}.open_bundle_route", refuse)
    (tmp_path / "file").write_text("")
    (tmp_path / f"dir{words[-1].removeprefix('{}')}").mkdir()
    names = {"{latent}": str(_latent(tmp_path / "latent.safetensors")), "{folder}": str(tmp_path)}
    ended = run(*(names.get(word, word.replace("{}", str(tmp_path / place))) for word in words))
    assert ended.exit_code == 2 and reason in ended.output, ended.output
    assert len(ended.output.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("train", "prepare", "{folder}", "--bundle", "{tiny}", "--out", "{}"),
        ("train", "evaluate", "--bundle", "{tiny}", "--images", "{folder}", "--out", "{}"),
        ("export", "--out", "{}"),
        ("bundle", "make", "mine", "--lua", "{lua}", "--from", "{tiny}", "--to", "{}"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_directories_are_checked_before_the_work(
    run: Run, tiny_bundle_dir: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    names = {
        "{folder}": str(tmp_path),
        "{tiny}": str(tiny_bundle_dir),
        "{lua}": str(tiny_bundle_dir / "lua.safetensors"),
        "{}": str(tmp_path / "file" / "below"),
    }
    ended = run(*(names.get(word, word) for word in words))
    assert ended.exit_code == 2 and "is no directory; name another one" in ended.output, ended.output
    assert len(ended.output.splitlines()) == 1


def test_a_full_disk_is_one_line(run: Run, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "out.png").symlink_to("/dev/full")
    ended = run("generate", "a", "-o", tmp_path / "out.png", "--steps", "1")
    assert ended.exit_code == 1 and "the disk is full; free space and run the command again" in ended.output
    assert "Traceback" not in ended.output


def test_a_name_of_any_bytes_is_written_and_shown(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(tiny_bundle_dir, directory)
    command = [sys.executable, "-m", "giantleap", "models", "--bundle", str(directory)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    ended = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert ended.returncode == 0 and b"caf\\udce9" in ended.stdout, ended.stderr


def test_the_demo_refuses_a_place_for_its_images_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "giantleap.cli.demo", "--out", str(tmp_path / "file" / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("giantleap: ") and len(ended.stderr.splitlines()) == 1
