"""Split pools on a real Redis: a drawn job goes to the finish queue once, with its latents, and ends there once."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import redis

from giantleap.models.worker_role import WorkerRole
from giantleap.service.errors import StorageFull
from giantleap.service.jobqueue.backpressure import retry_after_s
from giantleap.service.jobqueue.claims import BaseLatents, Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import Job, JobError, JobState, Priority, QueueStats, ResultFile, UpscaleParams
from giantleap.service.settings import Settings

PNG = ResultFile("image/png", 3, seed=7)
STAGES = {"generate": 1.5}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Leases that a stall of a busy machine does not outlast."""
    return settings.model_copy(update={"visibility_timeout_s": 20.0})


@pytest.fixture
def make_upscale(make_job: Any) -> Callable[..., Job]:
    def make(priority: Priority = Priority.HIGH) -> Job:
        job: Job = make_job(priority)
        return replace(job, params=UpscaleParams(2, "tiny", 1, 16, 4, 4, "image", "png"))

    return make


def take_one(worker: JobConsumer) -> Claim:
    [claim] = worker.claim(1, 5.0)
    return claim


def leftovers(client: redis.Redis, settings: Settings) -> list[str]:
    """What a queue without a live job must not hold."""
    tag = Keys(settings.key_prefix).tag
    streams = list(client.scan_iter(f"{tag}:stream:*"))
    left = [name.decode() for name in streams if client.xlen(name) or client.xpending(name, "workers")["pending"]]
    for short in ("running", "delayed", "queued:*", "live:*", "input:*", "deadlines"):
        left += [name.decode() for name in client.scan_iter(f"{tag}:{short}")]
    held = sum(len(blob) for name in client.scan_iter(f"{tag}:result:*") for blob in client.hvals(name))
    if held != int(client.get(f"{tag}:blob_bytes") or 0):
        left.append("blob_bytes")
    return left


async def test_a_drawn_job_is_finished_by_another_worker_with_all_that_the_first_knew(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        drawer, finisher = open_consumer(role=WorkerRole.GENERATE), open_consumer(role=WorkerRole.DECODE)
        job = make_job(Priority.LOW)
        await producer.enqueue(job, b"a picture to start from")
        assert finisher.claim(1, 0.0) == [], "nothing to finish yet"
        claim = take_one(drawer)
        assert (claim.body, claim.base_latents) == (b"a picture to start from", None)
        started_at_s = (await read(producer, job)).started_at_s
        assert drawer.transfer(claim, b"latents", STAGES, ["cut off"]) is JobState.QUEUED
        waiting = await read(producer, job)
        assert (waiting.state, waiting.stages, waiting.deliveries) == (JobState.QUEUED, STAGES, 0)
        assert waiting.queue_position == 0
        assert drawer.claim(1, 0.0) == [], "it draws nothing twice"
        second = take_one(finisher)
        assert (second.job, second.body, second.delivery) == (job, b"latents", 1)
        assert second.base_latents == BaseLatents(STAGES, ("cut off",))
        assert finisher.complete(second, [(PNG, b"png")], STAGES | {"decode": 0.5}, ["cut off"])
        ended = await read(producer, job)
        assert (ended.state, ended.warnings) == (JobState.SUCCEEDED, ("cut off",))
        assert ended.stages == {"generate": 1.5, "decode": 0.5}
        assert ended.started_at_s == started_at_s, "when work on it began"
        names = [event.name async for event in producer.events(job.id)]
        assert names == ["queued", "started", "queued", "started", "done"]
    assert leftovers(redis_client, settings) == []


async def read(producer: JobProducer, job: Job) -> Any:
    record = await producer.get(job.id)
    assert record is not None
    return record


async def test_what_needs_no_drawing_goes_to_the_finish_queue_once_there_is_one(
    open_producer: Any, open_consumer: Any, make_upscale: Any
) -> None:
    async with open_producer() as producer:
        early, late = make_upscale(), make_upscale()
        await producer.enqueue(early, b"latent 1")
        drawer, finisher = open_consumer(role=WorkerRole.GENERATE), open_consumer(role=WorkerRole.DECODE)
        await producer.enqueue(late, b"latent 2")
        assert take_one(finisher).job == late
        passed_on = take_one(drawer)
        assert passed_on.job == early, "it came before anybody had split the work"
        assert drawer.transfer(passed_on, None, {}, []) is JobState.QUEUED
        found = take_one(finisher)
        assert (found.job, found.body, found.base_latents) == (early, b"latent 1", None)


async def test_without_split_pools_there_is_no_finish_queue(
    open_producer: Any,
    open_consumer: Any,
    make_upscale: Any,
    make_job: Any,
    redis_client: redis.Redis,
    settings: Settings,
) -> None:
    async with open_producer() as producer:
        worker = open_consumer()
        jobs = [make_job(), make_upscale(), make_job()]
        for job in jobs:
            await producer.enqueue(job)
        assert [take_one(worker).job for _ in jobs] == jobs, "in the order in which they came"
    assert not list(redis_client.scan_iter(f"{Keys(settings.key_prefix).tag}:*+finish*"))


async def test_a_worker_of_all_stages_helps_both_halves(open_producer: Any, open_consumer: Any, make_job: Any) -> None:
    async with open_producer() as producer:
        drawer, whole = open_consumer(role=WorkerRole.GENERATE), open_consumer()
        jobs = [make_job() for _ in range(2)]
        for job in jobs:
            await producer.enqueue(job)
        drawer.transfer(take_one(drawer), b"latents", STAGES, [])
        claims = whole.claim(2, 5.0)
        assert {claim.job.id: claim.base_latents is None for claim in claims} == {
            jobs[0].id: False,
            jobs[1].id: True,
        }
        assert all(whole.complete(claim, [], {}, []) for claim in claims)


async def test_a_late_hand_over_writes_nothing(
    open_producer: Any,
    open_consumer: Any,
    make_job: Any,
    make_stale: Any,
    redis_client: redis.Redis,
    settings: Settings,
) -> None:
    async with open_producer() as producer:
        slow, quick = open_consumer(lease=False, role=WorkerRole.GENERATE), open_consumer(role=WorkerRole.GENERATE)
        finisher = open_consumer(role=WorkerRole.DECODE)
        job = make_job()
        await producer.enqueue(job)
        late = take_one(slow)
        make_stale(late)
        again = take_one(quick)
        assert again.delivery == 2
        assert slow.transfer(late, b"old", STAGES, []) is None
        assert quick.transfer(again, b"new", STAGES, []) is JobState.QUEUED
        assert quick.transfer(again, b"new", STAGES, []) is JobState.QUEUED, "a lost reply: sent again, done once"
        assert slow.transfer(late, b"old", STAGES, []) is None
        claim = take_one(finisher)
        assert claim.body == b"new" and finisher.claim(1, 0.0) == []
        assert not slow.complete(late, [(PNG, b"old")], {}, []) and not slow.fail(late, JobError("x", "y"))
        assert finisher.complete(claim, [(PNG, b"png")], {}, [])
        assert slow.transfer(late, b"old", STAGES, []) is None
        assert (await read(producer, job)).state is JobState.SUCCEEDED
    assert leftovers(redis_client, settings) == []


async def test_a_job_that_kills_whoever_finishes_it_is_dead_lettered_whatever_the_drawing_took(
    open_producer: Any,
    open_consumer: Any,
    make_job: Any,
    make_stale: Any,
    redis_client: redis.Redis,
    settings: Settings,
) -> None:
    async with open_producer() as producer:
        job = make_job()
        await producer.enqueue(job)
        for delivery in (1, 2, 3):
            claim = take_one(drawer := open_consumer(lease=False, role=WorkerRole.GENERATE))
            assert claim.delivery == delivery
            if delivery < 3:
                make_stale(claim)
        drawer.transfer(claim, b"latents", STAGES, [])
        for delivery in (1, 2, 3):
            claim = take_one(open_consumer(lease=False, role=WorkerRole.DECODE))
            assert (claim.delivery, claim.body) == (delivery, b"latents"), "the drawing is not done again"
            make_stale(claim)
        assert open_consumer(role=WorkerRole.DECODE).claim(1, 0.0) == []
        record = await read(producer, job)
        assert record.state is JobState.FAILED and record.error is not None and "3 times" in record.error.detail
        assert record.stages == STAGES, "what was done is not forgotten"
        assert (await producer.stats()).dead_lettered == 1
    assert leftovers(redis_client, settings) == []


async def test_a_retry_of_the_finish_waits_in_the_finish_queue(
    open_producer: Any, open_consumer: Any, make_job: Any
) -> None:
    async with open_producer() as producer:
        drawer, finisher = open_consumer(role=WorkerRole.GENERATE), open_consumer(role=WorkerRole.DECODE)
        await producer.enqueue(make_job())
        drawer.transfer(take_one(drawer), b"latents", STAGES, ["cut off"])
        assert finisher.fail(take_one(finisher), JobError("engine_fault", "lost device", retryable=True))
        again = take_one(finisher)
        assert (again.delivery, again.body, again.base_latents) == (
            2,
            b"latents",
            BaseLatents(STAGES, ("cut off",)),
        )
        finisher.release([again])
        assert take_one(finisher).delivery == 2


async def test_a_job_that_nobody_wants_any_more_ends_at_the_hand_over_or_while_it_waits(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        drawer, finisher = open_consumer(role=WorkerRole.GENERATE), open_consumer(role=WorkerRole.DECODE)
        running, waiting = make_job(), make_job()
        overdue = replace(make_job(), cancel_after_s=600.0)
        for job in (running, waiting, overdue):
            await producer.enqueue(job)
        claims = {claim.job.id: claim for claim in drawer.claim(3, 5.0)}
        await producer.cancel(running.id)
        assert drawer.transfer(claims[running.id], b"latents", STAGES, []) is JobState.CANCELED
        assert drawer.transfer(claims[waiting.id], b"latents", STAGES, []) is JobState.QUEUED
        await producer.cancel(waiting.id)
        redis_client.hset(Keys(settings.key_prefix).job(overdue.id), "deadline_ms", 1)
        assert drawer.transfer(claims[overdue.id], b"latents", STAGES, []) is None
        assert finisher.claim(3, 0.0) == []
        found = [await read(producer, job) for job in (running, waiting, overdue)]
        assert [record.state for record in found] == [JobState.CANCELED, JobState.CANCELED, JobState.FAILED]
        assert [record.stages for record in found[:2]] == [STAGES, STAGES]
    assert leftovers(redis_client, settings) == []


async def test_latents_count_in_the_byte_budget_in_place_of_the_input(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer(blob_budget_bytes=1000) as producer:
        drawer = open_consumer(role=WorkerRole.GENERATE, blob_budget_bytes=1000)
        finisher = open_consumer(role=WorkerRole.DECODE, blob_budget_bytes=1000)
        await producer.enqueue(make_job(), bytes(400))
        claim = take_one(drawer)
        with pytest.raises(StorageFull, match="1001 bytes"):
            drawer.transfer(claim, bytes(1001), STAGES, [])
        assert (await producer.stats()).blob_bytes == 400, "nothing was written"
        assert drawer.transfer(claim, bytes(1000), STAGES, []) is JobState.QUEUED
        assert (await producer.stats()).blob_bytes == 1000
        with pytest.raises(StorageFull):
            await producer.enqueue(make_job(), b"1")
        assert finisher.complete(take_one(finisher), [(PNG, bytes(10))], {}, [])
        assert (await producer.stats()).blob_bytes == 10
    assert leftovers(redis_client, settings) == []


async def test_the_limit_positions_and_times_count_both_queues(
    open_producer: Any, open_consumer: Any, make_job: Any
) -> None:
    async with open_producer(queue_limit=4) as producer:
        drawers, finisher = (
            [open_consumer(role=WorkerRole.GENERATE) for _ in range(2)],
            open_consumer(role=WorkerRole.DECODE),
        )
        jobs = [make_job() for _ in range(4)]
        for job in jobs:
            await producer.enqueue(job)
        first = [take_one(drawer) for drawer in drawers]
        for drawer, claim in zip(drawers, first, strict=True):
            drawer.transfer(claim, b"latents", STAGES, [])
        stats = await producer.stats()
        assert stats.queued[("pocket", Priority.HIGH)] == stats.queued[("pocket+finish", Priority.HIGH)] == 2
        assert (stats.processing, stats.generate_workers, stats.decode_workers) == (0, 2, 1)
        with pytest.raises(Exception, match="4 jobs"):
            await producer.enqueue(make_job())
        assert [(await read(producer, job)).queue_position for job in jobs] == [0, 1, 0, 1]
        claim = take_one(finisher)
        time.sleep(0.05)
        assert finisher.complete(claim, [], {}, [])
        stats = await producer.stats()
        finish_s, draw_s = stats.queue_median_s["pocket+finish"], stats.queue_median_s["pocket"]
        assert finish_s >= 0.05 and draw_s > 0
        await producer.enqueue(make_job())
        found = [await read(producer, job) for job in jobs]
        assert found[1].estimated_start_s == 0.0, "a finisher is free"
        assert found[3].estimated_start_s == 0.0, "two drawers are free, and one job is before it"


def test_retry_after_is_that_of_the_slower_half() -> None:
    medians = {"a": 30.0, "a+finish": 2.0}
    stats = QueueStats(
        {("a", Priority.HIGH): 4, ("a+finish", Priority.LOW): 10}, 0, 0, 0, 0.0, 32, 5, 9.0, 0, 1, medians
    )
    assert retry_after_s(stats) == (4 * 30 + 10 * 2) / 5, "without halves everybody does everything"
    assert retry_after_s(replace(stats, generate_workers=3, decode_workers=2)) == 40
    assert retry_after_s(replace(stats, generate_workers=4, decode_workers=1, queue_median_s={"a": 1.0})) == 90


async def test_a_worker_that_leaves_is_counted_in_no_half(open_producer: Any, open_consumer: Any) -> None:
    async with open_producer() as producer:
        worker = open_consumer(role=WorkerRole.DECODE)
        assert (await producer.stats()).decode_workers == 1
        worker.close()
        stats = await producer.stats()
        assert (stats.live_workers, stats.decode_workers) == (0, 0)


async def test_a_record_of_an_older_version_is_claimed_as_before(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        job = make_job()
        await producer.enqueue(job)
        assert b"part" not in redis_client.hgetall(Keys(settings.key_prefix).job(job.id))
        drawer = open_consumer(role=WorkerRole.GENERATE)
        assert take_one(drawer).job == job
