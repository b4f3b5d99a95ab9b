"""What must hold when things break: workers killed, long and blocking work, poison, and Redis itself killed."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import redis

from giantleap.service.errors import NotReady
from giantleap.service.jobqueue.client import open_async_redis
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import Job, JobState
from giantleap.service.settings import Settings
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis

ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).parents[1] / "fake_worker.py"

StartWorker = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start_worker(settings: Settings, redis_url: str) -> Iterator[StartWorker]:
    """Starts fake workers, with the test's own server and keys by default; kills those that are left."""
    started: list[subprocess.Popen[bytes]] = []

    def start(url: str = redis_url, visibility_s: float = 1.0) -> "subprocess.Popen[bytes]":
        command = [sys.executable, str(WORKER), url, settings.key_prefix, str(visibility_s)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(command, env=environment, cwd=ROOT))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()
        worker.wait()


async def enqueue_all(open_producer: Any, jobs: list[Job]) -> None:
    async with open_producer() as producer:
        for job in jobs:
            await producer.enqueue(job)


async def final_states(open_producer: Any, jobs: list[Job], within_s: float) -> list[JobState]:
    async with open_producer() as producer:
        return [record.state for record in await asyncio.gather(*(producer.wait(job.id, within_s) for job in jobs))]


class Log:
    """What the fake workers noted, and what the events say."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._client = client
        self._key = f"{settings.key_prefix}-log"
        self._keys = Keys(settings.key_prefix)

    def count(self, what: str) -> Counter[str]:
        notes: list[Any] = self._client.lrange(self._key, 0, -1)
        lines = [line.decode().split() for line in notes]
        return Counter(job_id for name, job_id, _ in lines if name == what)

    def wait_for_count(self, what: str, number: int, within_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + within_s
        while self.count(what).total() < number:
            assert time.monotonic() < deadline_s, f"{what}: {self.count(what).total()} of {number}"
            time.sleep(0.02)

    def wait_for_starts(self, job: Job, number: int, within_s: float = 20.0) -> None:
        deadline_s = time.monotonic() + within_s
        while self.count("start")[job.id] < number:
            assert time.monotonic() < deadline_s, f"{self.count('start')[job.id]} of {number} starts"
            time.sleep(0.02)

    def done_events(self, job: Job) -> int:
        entries: Any = self._client.xrange(self._keys.events(job.id))
        return sum(fields[b"name"] == b"done" for _, fields in entries)


@pytest.fixture
def log(redis_client: redis.Redis, settings: Settings) -> Log:
    return Log(redis_client, settings)


def sleeps(make_job: Any, number: int, milliseconds: int) -> list[Job]:
    return [make_job(negative_prompt="sleep", steps=milliseconds) for _ in range(number)]


async def test_job_of_a_killed_worker_is_finished_once_by_another(
    open_producer: Any,
    make_job: Any,
    start_worker: StartWorker,
    log: Log,
    redis_client: redis.Redis,
    settings: Settings,
) -> None:
    [job] = jobs = sleeps(make_job, 1, 800)
    await enqueue_all(open_producer, jobs)
    victim = start_worker()
    log.wait_for_count("start", 1)
    heir = start_worker()
    victim.kill()
    assert await final_states(open_producer, jobs, 200.0) == [JobState.SUCCEEDED]
    assert log.count("start") == {job.id: 2}
    assert log.done_events(job) == 1
    assert redis_client.hgetall(Keys(settings.key_prefix).result(job.id)) == {b"0": f"{job.id} by {heir.pid}".encode()}


async def test_twenty_jobs_all_finish_once_though_the_worker_is_killed_in_the_middle(
    open_producer: Any, make_job: Any, start_worker: StartWorker, log: Log
) -> None:
    jobs = sleeps(make_job, 20, 60)
    await enqueue_all(open_producer, jobs)
    victim = start_worker()
    log.wait_for_count("start", 8)
    victim.kill()
    victim.wait()
    start_worker()
    assert await final_states(open_producer, jobs, 200.0) == [JobState.SUCCEEDED] * 20
    assert [log.done_events(job) for job in jobs] == [1] * 20
    starts = log.count("start")
    assert set(starts) == {job.id for job in jobs}
    assert starts.total() <= 21, "only the job that was killed ran twice"


async def test_no_job_runs_twice_between_processes(
    open_producer: Any, make_job: Any, start_worker: StartWorker, log: Log
) -> None:
    jobs = sleeps(make_job, 90, 2)
    for _ in range(3):
        start_worker(visibility_s=10.0)  # a busy machine may hold a process up for a second
    await enqueue_all(open_producer, jobs)
    assert await final_states(open_producer, jobs, 200.0) == [JobState.SUCCEEDED] * 90
    log.wait_for_count("end", 90)
    assert log.count("start") == log.count("end") == Counter(job.id for job in jobs)


@pytest.mark.parametrize(("kind", "visibility_s"), [("sleep", 2.0), ("compute", 2.0), ("hold-gil", 3.0)])
async def test_work_longer_than_the_visibility_timeout_runs_once(
    kind: str, visibility_s: float, open_producer: Any, make_job: Any, start_worker: StartWorker, log: Log
) -> None:
    """C calls that hold the GIL one after the other delay a heartbeat by several of them: each is a sixth here."""
    job = make_job(negative_prompt=kind, steps=int(2300 * visibility_s))
    await enqueue_all(open_producer, [job])
    start_worker(visibility_s=visibility_s)
    start_worker(visibility_s=visibility_s)
    assert await final_states(open_producer, [job], 200.0) == [JobState.SUCCEEDED]
    assert log.count("start") == {job.id: 1}
    assert log.done_events(job) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sleep", "compute", "hold-gil"])
async def test_work_of_16_s_under_5_s_visibility_runs_once(
    kind: str, open_producer: Any, make_job: Any, start_worker: StartWorker, log: Log
) -> None:
    job = make_job(negative_prompt=kind, steps=16_000)
    await enqueue_all(open_producer, [job])
    start_worker(visibility_s=5.0)
    start_worker(visibility_s=5.0)
    assert await final_states(open_producer, [job], 200.0) == [JobState.SUCCEEDED]
    assert log.count("start") == {job.id: 1}


async def test_job_that_kills_its_worker_each_time_is_capped_and_the_queue_goes_on(
    open_producer: Any,
    make_job: Any,
    start_worker: StartWorker,
    log: Log,
    redis_client: redis.Redis,
    settings: Settings,
) -> None:
    poison = make_job(negative_prompt="die")
    healthy = sleeps(make_job, 3, 10)
    await enqueue_all(open_producer, [poison, *healthy])
    for start in range(1, settings.max_deliveries + 1):
        start_worker()
        log.wait_for_starts(poison, start)
    start_worker()
    states = await final_states(open_producer, [poison, *healthy], 200.0)
    assert states == [JobState.FAILED, *[JobState.SUCCEEDED] * 3]
    assert log.count("start")[poison.id] == settings.max_deliveries
    letters: Any = redis_client.xrange(Keys(settings.key_prefix).dead)
    [(_, letter)] = letters
    assert letter[b"job"].decode() == poison.id
    assert b"its worker was lost" in letter[b"error"]


async def wait_until_empty(producer: JobProducer, within_s: float = 30.0) -> None:
    """A canceled producer leaves jobs that landed without its knowing: they end after the last one it knows of."""
    deadline_s = time.monotonic() + within_s
    while (left := await producer.stats()) and left.processing + left.delayed + sum(left.queued.values()):
        assert time.monotonic() < deadline_s, f"left in the queue: {left}"
        await asyncio.sleep(0.05)


class Load:
    """Enqueues jobs without pause and keeps the time at which each was acknowledged."""

    def __init__(self, producer: JobProducer, make_job: Any) -> None:
        self._producer = producer
        self._make_job = make_job
        self.acknowledged_s: dict[str, float] = {}
        self.refused = 0
        self.stopping = False  # a flag, not a cancel: redis-py 8.1 swallows a cancel that meets it while it connects

    async def run(self) -> None:
        while not self.stopping:
            job = self._make_job(negative_prompt="sleep", steps=1)
            try:
                await self._producer.enqueue(job)
                self.acknowledged_s[job.id] = time.monotonic()
            except NotReady:
                self.refused += 1
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("appendfsync", ["always", "everysec"])
async def test_killed_redis_comes_back_with_everything_it_promised(
    appendfsync: Literal["always", "everysec"],
    make_job: Any,
    start_worker: StartWorker,
    settings: Settings,
    tmp_path: Path,
) -> None:
    """With `always`, each acknowledged job. With `everysec`, each one acknowledged two seconds before the kill."""
    server = EmbeddedRedis(appendfsync=appendfsync)
    url = server.start(tmp_path)
    port = int(url.rpartition(":")[2].removesuffix("/0"))
    changed = settings.model_copy(update={"redis_url": url, "queue_limit": 100_000, "job_ttl_s": 600})

    start_worker(url)
    start_worker(url)
    try:
        async with open_async_redis(url) as client:
            producer = JobProducer(client, changed)
            await producer.open()
            load = Load(producer, make_job)
            loads = [asyncio.create_task(load.run()) for _ in range(3)]
            await asyncio.sleep(0.8 if appendfsync == "always" else 2.8)
            waiting = asyncio.create_task(producer.wait(list(load.acknowledged_s)[-1], 60.0))
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            killed_s = time.monotonic()
            before = set(load.acknowledged_s)
            while server.is_alive():
                await asyncio.sleep(0.05)
            await asyncio.to_thread(server.start, tmp_path, port)
            await asyncio.sleep(0.5)
            load.stopping = True
            await asyncio.gather(*loads)
            safe_s = killed_s if appendfsync == "always" else killed_s - 2.0
            promised = [job for job, s in load.acknowledged_s.items() if s < safe_s or job not in before]
            assert len(promised) > 30
            assert set(load.acknowledged_s) - before, "the producer went on after the restart"
            for job_id in promised:
                record = await producer.wait(job_id, 60.0)
                assert record.state is JobState.SUCCEEDED
                events = [event.name async for event in producer.events(job_id)]
                assert events.count("done") == 1
                assert (await producer.read_result(job_id, 0) or b"").startswith(job_id.encode())
            assert (await waiting).state is JobState.SUCCEEDED, "a waiter outlives the outage"
            await wait_until_empty(producer)
            await producer.close()
    finally:
        server.stop()
