"""`giantleap provenance`, and what `giantleap generate` and `upscale` write into their files."""

import json
import re
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from giantleap.cli.main import app

pytestmark = pytest.mark.usefixtures("tiny_settings")


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _rows(path: Path) -> dict[str, str]:
    ended = _run("provenance", "verify", path)
    assert ended.exit_code == 0, ended.output
    return dict(re.split(r"  +", line, maxsplit=1) for line in ended.output.splitlines())


def test_a_made_certificate_signs_what_generate_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _run("provenance", "dev-cert", "--out", tmp_path / "c2pa")
    assert made.exit_code == 0, made.output
    for name, value in re.findall(r"(GIANTLEAP_\w+)=(\S+)", made.output):
        monkeypatch.setenv(name, value)
    assert stat.S_IMODE((tmp_path / "c2pa" / "c2pa-key.pem").stat().st_mode) == 0o600
    out = tmp_path / "out.jpg"
    drawn = _run("generate", "a red sphere", "-o", out, "--scale", "1", "--steps", "1")
    assert drawn.exit_code == 0, drawn.output
    rows = _rows(out)
    assert rows["generated"] == "yes" and rows["manifest"] == "valid" and "not trusted" in rows["manifest signed by"]
    assert rows["xmp source type"] == rows["manifest source type"] and "xmp parameters" not in rows
    content = out.read_bytes()
    out.write_bytes(content[:-2] + b"\0" + content[-2:])
    altered = _run("provenance", "verify", out)
    assert altered.exit_code == 1 and "assertion.dataHash.mismatch" in altered.output


def test_a_number_marks_the_pixels_of_what_both_commands_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIANTLEAP_WATERMARK", "4711")
    drawn, enlarged, stripped = tmp_path / "drawn.png", tmp_path / "enlarged.jpg", tmp_path / "stripped.jpg"
    assert _run("generate", "a red sphere", "-o", drawn, "--scale", "4", "--steps", "1").exit_code == 0
    assert _run("upscale", drawn, "-o", enlarged, "--scale", "2").exit_code == 0
    Image.open(enlarged).save(stripped, quality=90)
    rows = _rows(stripped)
    assert rows["watermark"].startswith("4711, ") and rows["generated"] == "yes" and "xmp creator" not in rows
    assert "watermark" in _rows(drawn)


def test_a_watermark_that_is_no_number_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIANTLEAP_WATERMARK", "yes")
    ended = _run("generate", "a red sphere", "-o", tmp_path / "out.png")
    assert ended.exit_code == 2 and "watermark" in ended.output


def test_an_enlarged_photograph_is_a_composite(tmp_path: Path) -> None:
    photo, out = tmp_path / "photo.png", tmp_path / "out.webp"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(photo)
    assert _rows(photo)["generated"] == "not known"
    assert _run("upscale", photo, "-o", out, "--scale", "2").exit_code == 0
    assert _rows(out)["xmp source type"].endswith("/compositeWithTrainedAlgorithmicMedia")


def test_parameters_are_written_where_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    drawn = _run("generate", "a red sphere", "-o", out, "--scale", "1", "--steps", "1", "--embed-parameters")
    assert drawn.exit_code == 0, drawn.output
    parameters = json.loads(_rows(out)["xmp parameters"])
    assert parameters["prompt"] == "a red sphere" and parameters["seed"] == 0 and parameters["steps"] == 1


@pytest.mark.parametrize("command", ["generate", "serve", "worker"])
def test_an_unusable_certificate_ends_a_start_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for name in ("CERT", "KEY"):
        path = tmp_path / f"{name}.pem"
        path.write_text(f"secret-{name}")
        monkeypatch.setenv(f"GIANTLEAP_C2PA_{name}", str(path))
    arguments = {
        "generate": ("a red sphere", "-o", tmp_path / "out.png"),
        "serve": ("--port", "0", "--data-dir", tmp_path),
        "worker": ("--redis-url", "redis://127.0.0.1:1/0"),
    }[command]
    ended = _run(command, *arguments)
    assert ended.exit_code == 2 and str(tmp_path / "CERT.pem") in ended.output
    assert len(ended.output.splitlines()) == 1 and "secret-" not in ended.output


def test_a_certificate_without_its_key_is_a_wrong_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIANTLEAP_C2PA_CERT", str(tmp_path / "cert.pem"))
    ended = _run("models")
    assert ended.exit_code == 2 and "c2pa_key" in ended.output


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "c2pa-key.pem").write_text("mine")
    ended = _run("provenance", "dev-cert", "--out", tmp_path)
    assert ended.exit_code == 2 and (tmp_path / "c2pa-key.pem").read_text() == "mine"
    assert not (tmp_path / "c2pa-cert.pem").exists()
