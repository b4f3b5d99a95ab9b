"""Jobs of one API key in the queue: how many may be live, how fast they may come, and whose an idempotency key is."""

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import redis

from giantleap.service.errors import InvalidRequest, TooManyJobs
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobs.job import Job, JobError
from giantleap.service.settings import Settings

JobMaker = Callable[..., Job]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"visibility_timeout_s": 30.0})  # a stall of the machine must lose no claim


@pytest.fixture
def own(make_job: JobMaker) -> JobMaker:
    def make(owner: str, **rest: Any) -> Job:
        return dataclasses.replace(make_job(**rest), owner=owner)

    return make


def live_count(client: redis.Redis, settings: Settings, owner: str) -> int:
    return int(client.scard(f"{Keys(settings.key_prefix).tag}:live:{owner}"))


async def test_the_limit_of_live_jobs_is_exact_under_32_concurrent_requests(open_producer: Any, own: JobMaker) -> None:
    async with open_producer() as producer:
        tries = [producer.enqueue(own("alice"), None, None, 5) for _ in range(32)]
        tries += [producer.enqueue(own("bob"), None, None, 2) for _ in range(8)]
        done = await asyncio.gather(*tries, return_exceptions=True)
    refused = [error for error in done if isinstance(error, BaseException)]
    assert all(isinstance(error, TooManyJobs) and (error.retry_after_s or 0) >= 1 for error in refused)
    assert len(refused) == 32 - 5 + 8 - 2
    assert sum(isinstance(error, TooManyJobs) for error in done[:32]) == 27, "each owner has a limit of its own"


@pytest.mark.parametrize("end", ["finish", "fail", "cancel queued", "cancel running"])
async def test_every_end_of_a_job_makes_room_for_another(
    end: str, open_producer: Any, open_consumer: Callable[..., JobConsumer], own: JobMaker
) -> None:
    async with open_producer() as producer:
        first = own("alice")
        await producer.enqueue(first, None, None, 1)
        with pytest.raises(TooManyJobs, match="1 are allowed"):
            await producer.enqueue(own("alice"), None, None, 1)
        if end != "cancel queued":
            worker = open_consumer()
            (claim,) = await asyncio.to_thread(worker.claim, 1, 30.0)
            with pytest.raises(TooManyJobs):  # a running job counts too
                await producer.enqueue(own("alice"), None, None, 1)
            if end == "finish":
                assert worker.complete(claim, [], {}, [])
            elif end == "fail":
                assert worker.fail(claim, JobError("job_failed", "it broke"))
            else:
                await producer.cancel(first.id)
                assert worker.cancel(claim)
        else:
            await producer.cancel(first.id)
        assert (await producer.enqueue(own("alice"), None, None, 1)).created


async def test_a_job_that_waits_for_a_retry_or_killed_its_workers_is_counted_until_it_ends(
    open_producer: Any,
    open_consumer: Callable[..., JobConsumer],
    own: JobMaker,
    redis_client: redis.Redis,
    settings: Settings,
) -> None:
    async with open_producer() as producer:
        await producer.enqueue(own("alice"), None, None, 1)
        worker = open_consumer(max_deliveries=2, retry_backoff_s=0.0)
        for left in (1, 0):
            (claim,) = await asyncio.to_thread(worker.claim, 1, 30.0)
            assert live_count(redis_client, settings, "alice") == 1
            worker.fail(claim, JobError("engine_fault", "lost", retryable=True))
            assert live_count(redis_client, settings, "alice") == left
        assert (await producer.enqueue(own("alice"), None, None, 1)).created


async def test_a_record_that_vanished_does_not_count_for_ever(
    open_producer: Any, own: JobMaker, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        lost = own("alice")
        await producer.enqueue(lost, None, None, 1)
        redis_client.delete(Keys(settings.key_prefix).job(lost.id))
        assert (await producer.enqueue(own("alice"), None, None, 1)).created
        assert live_count(redis_client, settings, "alice") == 1


async def test_a_repeat_is_found_although_the_owner_has_no_room(open_producer: Any, own: JobMaker) -> None:
    async with open_producer() as producer:
        job = own("alice")
        await producer.enqueue(job, None, "k", 1)
        again = await producer.enqueue(own("alice"), None, "k", 1)
    assert (again.job_id, again.created) == (job.id, False)


async def test_an_idempotency_key_is_its_owners(open_producer: Any, own: JobMaker) -> None:
    async with open_producer() as producer:
        jobs = {owner: own(owner) for owner in ("alice", "bob", "")}
        for owner, job in jobs.items():
            enqueued = await producer.enqueue(job, None, "same", None)
            assert enqueued.created and enqueued.job_id == job.id, owner
        taken = dataclasses.replace(own("bob"), id=jobs["alice"].id)
        with pytest.raises(InvalidRequest):  # nor does another owner find a job by asking for its id
            await producer.enqueue(taken, None, None, None)


async def test_the_owner_is_read_back_with_the_job(open_producer: Any, own: JobMaker) -> None:
    async with open_producer() as producer:
        job = own("alice")
        await producer.enqueue(job)
        record = await producer.get(job.id)
    assert record.job == replace(job, created_at_s=record.job.created_at_s)  # the clock of Redis
    assert Job.from_json(job.to_json()).owner == "alice"


def test_a_record_from_before_there_were_keys_has_no_owner(make_job: JobMaker) -> None:
    text = make_job().to_json().replace(',"owner":""', "")
    assert "owner" not in text and Job.from_json(text).owner == ""


async def test_requests_above_the_rate_wait_for_their_turn(
    open_producer: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        waits_s = await asyncio.gather(*(producer.acquire_rate_limit("alice", 1) for _ in range(32)))
        assert sorted(wait_s > 0 for wait_s in waits_s) == [False] + [True] * 31
        assert all(wait_s == 0 or 0 < wait_s <= 60 for wait_s in waits_s)
        assert await producer.acquire_rate_limit("bob", 1) == 0, "each owner has a rate of its own"
        name = f"{Keys(settings.key_prefix).tag}:rate:alice"
        assert 0 < redis_client.pttl(name) <= 60_000
        # A minute later, for Redis keeps the time: the whole minute's worth is there again.
        redis_client.set(name, int(redis_client.get(name) or 0) - 60_000_000, keepttl=True)
        assert await producer.acquire_rate_limit("alice", 1) == 0 and await producer.acquire_rate_limit("alice", 1) > 0


async def test_a_minutes_requests_may_come_at_once_and_then_one_each_interval(open_producer: Any) -> None:
    async with open_producer() as producer:
        waits_s = [await producer.acquire_rate_limit("alice", 2) for _ in range(3)]
    assert waits_s[:2] == [0, 0] and 0 < waits_s[2] <= 30
