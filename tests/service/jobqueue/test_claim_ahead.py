"""Claims for a device that is still busy, on a real Redis: they leave enough for every worker, and lose nothing."""

import asyncio
import dataclasses
import time
from typing import Any

import pytest
import redis

from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobs.job import JobError, JobState, ResultFile
from giantleap.service.settings import Settings
from tests.redis_fixtures import ConsumerOpener, JobMaker, ProducerOpener, Put
from tests.waiting import wait_until

FILE = (ResultFile("image/png", 3, seed=7), b"png")
FLAKY = JobError("engine_fault", "lost device", retryable=True)


def ids(claims: Any) -> list[str]:
    return [claim.job.id for claim in claims]


def test_nothing_is_claimed_ahead_that_a_worker_without_work_could_take(
    put: Put, open_consumer: ConsumerOpener
) -> None:
    busy, idle = open_consumer(), open_consumer(consumer="idle")
    jobs = [put().id for _ in range(3)]
    assert busy.claim_ahead(2) == [], "two for this one, and one is left for the other"
    jobs.append(put().id)
    assert ids(busy.claim_ahead(2)) == jobs[:2]
    assert busy.claim_ahead(2) == []
    assert ids(idle.claim(2, 1.0)) == jobs[2:]


def test_a_claim_ahead_keeps_its_lease_while_it_waits(put: Put, open_consumer: ConsumerOpener) -> None:
    worker = open_consumer(visibility_timeout_s=2.0)
    put()
    [ahead] = worker.claim_ahead(1)
    rival = open_consumer(consumer="rival", visibility_timeout_s=2.0)
    assert rival.claim(1, 5.0) == []
    assert worker.holds(ahead) and worker.complete(ahead, [FILE], {}, []) is JobState.SUCCEEDED
    assert not worker.holds(ahead)


def test_a_worker_that_dies_with_claims_ahead_loses_nothing(put: Put, open_consumer: ConsumerOpener) -> None:
    dead = open_consumer(lease=False, visibility_timeout_s=1.0)
    jobs = {put(body=b"latent").id for _ in range(4)}
    taken = [*dead.claim(2, 1.0), *dead.claim_ahead(2)]
    assert set(ids(taken)) == jobs and all(claim.body == b"latent" for claim in taken)
    heir = open_consumer(consumer="heir", visibility_timeout_s=1.0)
    found: set[str] = set()

    def finish() -> bool:
        for claim in heir.claim(4, 0.2):
            assert claim.delivery == 2 and claim.body == b"latent"
            assert heir.complete(claim, [FILE], {}, []) is JobState.SUCCEEDED
            found.add(claim.job.id)
        return found == jobs

    wait_until(finish)
    assert [dead.complete(claim, [FILE], {}, []) for claim in taken] == [None] * 4


def test_a_worker_knows_that_a_claim_was_lost_while_it_waited(
    put: Put, open_consumer: ConsumerOpener, redis_client: redis.Redis, settings: Settings
) -> None:
    worker = open_consumer(visibility_timeout_s=1.0)
    put()
    [ahead] = worker.claim_ahead(1)
    assert worker.holds(ahead)
    redis_client.hset(Keys(settings.key_prefix).job(ahead.job.id), "worker", "another")
    wait_until(lambda: not worker.holds(ahead))
    assert worker.complete(ahead, [FILE], {}, []) is None


def test_jobs_that_were_started_before_are_left_for_a_claim_that_can_run_them_alone(
    put: Put, open_consumer: ConsumerOpener
) -> None:
    worker = open_consumer(retry_backoff_s=0.0)
    returned, failed = put(), put()
    [first, second] = worker.claim(2, 1.0)
    new = put()
    worker.release([first])
    assert worker.claim_ahead(1) == [], "a job that was returned is first in line"
    assert ids(worker.claim(1, 1.0)) == [returned.id]
    assert worker.fail(second, FLAKY) is JobState.QUEUED
    assert ids(worker.claim_ahead(2)) == [new.id], "the other was started once"
    assert worker.claim_ahead(1) == []
    [again] = worker.claim(1, 1.0)
    assert (again.job.id, again.delivery) == (failed.id, 2)


async def test_the_time_that_a_claim_waits_for_its_batch_is_not_in_the_estimates(
    open_producer: ProducerOpener,
    open_consumer: ConsumerOpener,
    make_job: JobMaker,
    redis_client: redis.Redis,
    settings: Settings,
) -> None:
    async with open_producer() as producer:
        await producer.enqueue(make_job())
        worker = open_consumer()
        [claim] = await asyncio.to_thread(worker.claim_ahead, 1)
        redis_client.hset(Keys(settings.key_prefix).job(claim.job.id), "begun_s", time.time() - 4000)
        assert worker.complete(dataclasses.replace(claim, idle_s=3000.0), [FILE], {}, [])
        assert (await producer.stats()).recent_job_median_s == pytest.approx(1000, abs=60)
