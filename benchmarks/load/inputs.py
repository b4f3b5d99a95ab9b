"""Measure from which size on an input costs less in a file than in Redis.

`python -m benchmarks.load.inputs` passes jobs through the real queue, one at a time: enqueued with an input, claimed
with it, completed. Inputs lie in Redis and in files in turn, below the directory of temporary files. It prints by size
the processor time per job of this process and of Redis together, and the time that passed. On a busy machine read the
processor times and the shortest times.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.load.run import machine
from giantleap.service.jobqueue.client import open_async_redis, open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import Job, Priority, UpscaleParams
from giantleap.service.results.concurrent import AsyncResultStore
from giantleap.service.results.files import FileStore
from giantleap.service.results.jobs import JobFiles
from giantleap.service.settings import Settings, read_settings
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis

SIZES_KIB = (32, 64, 128, 256, 512, 1024, 2048, 4096)
PLACES = {"Redis": 1 << 40, "file": 1}
"""Where inputs lie, and from which size on they would lie in a file."""


def make_job() -> Job:
    """Return a job that enlarges a latent; its input is not looked at."""
    params = UpscaleParams(2, "pocket", 1, 24, 32, 32, "latent", "png")
    return Job(str(uuid.uuid4()), "pocket", priority=Priority.HIGH, created_at_s=time.time(), params=params)


async def run_job(producer: JobProducer, consumer: JobConsumer, body: bytes) -> None:
    """Pass one job through the queue."""
    await producer.enqueue(make_job(), body)
    (claim,) = consumer.claim(1, 10.0)
    if claim.body != body:
        raise RuntimeError("the worker did not receive the input that was sent")
    consumer.complete(claim, [], {}, ())


async def measure(settings: Settings, server: psutil.Process, seconds: float) -> None:
    """Measure every size and print its row."""
    root = Path(settings.data_dir)
    async with open_async_redis(settings.redis_url or "") as client:
        stores = {place: FileStore(root / "results", "inputs", least) for place, least in PLACES.items()}
        files = {place: AsyncResultStore(store, settings.max_body_bytes) for place, store in stores.items()}
        producers = {place: JobProducer(client, settings, each) for place, each in files.items()}
        consumer = JobConsumer(
            open_redis(settings.redis_url or ""),
            settings,
            ["pocket"],
            "inputs",
            files=JobFiles(stores["file"], settings),
        )
        consumer.open()
        print("| KiB | place | CPU ms | median ms | shortest ms | jobs |\n|---|---|---|---|---|---|")
        for size_kib in SIZES_KIB:
            body = os.urandom(size_kib << 10)
            times_ms: dict[str, list[float]] = {place: [] for place in PLACES}
            cpu_ms = dict.fromkeys(PLACES, 0.0)
            end_s = time.monotonic() + seconds
            for place in itertools.cycle(PLACES):
                if time.monotonic() >= end_s:
                    break
                before_ms, started_s = _cpu_ms(server), time.perf_counter()
                for _ in range(10):  # the clock of a process ticks every 10 ms
                    await run_job(producers[place], consumer, body)
                    times_ms[place].append(1000 * (time.perf_counter() - started_s))
                    started_s = time.perf_counter()
                cpu_ms[place] += _cpu_ms(server) - before_ms
            for place, times in times_ms.items():
                print(f"| {size_kib} | {place} | {_row(cpu_ms[place], times)} |", flush=True)
        consumer.close()
        for each in files.values():
            each.close()


def _cpu_ms(server: psutil.Process) -> float:
    times = server.cpu_times()
    return 1000 * float(time.process_time() + times.user + times.system)


def _row(cpu_ms: float, times_ms: Sequence[float]) -> str:
    return f"{cpu_ms / len(times_ms):.2f} | {statistics.median(times_ms):.2f} | {min(times_ms):.2f} | {len(times_ms)}"


def main() -> None:
    """Start Redis, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each size")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(prefix="giantleap-inputs-") as directory:
        redis = EmbeddedRedis(appendfsync="always")
        try:
            url = redis.start(Path(directory))
            settings = read_settings(redis_url=url, key_prefix="inputs", data_dir=Path(directory), job_ttl_s=60)
            asyncio.run(measure(settings, psutil.Process(redis.pid), options.seconds))
        finally:
            redis.stop()


if __name__ == "__main__":
    main()
