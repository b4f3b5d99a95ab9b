"""The supervisor restarts what dies, gives up on what cannot start, and shares one listening socket."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from giantleap.service.errors import EXIT_BAD_CONFIGURATION, EXIT_HUNG, BadConfiguration
from giantleap.service.settings import Settings, read_settings, to_environment
from giantleap.service.supervisor.processes import Launch, ManagedProcess, ProcessManager, plan_restart, to_reason
from giantleap.service.supervisor.supervisor import open_listener, reload, to_child_settings
from giantleap.service.telemetry.metrics import RestartCollector


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


def test_results_are_files_of_the_data_directory_only_with_an_embedded_redis(tmp_path: Path) -> None:
    plain = read_settings(data_dir=tmp_path / "a b")
    given = plain.model_copy(update={"result_store": "redis"})
    store = to_child_settings(plain, "redis://h", is_embedded=True).result_store
    assert store == (tmp_path / "a b" / "results").as_uri() and read_settings(result_store=store).result_store == store
    assert to_child_settings(plain, "redis://h", is_embedded=False).result_store is None
    assert to_child_settings(given, "redis://h", is_embedded=True).result_store == "redis"


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
    assert "Address already in use; choose another address with --host and --port" in ended.stderr


def test_the_command_tells_its_version() -> None:
    ended = _giantleap("--version")
    assert ended.returncode == 0 and ended.stdout == f"giantleap {version('giantleap')}\n"


@pytest.mark.parametrize("command", ["api", "worker"])
def test_the_parts_ask_for_a_redis(command: str) -> None:
    ended = _giantleap(command)
    assert ended.returncode == EXIT_BAD_CONFIGURATION and "GIANTLEAP_REDIS_URL" in ended.stderr


def test_a_misspelled_setting_is_refused() -> None:
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
    process.stdout.close()


FAKE_CHILD = """
import os, signal, sys, threading
role, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
def note(what):
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(f"{what} {role} {os.getpid()}\\n")
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
note("value=" + os.environ.get("FAKE_VALUE", "old"))
if os.path.exists(os.environ["FAKE_LOG"] + ".code"):
    sys.exit(int(open(os.environ["FAKE_LOG"] + ".code").read()))
note("ready")
os.write(int(options["--ready-fd"]), b"1")
stop.wait(120)
note("end")
"""


class FakeHost:
    """Two workers and an API process that only write down what happens to them."""

    def __init__(self, directory: Path, lifeline_fd: int) -> None:
        self.log, self.code, self.directory = directory / "log", directory / "log.code", directory
        script = directory / "child.py"
        script.write_text(FAKE_CHILD)
        self.children = [
            ManagedProcess("api-0", ("api",)),
            *(ManagedProcess(f"worker-{n}", ("worker",)) for n in (0, 1)),
        ]
        command = (sys.executable, str(script))
        self.manager = ProcessManager(self.children, self.launch(), lifeline_fd, directory, command)

    def launch(self, value: str = "old") -> Launch:
        return Launch({**os.environ, "FAKE_LOG": str(self.log), "FAKE_VALUE": value}, 60.0)

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def values(self) -> dict[str, str]:
        """The value that each process which is ready was started with, by name."""
        logged = [line.split() for line in self.lines() if line.startswith("value=")]
        started = {int(pid): what.removeprefix("value=") for what, _, pid in logged}
        return {each.name: started[each.process.pid] for each in self.children if each.process and each.is_ready}

    def restarts(self, role: str, reason: str) -> float:
        registry = CollectorRegistry()
        registry.register(RestartCollector(self.directory))
        value = registry.get_sample_value(f"giantleap_{role}_restarts_total", {"reason": reason})
        assert value is not None
        return value

    def run_until(self, holds: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline_s, self.lines()
            assert self.manager.poll() is None
            time.sleep(0.01)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeHost]:
    read_fd, write_fd = os.pipe()
    fake = FakeHost(tmp_path, read_fd)
    try:
        fake.run_until(lambda: len(fake.values()) == 3)
        yield fake
    finally:
        fake.manager.stop()
        os.close(read_fd)
        os.close(write_fd)
    assert all(child.process is None or child.process.poll() == 0 for child in fake.children)


def _kill(child: ManagedProcess) -> None:
    assert child.process is not None
    child.process.kill()
    child.process.wait()


def test_a_rolling_restart_drains_one_process_at_a_time_workers_first(host: FakeHost) -> None:
    host.manager.start_rolling_restart(host.launch("new"))
    host.run_until(lambda: not host.manager.is_rolling)
    assert host.values() == {"api-0": "new", "worker-0": "new", "worker-1": "new"}
    events = [line.rsplit(maxsplit=1)[0] for line in host.lines()[6:]]
    assert events == [
        f"{what} {role}" for role in ("worker", "worker", "api") for what in ("end", "value=new", "ready")
    ]


def test_what_ends_after_a_rolling_restart_comes_back_with_the_new_settings(host: FakeHost) -> None:
    host.manager.start_rolling_restart(host.launch("new"))
    host.run_until(lambda: not host.manager.is_rolling)
    _kill(host.children[0])
    host.run_until(lambda: len(host.lines()) == 17 and len(host.values()) == 3)
    assert set(host.values().values()) == {"new"}


def test_a_process_that_cannot_start_again_holds_up_the_rest_until_the_next_reload(host: FakeHost) -> None:
    host.code.write_text(str(EXIT_BAD_CONFIGURATION))
    host.manager.start_rolling_restart(host.launch("broken"))
    host.run_until(lambda: host.children[1].crashes == 2)
    assert host.values() == {"api-0": "old", "worker-1": "old"} and host.manager.is_rolling
    host.code.unlink()
    host.manager.start_rolling_restart(host.launch("new"))
    host.run_until(lambda: not host.manager.is_rolling)
    assert host.values() == {"api-0": "new", "worker-0": "new", "worker-1": "new"}


def test_a_process_that_does_not_drain_is_killed(host: FakeHost) -> None:
    worker = host.children[1]
    assert worker.process is not None
    worker.process.send_signal(signal.SIGSTOP)
    worker.grace_s = -60.0
    host.manager.start_rolling_restart(host.launch("new"))
    host.run_until(lambda: not host.manager.is_rolling)
    assert len([line for line in host.lines() if line.startswith("end ")]) == 2, "all but the stopped one"


def test_only_what_was_never_ready_is_given_up(host: FakeHost) -> None:
    served, _, never = host.children
    for child, was_ready in ((served, True), (never, False)):
        child.crashes, child.was_ready = 20, was_ready
        _kill(child)
    assert host.manager.poll() == 1
    assert served.process is None and served.restart_at_s > time.monotonic()


def test_a_wrong_configuration_at_start_is_given_up_at_once(host: FakeHost) -> None:
    host.code.write_text(str(EXIT_BAD_CONFIGURATION))
    child = host.children[0]
    _kill(child)
    child.was_ready = False
    codes: list[int | None] = [None]
    while codes[-1] is None:
        child.restart_at_s = 0.0
        codes.append(host.manager.poll())
        time.sleep(0.01)
    assert codes[-1] == EXIT_BAD_CONFIGURATION


def test_restarts_are_counted_by_role_and_reason(host: FakeHost) -> None:
    for child in host.children[:2]:
        _kill(child)
    host.run_until(lambda: len(host.lines()) == 10)
    for role in ("worker", "api"):
        assert host.restarts(role, "killed") == 1
        assert host.restarts(role, "crashed") == 0


def test_a_reload_takes_what_it_can_and_names_what_needs_a_restart(caplog: pytest.LogCaptureFixture) -> None:
    settings = read_settings(port=8000, queue_limit=5)
    chosen = reload(settings, lambda: read_settings(port=9000, queue_limit=7, drain_grace_s=3, key_prefix="other"))
    assert chosen is not None and (chosen.queue_limit, chosen.drain_grace_s) == (7, 3)
    assert (chosen.port, chosen.key_prefix) == (8000, "giantleap")
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "changed, but only a restart applies it: key_prefix, port"
    ]


def test_settings_that_are_wrong_change_nothing_and_are_one_line(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('queue_limit = 0\nwebhook_secret = ""\n')

    def no_keys() -> Settings:
        raise BadConfiguration("the keys file is wrong")

    assert reload(read_settings(), lambda: read_settings(settings_file=path)) is None
    assert reload(read_settings(), no_keys) is None
    assert [record.message for record in caplog.records] == [
        "settings not reloaded, the old ones stay: queue_limit: must be at least 1; "
        "webhook_secret: is too short; the minimum length is 1",
        "settings not reloaded, the old ones stay: the keys file is wrong",
    ]


def test_an_exit_code_says_why() -> None:
    assert [to_reason(code) for code in (EXIT_HUNG, -9, 1, 0)] == ["hung", "killed", "crashed", "stopped"]
