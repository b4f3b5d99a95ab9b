"""A key's budget of work in the queue: exact between API processes, given back for what no worker started."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import redis

from giantleap.service.errors import OverBudget, QueueFull, TooManyJobs, WorkLimited
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.producer import Enqueued, JobProducer
from giantleap.service.jobs.grid import Charge
from giantleap.service.jobs.job import Job, JobError
from giantleap.service.settings import Settings

PER_MINUTE = 60  # a megapixel-step is a second of it
Post = Callable[..., Awaitable[Enqueued]]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"visibility_timeout_s": 30.0})  # a stall of the machine must lose no claim


class Budget:
    """What Redis has noted for alice: up to when her budget is paid."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._client, self._name = client, f"{Keys(settings.key_prefix).tag}:work:alice"

    @property
    def paid_us(self) -> int:
        return int(self._client.get(self._name) or 0)

    def pass_time(self, seconds: int) -> None:
        """As if so much time had passed, for Redis keeps the time."""
        self._client.set(self._name, self.paid_us - seconds * 1_000_000, keepttl=True)


@pytest.fixture
def budget(redis_client: redis.Redis, settings: Settings) -> Budget:
    return Budget(redis_client, settings)


@pytest.fixture
def post(make_job: Callable[..., Job]) -> Post:
    async def post(producer: JobProducer, megapixel_steps: float, **rest: Any) -> Enqueued:
        job = rest.pop("job", None) or dataclasses.replace(make_job(), owner="alice")
        return await producer.enqueue(job, charge=Charge(round(megapixel_steps * 1e6), PER_MINUTE), **rest)

    return post


async def test_the_budget_is_exact_between_concurrent_requests_of_several_processes(
    open_producer: Any, post: Post
) -> None:
    async with open_producer() as one, open_producer() as other:
        tries = [post(producer, 11.0) for _ in range(16) for producer in (one, other)]
        done = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(each, Enqueued) for each in done) == 5, "5 x 11 of 60; no key refills 11 s in this time"
    assert sum(isinstance(each, WorkLimited) for each in done) == 27


async def test_retry_after_is_the_time_until_the_same_request_is_accepted(
    open_producer: Any, post: Post, budget: Budget
) -> None:
    async with open_producer() as producer:
        for _ in range(2):
            await post(producer, 30.0)
        with pytest.raises(WorkLimited, match="is 20 megapixel-steps of work, this key may use 60") as refused:
            await post(producer, 20.0)
        wait_s = refused.value.retry_after_s
        assert wait_s is not None and 0 < wait_s <= 20 and not isinstance(refused.value, OverBudget)
        budget.pass_time(wait_s)
        assert (await post(producer, 20.0)).created
        with pytest.raises(WorkLimited):
            await post(producer, 20.0)


async def test_a_whole_minutes_work_fits_and_more_is_refused_for_good(
    open_producer: Any, post: Post, budget: Budget
) -> None:
    async with open_producer() as producer:
        with pytest.raises(OverBudget, match="fewer or smaller images") as refused:
            await post(producer, 60.1)
        assert refused.value.retry_after_s is None and budget.paid_us == 0, "a refused request costs nothing"
        assert (await post(producer, 60.0)).created


async def test_a_job_that_another_limit_refuses_costs_nothing(open_producer: Any, post: Post, budget: Budget) -> None:
    async with open_producer(queue_limit=2) as producer:
        await post(producer, 1.0, max_live=1)
        paid_us = budget.paid_us
        with pytest.raises(TooManyJobs):
            await post(producer, 1.0, max_live=1)
        await post(producer, 1.0)
        with pytest.raises(QueueFull):
            await post(producer, 1.0)
        assert budget.paid_us == paid_us + 1_000_000


async def test_a_repeat_finds_its_job_and_pays_nothing_even_without_budget(
    open_producer: Any, post: Post, budget: Budget, make_job: Callable[..., Job]
) -> None:
    job = dataclasses.replace(make_job(), owner="alice")
    async with open_producer() as producer:
        await post(producer, 60.0, job=job)
        paid_us = budget.paid_us
        again = await post(producer, 60.0, job=job)
    assert (again.job_id, again.created) == (job.id, False) and budget.paid_us == paid_us


@pytest.mark.parametrize("end", ["cancel queued", "delete queued", "released", "overdue"])
async def test_work_that_no_worker_started_is_given_back(
    end: str,
    open_producer: Any,
    open_consumer: Callable[..., JobConsumer],
    post: Post,
    budget: Budget,
    redis_client: redis.Redis,
    make_job: Callable[..., Job],
    settings: Settings,
) -> None:
    job = dataclasses.replace(make_job(), owner="alice", cancel_after_s=1000.0)
    async with open_producer() as producer:
        await post(producer, 10.0)
        paid_us = budget.paid_us
        await post(producer, 50.0, job=job)
        assert budget.paid_us == paid_us + 50_000_000
        if end == "released":
            worker = open_consumer()
            worker.release(await asyncio.to_thread(worker.claim, 2, 30.0))
        if end == "overdue":
            redis_client.hset(Keys(settings.key_prefix).job(job.id), "deadline_ms", "1")
            await producer.get(job.id)
        await (producer.delete if end == "delete queued" else producer.cancel)(job.id)
        assert budget.paid_us == paid_us
        await producer.cancel(job.id)
        assert budget.paid_us == paid_us, "a second cancel gives nothing"
        assert (await post(producer, 50.0)).created


@pytest.mark.parametrize("end", ["cancel running", "cancel a retry", "cancel transferred", "finish", "fail"])
async def test_work_that_a_worker_started_is_spent(
    end: str, open_producer: Any, open_consumer: Callable[..., JobConsumer], post: Post, budget: Budget
) -> None:
    async with open_producer() as producer:
        job_id = (await post(producer, 50.0)).job_id
        paid_us = budget.paid_us
        worker = open_consumer()
        (claim,) = await asyncio.to_thread(worker.claim, 1, 30.0)
        if end == "finish":
            assert worker.complete(claim, [], {}, [])
        elif end == "cancel transferred":
            worker.transfer(claim, b"latents", {"generate": 1.0}, [])
        elif end != "cancel running":
            worker.fail(claim, JobError("engine_fault", "lost", retryable=end == "cancel a retry"))
        await producer.cancel(job_id)
        if end == "cancel running":
            assert worker.cancel(claim)
        assert budget.paid_us == paid_us


async def test_what_a_full_budget_gets_back_does_not_make_it_larger(
    open_producer: Any, post: Post, budget: Budget
) -> None:
    async with open_producer() as producer:
        job_id = (await post(producer, 50.0)).job_id
        budget.pass_time(3600)
        await producer.cancel(job_id)
        assert budget.paid_us == 0 and (await post(producer, 60.0)).created
        with pytest.raises(WorkLimited):
            await post(producer, 10.0)
