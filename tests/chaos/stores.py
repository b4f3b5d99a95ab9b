"""The Redis of a chaos run: one server that is killed and started again, or a master with replicas that fails over."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import redis

from giantleap.service.jobqueue.client import open_redis
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis, find_server
from tests.ports import free_ports

_UP_S = 60.0
SERVICE = "queue"
# Longer than a busy machine holds a process up, so that no sentinel calls a living master dead.
_DOWN_AFTER_MS = 3000


class Store(Protocol):
    """What a run needs of its Redis."""

    url: str

    def harm(self) -> None: ...

    def is_whole(self) -> bool: ...

    def stop(self) -> None: ...


class OneServer:
    """A server that syncs every write to disk before it answers."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._server = EmbeddedRedis(appendfsync="always")
        self.url = self._server.start(data_dir)
        self._port = int(self.url.rpartition(":")[2].removesuffix("/0"))

    def harm(self) -> None:
        """kill -9, and a start on the same files. Returns when the server answers again."""
        assert self._server.pid is not None
        os.kill(self._server.pid, signal.SIGKILL)
        deadline_s = time.monotonic() + _UP_S
        while self._server.is_alive():
            assert time.monotonic() < deadline_s, "the server outlives its kill"
            time.sleep(0.02)
        self._server.start(self._data_dir, self._port)

    def is_whole(self) -> bool:
        return self._server.is_alive()

    def stop(self) -> None:
        self._server.stop()


@dataclass
class Replicated:
    """A master, two replicas and three sentinels. The master takes writes only while a replica follows it."""

    root: Path
    killed_at_s: float = 0.0
    _servers: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    _sentinels: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def __post_init__(self) -> None:
        ports = free_ports(6)
        self._server_ports, self._sentinel_ports = ports[:3], ports[3:]
        self.url = (
            "redis+sentinel://" + ",".join(f"127.0.0.1:{port}" for port in self._sentinel_ports) + f"/{SERVICE}/0"
        )
        for port in self._server_ports:
            self._start_server(port)
        for port in self._server_ports:
            _await("a server answers", lambda port=port: _ask(port, "PING") is not None)  # type: ignore[misc]
        _await("two replicas follow", lambda: self._replicas(self._server_ports[0]) == 2)
        for port in self._sentinel_ports:
            self._start_sentinel(port)
        _await("every sentinel knows the others", lambda: all(map(self._knows_all, self._sentinel_ports)))

    def harm(self) -> None:
        """kill -9 of the master. Returns when the sentinels name another, a replica follows it, and it takes writes."""
        old = self._master()
        self.killed_at_s = time.monotonic()
        self._servers[old].kill()
        self._servers.pop(old).wait()
        _await("another master is named", lambda: self._master() not in (0, old))
        _await("a replica follows it", self.is_whole)

    def is_whole(self) -> bool:
        master = self._master()
        return master in self._servers and self._replicas(master) >= 1

    def stop(self) -> None:
        for process in (*self._sentinels, *self._servers.values()):
            process.kill()
            process.wait()

    def _start_server(self, port: int) -> None:
        directory = self.root / str(port)
        directory.mkdir(parents=True)
        options = {
            "bind": "127.0.0.1", "port": str(port), "dir": str(directory), "appendonly": "yes", "appendfsync": "always",
            "save": "", "min-replicas-to-write": "1", "min-replicas-max-lag": "10", "repl-diskless-sync-delay": "0",
        }  # fmt: skip
        command = [str(find_server()), *(part for name, value in options.items() for part in (f"--{name}", value))]
        if port != self._server_ports[0]:
            command += ["--replicaof", "127.0.0.1", str(self._server_ports[0])]
        self._servers[port] = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def _start_sentinel(self, port: int) -> None:
        config = self.root / f"sentinel-{port}.conf"
        config.write_text(
            f"bind 127.0.0.1\nport {port}\ndir {self.root}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {self._server_ports[0]} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} {_DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {SERVICE} 10000\n"
        )
        command = [str(find_server()), str(config), "--sentinel"]
        self._sentinels.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))

    def _master(self) -> int:
        """The port that a majority of the sentinels names; 0 where there is none."""
        named = [_ask(port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE) for port in self._sentinel_ports]
        ports = [int(address[1]) for address in named if isinstance(address, list)]
        return next((port for port in ports if ports.count(port) >= 2), 0)

    def _replicas(self, port: int) -> int:
        info = _ask(port, "INFO", "replication")
        return int(info.get("connected_slaves", 0)) if isinstance(info, dict) and info["role"] == "master" else 0

    def _knows_all(self, port: int) -> bool:
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError), _client(port) as client:
            state = client.sentinel_master(SERVICE)
            return bool(state["num-other-sentinels"] == 2 and state["num-slaves"] == 2)
        return False


def _client(port: int) -> redis.Redis:
    return redis.Redis(port=port, socket_timeout=2.0, socket_connect_timeout=2.0)


def _ask(port: int, *command: str) -> object:
    """The reply, or None where there is none."""
    with contextlib.suppress(redis.ConnectionError, redis.TimeoutError), _client(port) as client:
        return client.execute_command(*command)
    return None


def _await(what: str, is_true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _UP_S
    while not is_true():
        assert time.monotonic() < deadline_s, f"{what}: not within {_UP_S:.0f} s"
        time.sleep(0.1)


def open_store(store: Store) -> redis.Redis:
    """A client of its data, as the workers open it."""
    client = open_redis(store.url)
    assert isinstance(client, redis.Redis)
    return client
