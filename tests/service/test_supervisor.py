"""The supervisor restarts what dies, gives up on what cannot start, and shares one listening socket."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from service.cli_options import BAD_CONFIGURATION
from service.metrics import RestartCollector
from service.settings import read_settings, to_environment
from service.supervisor import Child, Fleet, open_listener, plan_restart, to_reason
from service.watchdog import HUNG


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


FAKE_CHILD = """
import os, signal, sys, threading
role, given = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
def note(what):
    with open(os.environ["FLEET_LOG"], "a") as log:
        log.write(f"{what} {role} {os.getpid()}\\n")
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
note("start")
if os.path.exists(os.environ["FLEET_LOG"] + ".code"):
    sys.exit(int(open(os.environ["FLEET_LOG"] + ".code").read()))
if "--ready-fd" in given:
    note("ready")
    os.write(int(given["--ready-fd"]), b"1")
stop.wait(120)
note("end")
"""


class FakeFleet:
    """A fleet of two workers and an API that only note what happens to them."""

    def __init__(self, directory: Path, lifeline_fd: int) -> None:
        self.log, self.code = directory / "log", directory / "log.code"
        script = directory / "child.py"
        script.write_text(FAKE_CHILD)
        self.children = [Child("api-0", ("api",)), *(Child(f"worker-{n}", ("worker",)) for n in (0, 1))]
        environment = {**os.environ, "FLEET_LOG": str(self.log)}
        self.fleet = Fleet(self.children, environment, lifeline_fd, directory, 60.0, (sys.executable, str(script)))

    def pids(self) -> list[int | None]:
        return [None if child.process is None else child.process.pid for child in self.children]

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def run_until(self, holds: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline_s, self.lines()
            assert self.fleet.keep() is None
            self.fleet.roll()
            time.sleep(0.01)


@contextmanager
def fake_fleet(directory: Path) -> Iterator[FakeFleet]:
    read_fd, write_fd = os.pipe()
    fake = FakeFleet(directory, read_fd)
    try:
        fake.run_until(lambda: len(fake.lines()) == 3)
        yield fake
    finally:
        fake.fleet.stop()
        os.close(read_fd)
        os.close(write_fd)
    assert all(child.process is not None and child.process.poll() == 0 for child in fake.children)


def test_a_replacement_starts_each_process_before_the_old_one_ends_workers_first(tmp_path: Path) -> None:
    with fake_fleet(tmp_path) as fake:
        old = fake.pids()
        fake.fleet.ask_roll()
        fake.run_until(lambda: not fake.fleet.is_rolling)
        new = fake.pids()
        assert not set(old) & set(new)
        lines = fake.lines()
        for before, after, role in zip(old, new, ("api", "worker", "worker"), strict=True):
            assert lines.index(f"ready {role} {after}") < lines.index(f"end {role} {before}")
        assert [line.split()[1] for line in lines if line.startswith("ready")] == ["worker", "worker", "api"]


def test_a_replacement_that_cannot_start_leaves_the_old_processes_alone(tmp_path: Path) -> None:
    with fake_fleet(tmp_path) as fake:
        old = fake.pids()
        fake.code.write_text("2")
        fake.fleet.ask_roll()
        fake.run_until(lambda: not fake.fleet.is_rolling)
        assert fake.pids() == old and len(fake.lines()) == 4, "one successor was tried, nothing was ended"


def test_restarts_of_workers_are_counted_by_why_they_ended(tmp_path: Path) -> None:
    with fake_fleet(tmp_path) as fake:
        worker = fake.children[1].process
        assert worker is not None
        worker.kill()
        worker.wait()
        fake.run_until(lambda: len(fake.lines()) == 4)
    registry = CollectorRegistry()
    registry.register(RestartCollector(tmp_path))
    assert 'giantleap_worker_restarts_total{reason="killed"} 1.0' in generate_latest(registry).decode()


def test_an_exit_code_says_why() -> None:
    assert [to_reason(code) for code in (HUNG, -9, 1, 0)] == ["hung", "killed", "crashed", "stopped"]
