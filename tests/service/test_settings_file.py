"""Settings from a TOML file: variables win over it, what is wrong in it is named without its value."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from giantleap.service.errors import EXIT_BAD_CONFIGURATION
from giantleap.service.settings import (
    NEEDS_RESTART,
    Settings,
    format_errors,
    merge_reloadable,
    read_settings,
    to_environment,
    without_settings,
)

VARIABLE = "GIANTLEAP_SETTINGS_FILE"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(
        'queue_limit = 7\nbatch_items = 3\nbundle = ["/a", "/b"]\nmeasure_protocol = true\nwebhook_secret = "s3cr3t"\n'
    )
    return path


def test_the_file_gives_what_nothing_else_says(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(path))
    monkeypatch.setenv("GIANTLEAP_BATCH_ITEMS", "5")
    settings = read_settings(measure_protocol=False)
    assert settings.queue_limit == 7, "from the file"
    assert settings.batch_items == 5, "a variable wins over it"
    assert settings.measure_protocol is False, "an option wins over both"
    assert settings.bundle == (Path("/a"), Path("/b")) and settings.max_num_images == 4
    assert settings.webhook_secret is not None and settings.webhook_secret.get_secret_value() == "s3cr3t"


def test_a_child_gets_what_its_parent_read_and_not_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(path))
    settings = read_settings()
    environment = without_settings(os.environ) | to_environment(settings)
    path.write_text("queue_limit = 9\n")
    for name in [name for name in os.environ if name.startswith("GIANTLEAP_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert read_settings() == settings.model_copy(update={"settings_file": None})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("queu_limit = 7", "unknown setting queu_limit"),
        ('settings_file = "other.toml"', "unknown setting settings_file"),
        ("[queue]\nlimit = 7", "unknown setting queue"),
        ("queue_limit = hunter2", "not TOML at line 1, column 15"),
        ('redis_url = ["hunter2"]', "redis_url: must be text"),
        (
            'queue_limit = "hunter2"',
            "queue_limit: must be a whole number",
        ),
        ("queue_limit = true", "queue_limit must not be true or false"),
        ('port = 70000\ndevice = "hunter2"', "port: must be at most 65535"),
    ],
)
def test_what_is_wrong_is_named_without_its_value(path: Path, text: str, reason: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        read_settings(settings_file=path)
    lines = "\n".join(format_errors(raised.value))
    assert reason in lines and "hunter2" not in lines + str(raised.value)


def test_a_file_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "giantleap", "models"],
        env={**os.environ, VARIABLE: str(tmp_path / "none.toml")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == EXIT_BAD_CONFIGURATION
    assert ended.stderr.endswith("none.toml: No such file or directory\n") and "Traceback" not in ended.stderr


def test_what_needs_a_restart_exists_and_stays(path: Path) -> None:
    assert set(NEEDS_RESTART) < set(Settings.model_fields)
    running = read_settings(queue_limit=5)
    chosen, changed = merge_reloadable(running, read_settings(queue_limit=6, worker_processes=3))
    assert (chosen.queue_limit, chosen.worker_processes, changed) == (6, 1, ["worker_processes"])
