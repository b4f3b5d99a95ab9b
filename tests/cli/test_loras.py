"""`giantleap generate --lora`: a file or a name with a weight changes the image; what does not fit ends the command."""

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from typer.testing import CliRunner, Result

from giantleap.cli.main import app
from giantleap.models.bundle.bundle import read_bundle
from tests.lora_files import write_lora
from tests.tiny_pipelines import tiny_sd15

pytestmark = pytest.mark.usefixtures("tiny_settings")


def _draw(out: Path, *options: str | Path) -> Result:
    arguments = ("generate", "a red sphere", "-o", out, "--scale", "1", "--steps", "1", *options)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_file_and_its_name_give_the_same_image_and_the_weight_counts(
    tiny_bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(str(read_bundle(tiny_bundle_dir).pipeline))
    path = write_lora(tmp_path / "ink.safetensors", pipeline, 1)
    monkeypatch.setenv("GIANTLEAP_LORA_DIR", str(tmp_path))
    images = {}
    for name, options in {"plain": (), "file": ("--lora", f"{path}:0.5"), "name": ("--lora", "ink:0.5"),
                          "full": ("--lora", "ink")}.items():  # fmt: skip
        ended = _draw(tmp_path / f"{name}.png", *options)
        assert ended.exit_code == 0, ended.output
        with Image.open(tmp_path / f"{name}.png") as image:
            images[name] = image.tobytes()
    assert images["file"] == images["name"] and len(set(images.values())) == 3


@pytest.mark.parametrize(
    ("option", "words"),
    [("missing.safetensors", "missing.safetensors"), ("ink:0.8", "GIANTLEAP_LORA_DIR"), ("other.safetensors:9", "8")],
)
def test_what_cannot_be_used_ends_the_command_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lora(tmp_path / "other.safetensors", tiny_sd15(), 1)
    ended = _draw(tmp_path / "out.png", "--lora", option)
    assert ended.exit_code == 2 and words in ended.output and len(ended.output.splitlines()) == 1
