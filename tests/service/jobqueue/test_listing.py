"""The list of an owner's jobs, and how long a waiting one will probably wait, against a real Redis."""

import asyncio
import dataclasses
import json
from typing import Any

import pytest
import redis

from giantleap.service.errors import QueueFull
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.backpressure import retry_after_s
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobs.job import JobState, Priority, QueueStats, ResultFile
from giantleap.service.settings import Settings
from tests.redis_fixtures import enqueue_arguments

PNG = ResultFile("image/png", 3)


async def test_pages_go_through_an_owners_jobs_from_the_newest(open_producer: Any, make_job: Any) -> None:
    async with open_producer() as producer:
        jobs = [dataclasses.replace(make_job(), owner="ann") for _ in range(7)]
        for job in jobs:
            await producer.enqueue(job)
        await producer.enqueue(dataclasses.replace(make_job(), owner="bob"))
        seen: list[str] = []
        sizes: list[int] = []
        cursor = None
        while cursor is not None or not sizes:
            page = await producer.list_jobs("ann", max_jobs=3, cursor=cursor)
            seen += [record.job.id for record in page.records]
            sizes.append(len(page.records))
            cursor = page.next_cursor
        assert seen == [job.id for job in reversed(jobs)]
        assert sizes == [3, 3, 1]
        assert (await producer.list_jobs("nobody")).records == ()


async def test_a_page_of_one_state_and_what_is_gone_is_forgotten(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        jobs = [make_job() for _ in range(4)]
        for job in jobs:
            await producer.enqueue(job)
        worker = open_consumer()
        done = worker.claim(2, 1.0)
        for claim in done:
            worker.complete(claim, [(PNG, b"png")], {}, [])
        page = await producer.list_jobs("", JobState.SUCCEEDED)
        assert {record.job.id for record in page.records} == {claim.job.id for claim in done}
        assert [r.job.id for r in (await producer.list_jobs("", JobState.QUEUED)).records] == [
            jobs[3].id,
            jobs[2].id,
        ]
        keys = Keys(settings.key_prefix)
        redis_client.delete(keys.job(jobs[0].id))
        assert len((await producer.list_jobs("")).records) == 3
        assert redis_client.zcard(f"{keys.tag}:jobs:") == 3


def test_the_index_is_capped_and_expires(make_job: Any, redis_client: redis.Redis, settings: Settings) -> None:
    keys = Keys(settings.key_prefix)
    config = json.dumps(json.loads(scripts.to_config(settings)) | {"list_limit": 3})
    jobs = [make_job() for _ in range(5)]
    for job in jobs:
        arguments = json.dumps(enqueue_arguments(job))
        redis_client.eval(scripts.ENQUEUE.text, 1, keys.tag, config, arguments, job.to_json())
    assert redis_client.zrange(f"{keys.tag}:jobs:", 0, -1) == [job.id.encode() for job in jobs[2:]]
    assert redis_client.pttl(f"{keys.tag}:jobs:") > 0


async def test_start_is_estimated_from_the_jobs_before_it_and_the_median_of_its_bundle(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer(visibility_timeout_s=60.0) as producer:
        first = await producer.enqueue(make_job())
        assert first.estimated_start_s is None, "no worker, and nothing has ended"
        worker = open_consumer(visibility_timeout_s=60.0)
        assert (await producer.enqueue(make_job())).estimated_start_s is None, "nothing has ended"
        for bundle, seconds in (("pocket", (1, 4, 100)), ("other", (50,))):
            redis_client.rpush(f"{Keys(settings.key_prefix).tag}:durations:{bundle}", *seconds)
        assert len(worker.claim(1, 1.0)) == 1
        added = await producer.enqueue(make_job())
        assert (added.queue_position, added.estimated_start_s) == (1, 8.0), "one that runs and one that waits, 4 s"
        open_consumer(consumer="second", visibility_timeout_s=60.0)
        record = await producer.get(added.job_id)
        assert record is not None and record.estimated_start_s == 2.0, "one must end first, and two workers end them"


async def test_jobs_of_one_batch_share_its_time_in_the_estimates(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    tag = Keys(settings.key_prefix).tag
    async with open_producer(visibility_timeout_s=60.0) as producer:
        worker = open_consumer(visibility_timeout_s=60.0)
        for _ in range(5):
            await producer.enqueue(make_job())
        claims = worker.claim(5, 1.0)
        seconds, _ = redis_client.time()
        for claim in claims:
            redis_client.hset(f"{tag}:job:{claim.job.id}", "begun_s", seconds - 4000)
        for claim in claims[:4]:
            assert worker.complete(claim, [], {}, [], batch_jobs=4)
        assert worker.transfer(claims[4], b"latents", {}, [], batch_jobs=2) is JobState.QUEUED
        shares = [float(text) for text in redis_client.lrange(f"{tag}:durations:pocket", 0, -1)]
        assert shares == pytest.approx([2000] + 4 * [1000], abs=60)
        assert [float(text) for text in redis_client.lrange(f"{tag}:durations", 0, -1)] == shares[1:]
        assert (await producer.stats()).recent_job_median_s == pytest.approx(1000, abs=60)


def test_retry_after_counts_a_waiting_job_with_the_median_of_its_bundle() -> None:
    queued = {("slow", Priority.HIGH): 2, ("slow", Priority.LOW): 1, ("new", Priority.HIGH): 4}
    stats = QueueStats(queued, 1, 1, 0, 0.0, 32, 2, 3.0, 0, 1, queue_median_s={"slow": 20.0})
    assert retry_after_s(stats) == (3 * 20 + 4 * 3 + 2 * 3) / 2
    empty = QueueStats({}, 0, 0, 0, 0.0, 32, 0, None, 0, 1)
    assert retry_after_s(empty) == 1
    unknown = dataclasses.replace(empty, queued={("new", Priority.HIGH): 10_000})
    assert retry_after_s(unknown) == 600


async def test_latent_pixels_are_limited_exactly_and_given_back(
    open_producer: Any, open_consumer: Any, make_job: Any
) -> None:
    def job_of(latent_px: int) -> Any:
        return dataclasses.replace(make_job(), latent_px=latent_px)

    async with open_producer(queue_limit_latent_px=100) as producer:
        alone = job_of(150)
        assert (await producer.enqueue(alone)).created, "a job may exceed the limit alone"
        await producer.cancel(alone.id)
        replies = await asyncio.gather(*(producer.enqueue(job_of(30)) for _ in range(8)), return_exceptions=True)
        refused = [reply for reply in replies if isinstance(reply, BaseException)]
        assert len(refused) == 5, "90 of 100"
        for reply in refused:
            assert isinstance(reply, QueueFull) and reply.retry_after_s is not None
        assert (await producer.enqueue(job_of(10))).created
        with pytest.raises(QueueFull, match="latent pixels"):
            await producer.enqueue(job_of(1))
        worker = open_consumer()
        [claim] = worker.claim(1, 1.0)
        with pytest.raises(QueueFull, match="latent pixels"):
            await producer.enqueue(job_of(1))
        worker.complete(claim, [], {}, [])
        assert (await producer.enqueue(job_of(30))).created
        assert (await producer.enqueue(make_job())).created, "a job without latent pixels is not counted"
