"""A job's deadline, by the clock of a real Redis: nothing is begun after it, and what runs is ended."""

import dataclasses
from typing import Any

import pytest
import redis

from giantleap.service.api.problems import from_job_error
from giantleap.service.errors import DeadlinePassed
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobs.job import Job, JobError, JobRecord, JobState, ResultFile
from giantleap.service.settings import Settings

PNG = ResultFile("image/png", 3)


def due(job: Job, after_s: float) -> Job:
    return dataclasses.replace(job, cancel_after_s=after_s)


def pass_deadline(client: redis.Redis, settings: Settings, job: Job) -> None:
    """Moves the deadline of a job into the past, without asking the producer, which would end the job."""
    keys = Keys(settings.key_prefix)
    assert client.hset(keys.job(job.id), "deadline_ms", 1) == 0, "it had a deadline"
    client.zadd(f"{keys.tag}:deadlines", {job.id: 1})


def assert_overdue(record: JobRecord | None) -> None:
    assert record is not None and record.state is JobState.FAILED and record.error is not None
    assert isinstance(from_job_error(record.error), DeadlinePassed)
    assert not record.error.retryable and not record.cancel_requested


async def test_a_queued_job_fails_at_its_deadline_and_its_waiter_wakes(open_producer: Any, make_job: Any) -> None:
    async with open_producer() as producer:
        job, other = due(make_job(), 0.3), make_job()
        await producer.enqueue(job, b"latent")
        await producer.enqueue(other)
        assert_overdue(await producer.wait(job.id, 60.0))
        assert [event.name async for event in producer.events(job.id)] == ["queued", "done"]
        stats = await producer.stats()
        assert (stats.blob_bytes, stats.dead_lettered) == (0, 0)
        left = await producer.get(other.id)
        assert left is not None and left.queue_position == 0 and left.deadline_left_s is None


async def test_a_job_past_its_deadline_is_never_claimed(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        late, live = due(make_job(), 600.0), due(make_job(), 600.0)
        await producer.enqueue(late)
        await producer.enqueue(live)
        pass_deadline(redis_client, settings, late)
        assert [claim.job for claim in open_consumer().claim(8, 1.0)] == [live]
        assert_overdue(await producer.get(late.id))


@pytest.mark.parametrize("end", ["finish", "fail", "cancel"])
async def test_work_that_ends_after_the_deadline_counts_for_nothing(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings, end: str
) -> None:
    async with open_producer() as producer:
        worker = open_consumer(visibility_timeout_s=30.0)
        job = due(make_job(), 600.0)
        await producer.enqueue(job, b"latent")
        [claim] = worker.claim(1, 1.0)
        assert worker.find_canceled([claim]) == set(), "nothing stops it before"
        pass_deadline(redis_client, settings, job)
        assert worker.find_canceled([claim]) == {job.id}, "seen at a step, before anyone else looked"
        if end == "finish":
            assert not worker.complete(claim, [(PNG, b"png")], {}, [])
        elif end == "fail":
            assert not worker.fail(claim, JobError("engine_fault", "lost device", retryable=True))
        else:
            assert worker.cancel(claim)
        assert_overdue(await producer.get(job.id))
        assert await producer.read_result(job.id, 0) is None
        assert redis_client.xlen(Keys(settings.key_prefix).stream("pocket:high")) == 0
        stats = await producer.stats()
        assert (stats.delayed, stats.processing, stats.blob_bytes) == (0, 0, 0)


async def test_a_running_job_of_a_worker_that_hangs_ends_at_its_deadline(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        worker = open_consumer(visibility_timeout_s=30.0)
        job = due(make_job(), 600.0)
        await producer.enqueue(job)
        [claim] = worker.claim(1, 1.0)
        pass_deadline(redis_client, settings, job)
        assert_overdue(await producer.wait(job.id, 60.0))
        worker.emit(claim, "step", {"step": 1, "steps": 4})
        assert [event.name async for event in producer.events(job.id)][-1] == "done", "nothing comes after it"
        assert not worker.complete(claim, [(PNG, b"png")], {}, [])
        assert_overdue(await producer.get(job.id))


async def test_a_job_that_ends_in_time_keeps_its_result(open_producer: Any, open_consumer: Any, make_job: Any) -> None:
    async with open_producer() as producer:
        job = due(make_job(), 600.0)
        await producer.enqueue(job)
        record = await producer.get(job.id)
        assert record is not None and record.deadline_left_s is not None and 500 < record.deadline_left_s <= 600
        worker = open_consumer()
        [claim] = worker.claim(1, 1.0)
        assert claim.job == job
        assert worker.complete(claim, [(PNG, b"png")], {}, [])
        record = await producer.get(job.id)
        assert record is not None and record.state is JobState.SUCCEEDED


async def test_a_deadline_whose_record_is_gone_stops_no_claim(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        job, deadlines = make_job(), f"{Keys(settings.key_prefix).tag}:deadlines"
        await producer.enqueue(job)
        redis_client.zadd(deadlines, {"no-such-job": 1})
        assert [claim.job for claim in open_consumer().claim(8, 1.0)] == [job]
        assert redis_client.zcard(deadlines) == 0
