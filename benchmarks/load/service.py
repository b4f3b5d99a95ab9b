"""Start the systems that `benchmarks.load` measures: the service without work, or a peer's server.

The service is the one that `giantleap serve` gives on one host: an embedded Redis that syncs every write to disk before
its reply, results in files, `giantleap api`, and a process that claims and completes jobs as a worker does. A peer runs
in its own environment, requests in memory.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.processes import run_process
from giantleap.models.allocator import keep_freed_memory
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.job import ResultFile, UpscaleParams
from giantleap.service.jobs.media_types import SAFETENSORS_TYPE
from giantleap.service.results.jobs import open_files
from giantleap.service.settings import Settings, read_settings, to_environment
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis, free_port
from giantleap.service.supervisor.supervisor import to_child_settings

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".peers"
PEER_NAMES = ("litserve", "bentoml", "ray")
SPREAD = 0.2
PARTS = ("api", "worker", "redis")
_START_TIMEOUT_S = 120.0


@contextlib.contextmanager
def run_service(workers: int = 1, work_ms: float = 0.0, **changes: object) -> Iterator[int]:
    """Run the service; yields its port.

    Args:
        workers: Threads that each run one job at a time.
        work_ms: Time that a job sleeps in its worker, plus or minus `SPREAD`.
        **changes: Settings.
    """
    with contextlib.ExitStack() as stack:
        data_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="giantleap-load-")))
        redis = EmbeddedRedis(appendfsync="always")
        stack.callback(redis.stop)
        settings = to_child_settings(
            read_settings(data_dir=data_dir, key_prefix="load", port=free_port(), **changes),
            redis.start(data_dir),
            is_embedded=True,
        )
        environment = {**os.environ, **to_environment(settings)}
        api = [sys.executable, "-m", "giantleap", "api"]
        worker = [sys.executable, "-m", "benchmarks.load.service", str(workers), str(work_ms)]
        started = [stack.enter_context(run_server(command, environment)) for command in (api, worker)]
        await_answer(started, settings.port, "/readyz")
        yield settings.port


@contextlib.contextmanager
def run_peer(name: str) -> Iterator[int]:
    """Run a peer's no-op server (`benchmarks/peers/`); yields its port.

    Raises:
        FileNotFoundError: The peer is not installed.
    """
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL"))}
    command = [str(peer_python(name)), str(ROOT / "benchmarks" / "peers" / f"{name}_noop.py"), str(port)]
    with run_server(command, environment) as process:
        await_answer([process], port, "/noop", b'{"prompt": "a red sphere"}')
        yield port


def peer_python(name: str) -> Path:
    """Return the interpreter of a peer's environment.

    Raises:
        FileNotFoundError: The peer is not installed.
    """
    python = PEERS / name / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{name} is not installed in {PEERS}: run `make peers`, or omit --peers")
    return python


@contextlib.contextmanager
def run_server(
    command: list[str], environment: dict[str, str], directory: Path = ROOT
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server; the end of its output is shown only if the block fails."""
    with (
        tempfile.TemporaryFile() as output,
        run_process(command, environment=environment, directory=directory, output=output) as process,
    ):
        try:
            yield process
        except Exception:
            output.seek(0)
            sys.stderr.write(output.read().decode(errors="replace")[-4000:])
            raise


def await_answer(processes: list["subprocess.Popen[bytes]"], port: int, path: str, body: bytes | None = None) -> None:
    """Wait until the path returns 200.

    Raises:
        RuntimeError: One of the processes has ended.
        TimeoutError: There is no such response within two minutes.
    """
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, {"Content-Type": "application/json"})
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if any(process.poll() is not None for process in processes):
            raise RuntimeError(f"a process of the server at port {port} ended before it answered")
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(request, timeout=10):
            return
        time.sleep(0.1)
    raise TimeoutError(f"no 200 from {path} at port {port} within {_START_TIMEOUT_S:.0f} s")


def used_cpu_s(root: psutil.Process | None = None) -> dict[str, float]:
    """Return the processor seconds of all live processes below `root`, by part of the service."""
    used_s = dict.fromkeys(PARTS, 0.0)
    for process in (root or psutil.Process()).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used_s[part_of(process.cmdline())] += times.user + times.system
    return used_s


def part_of(command: list[str]) -> str:
    """Return which of `PARTS` a process is, by its command line."""
    if any("redis" in word or "valkey" in word for word in command[:4]):
        return "redis"
    return "worker" if "benchmarks.load.service" in command else "api"


def work(settings: Settings, workers: int, work_ms: float) -> None:
    """Run the worker process: complete each job after `work_ms`; a latent returns as many bytes as its tensor had."""
    assert settings.redis_url is not None
    bundle = "pocket"
    blobs = {size_bytes: os.urandom(size_bytes) for size_bytes in (131_040, 524_256, 2_097_120)}

    def run() -> None:
        dice = random.Random(uuid.uuid4().hex)
        consumer = JobConsumer(
            open_redis(settings.redis_url or ""),
            settings,
            (bundle,),
            f"load-{uuid.uuid4().hex[:8]}",
            files=open_files(settings),
        )
        consumer.open()
        while True:
            for claim in consumer.claim(1 if work_ms else 8, 1.0):
                if work_ms:
                    time.sleep(work_ms * dice.uniform(1 - SPREAD, 1 + SPREAD) / 1000)
                consumer.complete(claim, to_results(claim, blobs), {}, ())

    threads = [threading.Thread(target=run) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def to_results(claim: Claim, blobs: dict[int, bytes]) -> list[tuple[ResultFile, bytes]]:
    """Return the results of a claim: none for a prompt, as many bytes as the float16 input for a latent."""
    params = claim.job.params
    if not isinstance(params, UpscaleParams):
        return []
    blob = blobs[2 * params.batch_items * params.channels * params.latent_height * params.latent_width]
    return [(ResultFile(SAFETENSORS_TYPE, len(blob)), blob)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A worker that does no work; settings come from the environment.")
    parser.add_argument("workers", type=int)
    parser.add_argument("work_ms", type=float)
    options = parser.parse_args()
    keep_freed_memory()
    work(read_settings(), options.workers, options.work_ms)
