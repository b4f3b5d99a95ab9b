"""The commands that need no service, on a bundle of random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from giantleap.cli.main import app

pytestmark = pytest.mark.usefixtures("tiny_settings")

PROMPT = "a red sphere on a green floor"


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("scale", "name"), [(1, "out.png"), (2, "out.webp"), (4, "out.jpg")])
def test_generate_writes_an_image_of_the_scaled_base_size(tmp_path: Path, scale: int, name: str) -> None:
    out = tmp_path / name
    ended = _run("generate", PROMPT, "-o", out, "--scale", str(scale), "--steps", "2")
    assert ended.exit_code == 0, ended.output
    with Image.open(out) as image:
        assert image.size == (64 * scale, 64 * scale)
    stages = ("generate", *(("upscale",) if scale > 1 else ()), "decode", "encode")
    assert all(f"{stage} " in ended.output for stage in stages)


def test_generate_names_the_words_that_the_bundle_does_not_know(tmp_path: Path) -> None:
    ended = _run("generate", "a red zeppelin", "-o", tmp_path / "out.png", "--steps", "1")
    assert ended.exit_code == 0 and "zeppelin" in ended.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scale", "3"), "scale: is 3"),
        (("--width", "130", "--height", "128"), "nearest"),
    ],
)
def test_generate_refuses_what_the_bundle_cannot_reach(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "out.png"
    ended = _run("generate", PROMPT, "-o", out, *arguments)
    assert ended.exit_code == 2 and message in ended.output and not out.exists()


def test_generate_compresses_as_the_options_say(tmp_path: Path) -> None:
    sizes: list[int] = []
    for options in ((), ("--quality", "30"), ("--quality", "30", "--compression", "small")):
        out = tmp_path / f"{len(sizes)}.jpg"
        assert _run("generate", PROMPT, "-o", out, "--steps", "1", *options).exit_code == 0
        sizes.append(out.stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]
    refused = _run("generate", PROMPT, "-o", tmp_path / "a.png", "--quality", "30")
    assert refused.exit_code == 2 and "quality: applies to jpeg and webp" in refused.output


def test_generate_refuses_an_unknown_image_format(tmp_path: Path) -> None:
    ended = _run("generate", PROMPT, "-o", tmp_path / "out.bmp")
    assert ended.exit_code == 2 and ".png" in ended.output


def test_upscale_writes_a_latent_or_its_image(tmp_path: Path) -> None:
    latent = tmp_path / "latent.safetensors"
    save_file({"latent": np.random.default_rng(0).standard_normal((16, 8, 12)).astype(np.float32)}, latent)
    assert _run("upscale", latent, "-o", tmp_path / "x4.safetensors", "--scale", "4").exit_code == 0
    assert load_file(tmp_path / "x4.safetensors")["latent"].shape == (16, 32, 48)
    assert _run("upscale", latent, "-o", tmp_path / "x2.png", "--scale", "2").exit_code == 0
    with Image.open(tmp_path / "x2.png") as image:
        assert image.size == (12 * 2 * 8, 8 * 2 * 8)


def test_a_scaled_latent_is_brought_to_raw_space_first(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).standard_normal((16, 8, 8)).astype(np.float32)
    np.save(tmp_path / "raw.npy", raw)
    np.save(tmp_path / "scaled.npy", raw * np.float32(0.5))  # the tiny bundle's scaling factor
    outputs = []
    for name, option in (("raw", "--no-scaled"), ("scaled", "--scaled")):
        out = tmp_path / f"{name}.safetensors"
        assert _run("upscale", tmp_path / f"{name}.npy", "-o", out, option).exit_code == 0
        outputs.append(load_file(out)["latent"])
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-5)


def test_upscale_refuses_a_latent_of_other_channels(tmp_path: Path) -> None:
    latent = tmp_path / "latent.safetensors"
    save_file({"latent": np.zeros((4, 8, 8), np.float32)}, latent)
    ended = _run("upscale", latent, "-o", tmp_path / "out.png")
    assert ended.exit_code == 2 and "16, latent_height" in ended.output


def test_models_prints_the_scales_and_the_latent_space() -> None:
    ended = _run("models")
    assert ended.exit_code == 0 and "x1, x2, x4" in ended.output and "16 channels" in ended.output


def test_bench_protocol_prints_and_stores_every_stage(tmp_path: Path) -> None:
    stored = tmp_path / "protocol.jsonl"
    ended = _run("bench", "protocol", "--scale", "2", "--steps", "1", "--warmups", "1", "--runs", "2", "--json", stored)
    assert ended.exit_code == 0, ended.output
    (result,) = map(json.loads, stored.read_text().splitlines())
    assert set(result["stages"]) == {"generate", "upscale", "decode", "total"} and result["image_px"] == "128x128"
    assert "median" in ended.output


def test_generate_refines(tmp_path: Path) -> None:
    plain, refined = tmp_path / "plain.png", tmp_path / "refined.png"
    assert _run("generate", PROMPT, "-o", plain, "--steps", "2").exit_code == 0
    ended = _run("generate", PROMPT, "-o", refined, "--steps", "2", "--refine-strength", "0.3", "--refine-steps", "2")
    assert ended.exit_code == 0 and "refine " in ended.output, ended.output
    with Image.open(plain) as before, Image.open(refined) as after:
        assert before.size == after.size and before.tobytes() != after.tobytes()
    ended = _run("generate", PROMPT, "-o", refined, "--refine-strength", "0.6")
    assert ended.exit_code == 2 and "refine.strength: must be at most 0.5" in ended.output
