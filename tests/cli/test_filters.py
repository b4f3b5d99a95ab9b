"""Filters on the command line: what they refuse is not written, and a wrong name ends a start with one line."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from giantleap.cli.main import app
from tests.filter_packages import install

SOURCE = """
class Small:
    def refuses(self, pixels, context):
        assert context.kind in ("generate", "upscale") and context.bundle == "tiny"
        return context.width_px > 64
"""


@pytest.fixture(autouse=True)
def tiny_settings(tiny_bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", "size_filter", {"small": "size_filter:Small"}, SOURCE, monkeypatch)
    for name, value in {"BUNDLE": tiny_bundle_dir, "DEVICE": "cpu", "LOG_LEVEL": "error", "FILTERS": "small"}.items():
        monkeypatch.setenv(f"GIANTLEAP_{name}", str(value))


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_refused_image_is_not_written(tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    assert _run("generate", "a red sphere", "-o", small, "--scale", "1", "--steps", "1").exit_code == 0
    for words in (("generate", "a red sphere", "--steps", "1"), ("upscale", small)):
        refused = _run(*words, "-o", large, "--scale", "2")
        assert refused.exit_code == 1 and not large.exists()
        assert "filter small refused the image" in refused.output and "nothing was written" in refused.output


@pytest.mark.parametrize("command", ["generate", "serve", "worker"])
def test_an_unknown_filter_ends_a_start_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("GIANTLEAP_FILTERS", "small,nsfw")
    arguments = {
        "generate": ("a red sphere", "-o", tmp_path / "out.png"),
        "serve": ("--port", "0", "--data-dir", tmp_path),
        "worker": ("--redis-url", "redis://127.0.0.1:1/0"),
    }[command]
    ended = _run(command, *arguments)
    line = "giantleap: filters: filter nsfw is not installed; installed filters: small\n"
    assert ended.exit_code == 2 and ended.output == line
