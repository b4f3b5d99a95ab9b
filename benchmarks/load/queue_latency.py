"""Measure the queue alone: enqueue to result with an idle worker, and jobs per second while a backlog drains.

`python -m benchmarks.load.queue_latency` starts an embedded server for each `appendfsync` policy and one worker process
that does no work. It prints the figures with machine and versions and writes them to
`benchmarks/results/queue_latency.json`. On a busy machine run it under `chrt -f 10`.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Literal

import redis
from tqdm import tqdm

from benchmarks.processes import run_process
from giantleap.service.jobqueue.client import open_async_redis, open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import GenerateParams, Job, Priority, ResultFile
from giantleap.service.settings import Settings, read_settings
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis, find_bundled_server, find_system_server

RESULTS = Path(__file__).resolve().parents[1] / "results" / "queue_latency.json"
RESULT_BYTES = 64 * 1024
WARM_UP = 20


def make_job() -> Job:
    """Return a job."""
    params = GenerateParams("a red ball", "", 2, 256, 256, 4, 1.0, 7, 1, "png")
    return Job(str(uuid.uuid4()), "pocket", priority=Priority.HIGH, created_at_s=time.time(), params=params)


def settings_for(url: str) -> Settings:
    """Return the settings of this benchmark."""
    return read_settings(redis_url=url, key_prefix="bench", queue_limit=1_000_000, job_ttl_s=600)


def serve(url: str) -> None:
    """Run the worker process: complete each job at once with `RESULT_BYTES`, until killed."""
    blob = os.urandom(RESULT_BYTES)
    worker = JobConsumer(open_redis(url), settings_for(url), ["pocket"], "bench")
    worker.open()
    while True:
        for claim in worker.claim(8, 1.0):
            worker.complete(claim, [(ResultFile("image/png", len(blob)), blob)], {}, [])


async def measure_latency(producer: JobProducer, number: int, name: str) -> list[float]:
    """Return the sorted milliseconds from enqueue to result, one job at a time."""
    times_ms = []
    for n in tqdm(range(number + WARM_UP), desc=f"{name}: latency", leave=False):
        job = make_job()
        started_s = time.perf_counter()
        await producer.enqueue(job)
        record = await producer.wait(job.id, 30.0)
        blob = await producer.read_result(job.id, 0)
        if not record.state.final or blob is None:
            raise RuntimeError(f"job {job.id} gave no result")
        if n >= WARM_UP:
            times_ms.append(1000 * (time.perf_counter() - started_s))
    return sorted(times_ms)


async def measure_enqueue(producer: JobProducer, number: int) -> tuple[list[Job], float]:
    """Enqueue a backlog with 32 concurrent producers; returns it and the jobs per second."""
    jobs = [make_job() for _ in range(number)]
    started_s = time.perf_counter()

    async def enqueue(part: list[Job]) -> None:
        for job in part:
            await producer.enqueue(job)

    await asyncio.gather(*(enqueue(jobs[n::32]) for n in range(32)))
    return jobs, number / (time.perf_counter() - started_s)


async def measure_policy(url: str, name: str, number: int, backlog: int) -> dict[str, float]:
    """Measure one server and `appendfsync` policy."""
    command = [sys.executable, "-m", "benchmarks.load.queue_latency", "--serve", url]
    async with open_async_redis(url) as client:
        producer = JobProducer(client, settings_for(url))
        await producer.open()
        jobs, enqueued_per_s = await measure_enqueue(producer, backlog)
        with run_process(command):
            while (await producer.stats()).recent_job_median_s is None:
                await asyncio.sleep(0.005)
            before = sum((await producer.stats()).queued.values())
            started_s = time.perf_counter()
            await producer.wait(jobs[-1].id, 300.0)
            while (left := await producer.stats()).processing or sum(left.queued.values()):
                await asyncio.sleep(0.005)
            drained_per_s = before / (time.perf_counter() - started_s)
            times_ms = await measure_latency(producer, number, name)
        await producer.close()
    return {
        "enqueue_to_result_p50_ms": statistics.median(times_ms),
        "enqueue_to_result_p99_ms": times_ms[int(0.99 * (len(times_ms) - 1))],
        "enqueue_jobs_per_s": enqueued_per_s,
        "drain_jobs_per_s": drained_per_s,
    }


def main(number: int, backlog: int) -> None:
    """Measure every server and policy, print and write the JSON."""
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "real_time_scheduling": os.sched_getscheduler(0) == os.SCHED_FIFO,
        "load_average_before": os.getloadavg(),
        "python": platform.python_version(),
        "redis_py": redis.__version__,
        "jobs": {"latency": number, "warm_up": WARM_UP, "backlog": backlog, "result_bytes": RESULT_BYTES},
        "measured": {},
    }
    policies: tuple[Literal["always", "everysec"], ...] = ("always", "everysec")
    for server in (find_bundled_server(), find_system_server()):
        if server is None:
            continue
        for policy in policies:
            with tempfile.TemporaryDirectory() as data_dir:
                embedded = EmbeddedRedis(server, policy)
                url = embedded.start(Path(data_dir))
                with redis.Redis.from_url(url) as client:
                    info = client.info("server")
                    version = info.get("valkey_version", info["redis_version"])
                    name = f"{info.get('server_name', 'redis')} {version}, appendfsync {policy}"
                report["measured"][name] = asyncio.run(measure_policy(url, name, number, backlog))
                embedded.stop()
    report["load_average_after"] = os.getloadavg()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=300, help="jobs timed one at a time")
    parser.add_argument("--backlog", type=int, default=2000, help="jobs enqueued before the worker starts")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
    else:
        main(options.number, options.backlog)
