"""The supervisor restarts what dies, gives up on what cannot start, and shares one listening socket."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from giantleap.service.errors import EXIT_BAD_CONFIGURATION, EXIT_HUNG, BadConfiguration
from giantleap.service.settings import Settings, read_settings, to_environment
from giantleap.service.supervisor.processes import Launch, ManagedProcess, ProcessManager, plan_restart, to_reason
from giantleap.service.supervisor.supervisor import open_listener, reload
from giantleap.service.telemetry.metrics import HostCollector


def _giantleap(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "giantleap", *arguments],
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
    assert ended.returncode == EXIT_BAD_CONFIGURATION
    assert "bundle.toml is missing" in ended.stderr and "Traceback" not in ended.stderr


def test_serve_says_when_its_port_is_taken(tmp_path: Path) -> None:
    with open_listener("127.0.0.1", 0) as taken:
        ended = _giantleap("serve", "--port", str(taken.getsockname()[1]), "--data-dir", str(tmp_path))
    assert ended.returncode == EXIT_BAD_CONFIGURATION
    assert "cannot listen" in ended.stderr and "Traceback" not in ended.stderr
    assert "Address already in use; --host and --port" in ended.stderr


def test_the_command_tells_its_version() -> None:
    ended = _giantleap("--version")
    assert ended.returncode == 0 and ended.stdout == f"giantleap {version('giantleap')}\n"


@pytest.mark.parametrize("command", ["api", "worker"])
def test_the_parts_ask_for_a_redis(command: str) -> None:
    ended = _giantleap(command)
    assert ended.returncode == EXIT_BAD_CONFIGURATION and "GIANTLEAP_REDIS_URL" in ended.stderr


def test_a_misspelt_setting_is_refused() -> None:
    ended = _giantleap("models", GIANTLEAP_QUEU_LIMIT="3")
    assert ended.returncode == EXIT_BAD_CONFIGURATION and "GIANTLEAP_QUEU_LIMIT" in ended.stderr


def test_the_listener_is_inherited_by_children() -> None:
    with open_listener("127.0.0.1", 0) as listener:
        assert os.get_inheritable(listener.fileno())
        with socket.create_connection(listener.getsockname(), timeout=60):
            connection, _ = listener.accept()
            connection.close()


def test_a_child_stops_when_the_pipe_to_its_parent_closes() -> None:
    child = (
        "import signal, sys, threading; stop = threading.Event();"
        "from giantleap.service.supervisor.supervisor import exit_with_parent;"
        "signal.signal(signal.SIGTERM, lambda *_: stop.set()); exit_with_parent(int(sys.argv[1]), 5.0);"
        "print('up', flush=True); sys.exit(0 if stop.wait(60) else 3)"
    )
    read_fd, write_fd = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", child, str(read_fd)], pass_fds=(read_fd,), stdout=subprocess.PIPE, text=True
    )
    os.close(read_fd)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    os.close(write_fd)
    assert process.wait(90) == 0


FAKE_CHILD = """
import os, signal, sys, threading
role, given = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
def note(what):
    with open(os.environ["FLEET_LOG"], "a") as log:
        log.write(f"{what} {role} {os.getpid()}\\n")
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
note("start")
note("value=" + os.environ.get("FLEET_VALUE", "old"))
if os.environ.get("FLEET_BREAKS") == role:
    sys.exit(1)
if os.path.exists(os.environ["FLEET_LOG"] + ".code"):
    sys.exit(int(open(os.environ["FLEET_LOG"] + ".code").read()))
if "FLEET_MUTE" not in os.environ:
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
        self.children = [
            ManagedProcess("api-0", ("api",)),
            *(ManagedProcess(f"worker-{n}", ("worker",)) for n in (0, 1)),
        ]
        self.directory = directory
        self.fleet = ProcessManager(self.children, self.launch(), lifeline_fd, directory, (sys.executable, str(script)))

    def launch(self, **variables: str) -> Launch:
        return Launch({**os.environ, "FLEET_LOG": str(self.log), **variables}, 60.0)

    def values(self) -> dict[int, str]:
        """The value that each running process was started with."""
        told = [line.split() for line in self.lines() if line.startswith("value=")]
        started = {int(pid): what.removeprefix("value=") for what, _, pid in told}
        running = [each.process for each in self.children if each.process is not None and each.process.poll() is None]
        return {process.pid: started[process.pid] for process in running if process.pid in started}

    def metric(self, name: str) -> float:
        registry = CollectorRegistry()
        registry.register(HostCollector(self.directory))
        lines = generate_latest(registry).decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"giantleap_{name} "))

    def pids(self) -> list[int | None]:
        return [None if child.process is None else child.process.pid for child in self.children]

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def run_until(self, holds: Callable[[], bool], *, rolls: bool = True) -> None:
        deadline_s = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline_s, self.lines()
            assert self.fleet.keep() is None
            if rolls:
                self.fleet.roll()
            time.sleep(0.01)


@contextmanager
def fake_fleet(directory: Path) -> Iterator[FakeFleet]:
    read_fd, write_fd = os.pipe()
    fake = FakeFleet(directory, read_fd)
    try:
        fake.run_until(lambda: all(child.has_worked for child in fake.children))
        yield fake
    finally:
        fake.fleet.stop()
        os.close(read_fd)
        os.close(write_fd)
    assert all(child.process is not None and child.process.poll() == 0 for child in fake.children)


def test_a_replacement_starts_each_process_before_the_old_one_ends_workers_first(tmp_path: Path) -> None:
    with fake_fleet(tmp_path) as fake:
        old = fake.pids()
        fake.fleet.ask_roll(fake.launch())
        fake.run_until(lambda: not fake.fleet.is_rolling)
        new = fake.pids()
        assert not set(old) & set(new)
        lines = fake.lines()
        for before, after, role in zip(old, new, ("api", "worker", "worker"), strict=True):
            assert lines.index(f"ready {role} {after}") < lines.index(f"end {role} {before}")
        assert [line.split()[1] for line in lines if line.startswith("ready")][3:] == ["worker", "worker", "api"]


def test_only_what_never_worked_is_given_up(tmp_path: Path) -> None:
    with fake_fleet(tmp_path) as fake:
        worked, _, mute = fake.children
        for child, mark in ((worked, True), (mute, False)):
            child.crashes, child.has_worked = 20, mark
        assert worked.process is not None and mute.process is not None
        for child in (worked, mute):
            child.process.kill()
            child.process.wait(60)
        old = worked.process.pid
        assert fake.fleet.keep() == 1
        assert (worked.process, mute.process) == (None, None) and worked.restart_at_s > time.monotonic()
        worked.restart_at_s = mute.restart_at_s = 0.0
        fake.run_until(lambda: worked.process is not None and worked.process.pid != old and mute.has_worked)


def test_a_replacement_that_cannot_start_leaves_the_old_processes_alone(tmp_path: Path) -> None:
    with fake_fleet(tmp_path) as fake:
        old = fake.pids()
        fake.code.write_text("2")
        fake.fleet.ask_roll(fake.launch())
        fake.run_until(lambda: not fake.fleet.is_rolling)
        assert fake.pids() == old and len(fake.lines()) == 11, "one successor was tried, nothing was ended"
        assert fake.metric("config_last_reload_successful") == 0


def test_a_replacement_brings_the_new_settings_to_every_process(tmp_path: Path) -> None:
    with fake_fleet(tmp_path) as fake:
        fake.fleet.ask_roll(fake.launch(FLEET_VALUE="new"))
        fake.run_until(lambda: not fake.fleet.is_rolling)
        assert set(fake.values().values()) == {"new"}
        assert fake.metric("config_last_reload_successful") == 1
        assert fake.metric("config_last_reload_success_timestamp_seconds") > time.time() - 600
        _kill(fake.children[0])
        fake.run_until(lambda: len(fake.values()) == 3)
        assert set(fake.values().values()) == {"new"}, "what is started again later has them too"


def test_settings_that_a_later_process_cannot_run_with_are_taken_back_from_all(tmp_path: Path) -> None:
    with fake_fleet(tmp_path) as fake:
        api = fake.pids()[0]
        fake.fleet.ask_roll(fake.launch(FLEET_VALUE="new", FLEET_BREAKS="api"))
        fake.run_until(lambda: "new" in fake.values().values())
        fake.run_until(lambda: not fake.fleet.is_rolling)
        assert fake.pids()[0] == api and set(fake.values().values()) == {"old"}
        assert len([line for line in fake.lines() if line.startswith("value=new")]) == 3, (
            "two workers and the API tried"
        )
        assert fake.metric("config_last_reload_successful") == 0


def test_a_process_that_ends_during_a_replacement_comes_back_with_the_settings_that_it_had(tmp_path: Path) -> None:
    with fake_fleet(tmp_path) as fake:
        fake.fleet.ask_roll(fake.launch(FLEET_VALUE="new"))
        fake.run_until(lambda: list(fake.values().values()).count("new") == 1)
        replaced = next(child for child in fake.children if fake.values().get(child.process.pid) == "new")  # type: ignore[union-attr]
        for child in (replaced, fake.children[0]):
            _kill(child)
        fake.run_until(lambda: len(fake.values()) == 3, rolls=False)
        assert sorted(fake.values().values()) == ["new", "old", "old"]
        fake.run_until(lambda: not fake.fleet.is_rolling)
        assert set(fake.values().values()) == {"new"}


def _kill(child: ManagedProcess) -> None:
    assert child.process is not None
    child.process.kill()
    child.process.wait()


class NotingFleet:
    """Only remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Launch] = []
        self.reloads: list[bool] = []

    def ask_roll(self, launch: Launch) -> None:
        self.asked.append(launch)

    def note_reload(self, successful: bool) -> None:
        self.reloads.append(successful)


def _reload(settings: Settings, reread: Callable[[], Settings]) -> NotingFleet:
    fleet = NotingFleet()
    reload(settings, reread, lambda chosen: Launch(to_environment(chosen), chosen.drain_grace_s), fleet)  # type: ignore[arg-type]
    return fleet


def test_a_reload_takes_what_it_can_and_names_what_needs_a_restart(caplog: pytest.LogCaptureFixture) -> None:
    settings = read_settings(port=8000, queue_limit=5)
    fleet = _reload(settings, lambda: read_settings(port=9000, queue_limit=7, drain_grace_s=3, key_prefix="other"))
    (launch,) = fleet.asked
    assert launch.environment["GIANTLEAP_QUEUE_LIMIT"] == "7" and launch.grace_s == 3
    assert launch.environment["GIANTLEAP_PORT"] == "8000" and launch.environment["GIANTLEAP_KEY_PREFIX"] == "giantleap"
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "changed, but only a restart takes it over: key_prefix, port"
    ]


def test_settings_that_are_wrong_replace_nothing_and_are_one_line(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('queue_limit = 0\nwebhook_secret = ""\n')
    fleet = _reload(read_settings(), lambda: read_settings(settings_file=path))
    assert fleet.asked == [] and fleet.reloads == [False]

    def no_keys() -> Settings:
        raise BadConfiguration("the keys file is wrong")

    fleet = _reload(read_settings(), no_keys)
    assert fleet.asked == [] and fleet.reloads == [False]
    assert [record.message for record in caplog.records] == [
        "settings not reloaded, the old ones stay: queue_limit: Input should be greater than or equal to 1; "
        "webhook_secret: Value should have at least 1 item after validation, not 0",
        "settings not reloaded, the old ones stay: the keys file is wrong",
    ]


def test_restarts_are_counted_by_role_and_by_why_a_process_ended(tmp_path: Path) -> None:
    with fake_fleet(tmp_path) as fake:
        for child in fake.children[:2]:
            _kill(child)
        fake.run_until(lambda: len(fake.lines()) == 15)
        for role in ("worker", "api"):
            assert fake.metric(f'{role}_restarts_total{{reason="killed"}}') == 1
            assert fake.metric(f'{role}_restarts_total{{reason="crashed"}}') == 0


def test_an_exit_code_says_why() -> None:
    assert [to_reason(code) for code in (EXIT_HUNG, -9, 1, 0)] == ["hung", "killed", "crashed", "stopped"]
