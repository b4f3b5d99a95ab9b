"""Previews in a real Redis: an event each, its image for a short time beside it, nothing where there is no room."""

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import pytest
import redis

from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.runner import ScriptRunner
from giantleap.service.jobs.job import JobError, JobEvent
from giantleap.service.settings import Settings

IMAGES = (b"\xff\xd8one", b"\xff\xd8two", b"\xff\xd8three")


async def start(producer: Any, worker: Any, job: Any) -> Claim:
    await producer.enqueue(job)
    [claim] = worker.claim(1, 60.0)
    assert isinstance(claim, Claim)
    return claim


def emit(worker: Any, claim: Claim, images: Sequence[bytes] = IMAGES) -> None:
    for step, image in enumerate(images, 1):
        worker.emit(claim, "step", {"step": step, "steps": 4})
        worker.emit(claim, "preview", {"index": 0, "step": step}, image)


async def read(producer: Any, job: Any, last_event_id: str = "0-0") -> list[JobEvent]:
    async with asyncio.timeout(60):
        return [event async for event in producer.events(job.id, last_event_id)]


def previews_of(events: Sequence[JobEvent]) -> list[tuple[int, bytes]]:
    return [(e.data["step"], base64.b64decode(e.data["image"])) for e in events if e.name == "preview"]


async def test_previews_come_in_order_with_their_images_and_a_reader_resumes(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    job, worker, key = make_job(), open_consumer(), Keys(settings.key_prefix).preview
    async with open_producer() as producer:
        claim = await start(producer, worker, job)
        emit(worker, claim)
        assert 0 < redis_client.pttl(key(job.id)) <= 60_000
        worker.complete(claim, [], {}, [])
        events = await read(producer, job)
        assert previews_of(events) == list(enumerate(IMAGES, 1))
        assert [e.name for e in events[2:]] == ["step", "preview"] * 3 + ["done"]
        second = next(e for e in events if e.name == "preview" and e.data["step"] == 2)
        assert previews_of(await read(producer, job, second.id)) == [(3, IMAGES[2])]
        redis_client.delete(key(job.id))  # as its time to live does
        late = await read(producer, job)
        assert [e.name for e in late] == [e.name for e in events if e.name != "preview"]
        assert [e.id for e in late] == [e.id for e in events if e.name != "preview"]


@pytest.mark.parametrize("end", ["refused", "canceled", "deleted"])
async def test_no_preview_is_left_of_a_job_that_a_filter_refused_or_a_client_dropped(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings, end: str
) -> None:
    job, worker, key = make_job(), open_consumer(), Keys(settings.key_prefix).preview
    async with open_producer() as producer:
        claim = await start(producer, worker, job)
        emit(worker, claim)
        assert redis_client.hlen(key(job.id)) == 3
        if end == "refused":
            worker.fail(claim, JobError("blocked_by_filter", "filter x refused the image"))
        elif end == "canceled":
            await producer.cancel(job.id)
            emit(worker, claim)
            assert redis_client.hlen(key(job.id)) == 3, "none after the request"
            worker.cancel(claim)
        else:
            worker.complete(claim, [], {}, [])
            await producer.delete(job.id)
        emit(worker, claim)
        assert not redis_client.exists(key(job.id))


async def test_previews_are_dropped_where_results_fill_the_budget_and_beyond_a_number(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    worker, key = open_consumer(blob_budget_bytes=10), Keys(settings.key_prefix).preview
    async with open_producer(blob_budget_bytes=10) as producer:
        job = make_job()
        claim = await start(producer, worker, job)
        emit(worker, claim, [b"x" * 11, b"y" * 10])
        worker.complete(claim, [], {}, [])
        assert previews_of(await read(producer, job)) == [(2, b"y" * 10)]
    many, worker = make_job(), open_consumer()
    async with open_producer() as producer:
        emit(worker, await start(producer, worker, many), [b"z"] * 70)
        assert redis_client.hlen(key(many.id)) == 64


def test_a_preview_of_a_lost_claim_is_dropped(
    open_consumer: Any, settings: Settings, redis_client: redis.Redis
) -> None:
    arguments = {"consumer": "gone", "lane": "l:high", "message": "1-0", "id": "none", "delivery": 1, "name": "preview"}
    ScriptRunner(redis_client, settings).run(scripts.EMIT_PREVIEW, arguments | {"data": "{}"}, value=b"x")
    assert not redis_client.exists(Keys(settings.key_prefix).preview("none"))
