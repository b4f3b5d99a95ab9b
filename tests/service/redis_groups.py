"""Groups of real Redis servers for tests: a cluster of three, a master and replica under three sentinels."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from giantleap.service.supervisor.embedded_redis import find_server
from tests.ports import free_ports
from tests.waiting import wait_until

SLOTS = 16384


class Server:
    """One server process on loopback, with its files in a directory of its own."""

    def __init__(self, directory: Path, port: int, *options: str, sentinel: bool = False) -> None:
        self.port = port
        self.client = redis.Redis(port=port, socket_timeout=10.0, decode_responses=True)
        directory.mkdir(parents=True)
        self._directory = directory
        lines = [f"port {port}", "bind 127.0.0.1", f'dir "{directory}"', *options]
        if not sentinel:
            lines += ["appendonly yes", "appendfsync everysec", 'save ""']
        (directory / "redis.conf").write_text("\n".join(lines) + "\n")
        self._sentinel = sentinel
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = [str(find_server()), "redis.conf", *(["--sentinel"] if self._sentinel else [])]
        with (self._directory / "log").open("ab") as log:
            self.process = subprocess.Popen(arguments, cwd=self._directory, stdout=log, stderr=log)
        wait_until(self._answers, f"the server on port {self.port} answers")

    def kill(self) -> None:
        """As a power cut would: nobody is notified."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False


@contextmanager
def cluster(directory: Path) -> Iterator[list[Server]]:
    """Three masters that share the slots in thirds; no replicas."""
    options = ("cluster-enabled yes", "cluster-node-timeout 5000")
    nodes = [Server(directory / f"node-{port}", port, *options) for port in free_ports(3)]
    try:
        for number, node in enumerate(nodes):
            node.start()
            node.client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            share = range(number * SLOTS // 3, (number + 1) * SLOTS // 3)
            node.client.execute_command("CLUSTER", "ADDSLOTS", *share)
        for node in nodes[1:]:
            nodes[0].client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port)
        for node in nodes:
            wait_until(lambda node=node: is_whole(node), "each node knows every slot's owner")  # type: ignore[misc]
        yield nodes
    finally:
        for node in nodes:
            node.kill()


def is_whole(node: Server) -> bool:
    info = node.client.execute_command("CLUSTER", "INFO")
    text = info if isinstance(info, dict) else dict(line.split(":") for line in info.split())
    return bool(text["cluster_state"] == "ok" and text["cluster_known_nodes"] == "3")


@contextmanager
def sentinels(directory: Path, *master_options: str) -> Iterator[tuple[Server, Server, list[Server]]]:
    """A master, its replica and three sentinels of which two must agree; a master silent for 2 s is replaced."""
    ports = free_ports(5)
    master = Server(directory / "master", ports[0], *master_options)
    replica = Server(directory / "replica", ports[1], f"replicaof 127.0.0.1 {ports[0]}", *master_options)
    watch = (
        f"sentinel monitor jobs 127.0.0.1 {ports[0]} 2",
        "sentinel down-after-milliseconds jobs 2000",
        "sentinel failover-timeout jobs 10000",
    )
    watchers = [Server(directory / f"sentinel-{port}", port, *watch, sentinel=True) for port in ports[2:]]
    try:
        for server in (master, replica):
            server.start()
        wait_until(lambda: master.client.info("replication")["connected_slaves"] == 1, "the replica follows")
        wait_until(lambda: replica.client.info("replication")["master_link_status"] == "up", "the replica is in step")
        for server in watchers:
            server.start()
        for server in watchers:
            wait_until(lambda server=server: _sees_all(server), "the sentinels know each other")  # type: ignore[misc]
        yield master, replica, watchers
    finally:
        for server in (master, replica, *watchers):
            server.kill()


def _sees_all(server: Server) -> bool:
    flat = server.client.execute_command("SENTINEL", "MASTER", "jobs")
    state = flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))
    return int(state["num-slaves"]) == 1 and int(state["num-other-sentinels"]) == 2
