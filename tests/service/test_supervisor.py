"""The supervisor restarts what dies, gives up on what cannot start, and shares one listening socket."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service.cli_options import BAD_CONFIGURATION
from service.settings import read_settings, to_environment
from service.supervisor import open_listener, plan_restart


def _giantleap(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service.cli", *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_restart_waits_longer_each_time_and_forgets_after_a_healthy_run() -> None:
    delays, crashes = [], 0
    for _ in range(6):
        crashes, delay_s = plan_restart(crashes, ran_s=1.0)
        delays.append(delay_s)
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert plan_restart(crashes, ran_s=60.0) == (1, 1.0)


def test_settings_reach_the_children_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read_settings(
        bundle=(Path("/a"), Path("/b")), queue_limit=7, measure_protocol=True, redis_url="redis://:word@h:1/0"
    )
    for name, value in to_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert read_settings() == settings


def test_serve_ends_at_once_when_a_bundle_is_missing(tmp_path: Path) -> None:
    ended = _giantleap(
        "serve", "--port", "0", "--data-dir", str(tmp_path / "data"), GIANTLEAP_BUNDLE=str(tmp_path / "none")
    )
    assert ended.returncode == BAD_CONFIGURATION
    assert "bundle.toml is missing" in ended.stderr and "Traceback" not in ended.stderr


def test_serve_says_when_its_port_is_taken(tmp_path: Path) -> None:
    with open_listener("127.0.0.1", 0) as taken:
        ended = _giantleap("serve", "--port", str(taken.getsockname()[1]), "--data-dir", str(tmp_path))
    assert ended.returncode == BAD_CONFIGURATION
    assert "cannot listen" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", ["api", "worker"])
def test_the_parts_ask_for_a_redis(command: str) -> None:
    ended = _giantleap(command)
    assert ended.returncode == BAD_CONFIGURATION and "GIANTLEAP_REDIS_URL" in ended.stderr


def test_a_misspelt_setting_is_refused() -> None:
    ended = _giantleap("models", GIANTLEAP_QUEU_LIMIT="3")
    assert ended.returncode == BAD_CONFIGURATION and "GIANTLEAP_QUEU_LIMIT" in ended.stderr


def test_the_listener_is_inherited_by_children() -> None:
    with open_listener("127.0.0.1", 0) as listener:
        assert os.get_inheritable(listener.fileno())
        with socket.create_connection(listener.getsockname(), timeout=5):
            connection, _ = listener.accept()
            connection.close()


def test_a_child_stops_when_the_pipe_to_its_parent_closes() -> None:
    child = (
        "import signal, sys, threading; from service.supervisor import stop_with_parent; stop = threading.Event();"
        "signal.signal(signal.SIGTERM, lambda *_: stop.set()); stop_with_parent(int(sys.argv[1]), 5.0);"
        "print('up', flush=True); sys.exit(0 if stop.wait(20) else 3)"
    )
    read_fd, write_fd = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", child, str(read_fd)], pass_fds=(read_fd,), stdout=subprocess.PIPE, text=True
    )
    os.close(read_fd)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    os.close(write_fd)
    assert process.wait(10) == 0
