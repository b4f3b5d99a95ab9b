"""`giantleap settings`: the values in force, each with its origin and without secrets; and completion of a shell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from giantleap.cli.main import app
from giantleap.service.settings import Settings
from giantleap.service.settings_page import to_markdown


def shown() -> dict[str, list[str]]:
    ended = CliRunner().invoke(app, ["settings"])
    assert ended.exit_code == 0, ended.output
    return {line.split()[0]: line.split()[1:] for line in ended.output.splitlines()}


def test_each_setting_is_shown_with_its_value_and_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("port = 8100\nqueue_limit = 7\n")
    monkeypatch.setenv("GIANTLEAP_SETTINGS_FILE", str(file))
    monkeypatch.setenv("GIANTLEAP_PORT", "8200")
    rows = shown()
    assert rows["GIANTLEAP_PORT"] == ["8200", "environment"]
    assert rows["GIANTLEAP_QUEUE_LIMIT"] == ["7", str(file)]
    assert rows["GIANTLEAP_HOST"] == ["127.0.0.1", "default"]
    assert len(rows) == len(Settings.model_fields)


@pytest.mark.parametrize(
    "url",
    [
        "redis://alice:hunter2@db:6379/0",
        "redis://:hun/hunter2@x@db/0",
        "redis+sentinel://db:26379/main?sentinel_username=a&sentinel_password=hunter2",
        "redis://db/0?password=hunter2",
    ],
)
def test_no_secret_is_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIANTLEAP_REDIS_URL", url)
    monkeypatch.setenv("GIANTLEAP_WEBHOOK_SECRET", "hunter2hunter2hunter2")
    ended = CliRunner().invoke(app, ["settings"])
    assert ended.exit_code == 0 and "hunter2" not in ended.output
    assert "db" in ended.output, "the host is no secret"


def test_a_wrong_setting_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIANTLEAP_PROT", "8000")
    ended = CliRunner().invoke(app, ["settings"])
    assert ended.exit_code == 2 and ended.output.startswith("giantleap: unknown setting GIANTLEAP_PROT; ")
    assert len(ended.output.splitlines()) == 1
    ended = CliRunner().invoke(app, ["settings", "--markdown"])
    assert ended.exit_code == 0 and ended.output == to_markdown()


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("giantleap bun", {"bundle"}),
        ("giantleap bundle show sd", {"sd3.5-medium", "sdxl"}),
        ("giantleap generate x --bundle poc", {"pocket"}),
        ("giantleap train prepare --bun", {"--bundle"}),
    ],
)
def test_a_shell_completes_commands_options_and_bundles(words: str, completed: set[str], tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "_GIANTLEAP_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "GIANTLEAP_DATA_DIR": str(tmp_path),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "giantleap"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert set(ended.stdout.split()) == completed, ended.stderr
