"""A hung step ends its worker, not a slow one; a live worker ends in order on SIGTERM and hard when it hangs."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from giantleap.models.filters.chain import FilterChain
from giantleap.service.errors import EXIT_HUNG
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import JobState
from giantleap.service.settings import Settings, read_settings
from giantleap.service.telemetry.tracing import Tracing
from giantleap.service.worker.batch_runner import BatchRun
from giantleap.service.worker.drain import Drain
from giantleap.service.worker.items import to_items
from giantleap.service.worker.watchdog import Watchdog
from tests.service.fakes import GENERATE, FakeConsumer, FakeRoute, make_claim, open_worker

ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).parents[1] / "route_worker.py"
TIMEOUT_S = 90.0

StartWorker = Callable[..., "subprocess.Popen[str]"]


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_only_an_old_mark_ends_the_process(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    codes: list[int] = []
    watchdog = Watchdog(10.0, codes.append, clock)
    clock.now_s += 1000
    assert not watchdog.check(), "nothing ran yet: loading and warming up may take as long as they need"
    watchdog.progress("generate", ["b", "a"])
    clock.now_s += 10
    assert not watchdog.check()
    watchdog.progress("generate", ["b", "a"])
    clock.now_s += 10.5
    with caplog.at_level(logging.CRITICAL):
        assert watchdog.check() and codes == [EXIT_HUNG]
    assert caplog.records[0].fields == {"stage": "generate", "job_ids": ["a", "b"], "limit_s": 10.0}  # type: ignore[attr-defined]
    watchdog.pause()
    clock.now_s += 1000
    assert not watchdog.check() and codes == [EXIT_HUNG]


def test_the_thread_looks_by_itself() -> None:
    ended = threading.Event()
    watchdog = Watchdog(0.05, lambda code: ended.set())
    watchdog.open()
    watchdog.progress("decode", ["a"])
    assert ended.wait(TIMEOUT_S)
    watchdog.close()


class Marks(Watchdog):
    def __init__(self) -> None:
        super().__init__(1.0)
        self.seen: list[str] = []

    def progress(self, stage: str, job_ids: Any) -> None:
        assert list(job_ids) == ["a"]
        self.seen.append(stage)


def test_every_stage_and_step_is_progress() -> None:
    marks, consumer = Marks(), FakeConsumer()
    drain = Drain(threading.Event(), 0)
    with Tracing().batch([], {}) as trace:
        run = BatchRun(FakeRoute(), consumer, drain, trace, marks, FilterChain())  # type: ignore[arg-type]
        run.run(to_items([make_claim("a", GENERATE)]), 8)
    assert marks.seen == ["generate"] * (1 + GENERATE.steps) + ["upscale", "decode", "encode"]


def test_a_worker_that_waits_for_work_is_not_hung() -> None:
    clock = Clock()
    codes: list[int] = []
    watchdog = Watchdog(10.0, codes.append, clock)

    def check(step: int) -> None:
        watchdog.check()

    stop = threading.Event()
    consumer, route = FakeConsumer([make_claim("a")], on_empty=stop.set), FakeRoute(on_step=check)
    worker, _ = open_worker(route, consumer, read_settings(), watchdog=watchdog, stop=stop)
    worker.run()
    assert list(consumer.finished) == ["a"]
    clock.now_s += 1000
    assert not watchdog.check() and not codes


def test_a_redis_that_answers_slowly_is_not_a_hung_step() -> None:
    """Each call is bounded on its own; a batch of many jobs makes many between two marks."""
    clock = Clock()
    codes: list[int] = []
    watchdog = Watchdog(60.0, codes.append, clock)

    class SlowConsumer(FakeConsumer):
        def emit(self, *event: Any) -> None:
            clock.now_s += 50
            assert not watchdog.check()

        def find_canceled(self, claims: Any) -> set[str]:
            clock.now_s += 50
            assert not watchdog.check()
            return set()

    drain, consumer = Drain(threading.Event(), 0), SlowConsumer()
    with Tracing().batch([], {}) as trace:
        run = BatchRun(FakeRoute(), consumer, drain, trace, watchdog, FilterChain())  # type: ignore[arg-type]
        run.run(to_items([make_claim(name, GENERATE) for name in "abc"]), 8)
    assert not codes


@pytest.fixture
def start_worker(settings: Settings, redis_url: str) -> Iterator[StartWorker]:
    started: list[subprocess.Popen[str]] = []

    def start(limit_s: float, grace_s: float) -> "subprocess.Popen[str]":
        command = [sys.executable, str(WORKER), redis_url, settings.key_prefix, str(limit_s), str(grace_s)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for worker in started:
        worker.kill()
        worker.communicate()


async def started(producer: JobProducer, job_id: str) -> None:
    """Wait until generation runs: a job that is only claimed when SIGTERM comes goes back to the queue."""
    async with asyncio.timeout(TIMEOUT_S):
        async for event in producer.events(job_id):
            if event.name == "step":
                return


async def test_a_hung_worker_ends_itself_and_its_job_goes_to_the_dead_letters(
    open_producer: Any, make_job: Any, start_worker: StartWorker, open_consumer: Any
) -> None:
    job = make_job(prompt="hang, a secret")
    async with open_producer() as producer:
        await producer.enqueue(job)
        worker = start_worker(limit_s=0.5, grace_s=0)
        _, log = await asyncio.to_thread(worker.communicate, timeout=TIMEOUT_S)
        assert worker.returncode == EXIT_HUNG
        assert "no progress" in log and job.id in log and '"generate"' in log and "secret" not in log
        record = await producer.get(job.id)
        assert record.state is JobState.PROCESSING and record.deliveries == 1
        heir: JobConsumer = open_consumer(max_deliveries=1, visibility_timeout_s=2.0)
        deadline_s = time.monotonic() + TIMEOUT_S
        while not (await producer.get(job.id)).state.final:
            assert time.monotonic() < deadline_s
            assert await asyncio.to_thread(heir.claim, 1, 0.2) == []
        record = await producer.get(job.id)
        assert record.state is JobState.FAILED and "its worker was lost" in record.error.detail
        assert (await producer.stats()).dead_lettered == 1


@pytest.mark.parametrize(
    ("prompt", "steps", "grace_s", "state"), [("patient", 4, 60.0, "succeeded"), ("long", 10_000, 0.2, "queued")]
)
async def test_sigterm_finishes_or_releases_and_exits_with_zero(
    prompt: str, steps: int, grace_s: float, state: str, open_producer: Any, make_job: Any, start_worker: StartWorker
) -> None:
    running, waiting = make_job(prompt=prompt, steps=steps), make_job()
    async with open_producer() as producer:
        await producer.enqueue(running)
        await producer.enqueue(waiting)
        worker = start_worker(limit_s=600, grace_s=grace_s)
        await started(producer, running.id)
        worker.send_signal(signal.SIGTERM)
        _, log = await asyncio.to_thread(worker.communicate, timeout=TIMEOUT_S)
        assert worker.returncode == 0, log
        record, left = await producer.get(running.id), await producer.get(waiting.id)
        assert str(record.state) == state and record.deliveries == (1 if state == "succeeded" else 0)
        assert left.state is JobState.QUEUED and left.deliveries == 0, "nothing new was begun"
        assert (await producer.stats()).live_workers == 0
