"""Blobs that go to Redis in front of their script: taken in whole, or dropped, or expired."""

from typing import Any

import pytest
import redis

from giantleap.service.errors import QueueFull
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.client import open_async_redis, open_redis
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.runner import AsyncScriptRunner, ScriptRunner, upload_input, upload_results
from giantleap.service.jobs.job import ResultFile
from giantleap.service.settings import Settings

PNG = ResultFile("image/png", 3)
REFUSAL = scripts.to_script("refusal", "return redis.error_reply('NOT today')", None)


def uploads(client: redis.Redis, keys: Keys) -> list[bytes]:
    return list(client.scan_iter(match=keys.upload("*")))


async def test_a_refused_job_leaves_no_input(
    open_producer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    keys = Keys(settings.key_prefix)
    async with open_producer(queue_limit=1) as producer:
        taken = make_job()
        assert (await producer.enqueue(taken, b"abc")).created
        assert not (await producer.enqueue(taken, b"abc")).created
        for _ in range(3):  # the second and third are refused before their body is sent
            with pytest.raises(QueueFull):
                await producer.enqueue(make_job(), b"xyz")
        assert redis_client.get(keys.input(taken.id)) == b"abc"
        assert redis_client.ttl(keys.input(taken.id)) == -1, "it lives as long as its job"
        assert uploads(redis_client, keys) == []


async def test_after_a_refusal_a_job_with_an_input_comes_in(
    open_producer: Any, open_consumer: Any, make_job: Any
) -> None:
    async with open_producer(queue_limit=1) as producer:
        worker = open_consumer(queue_limit=1)
        await producer.enqueue(make_job(), b"abc")
        with pytest.raises(QueueFull):
            await producer.enqueue(make_job(), b"xyz")
        [claim] = worker.claim(1, 30.0)
        assert worker.complete(claim, [(PNG, b"png")], {}, [])
        last = make_job()
        await producer.enqueue(last, b"last")
        [claim] = worker.claim(1, 30.0)
        assert (claim.job.id, claim.body) == (last.id, b"last")


async def test_a_server_that_forgot_the_scripts_is_given_them_again(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis
) -> None:
    async with open_producer() as producer:
        worker, job = open_consumer(), make_job()
        redis_client.script_flush()
        assert (await producer.enqueue(job, b"abc")).created
        [claim] = worker.claim(1, 30.0)
        redis_client.script_flush()
        assert worker.complete(claim, [(PNG, b"png"), (PNG, b"gnp")], {}, [])
        assert await producer.read_result(job.id, 1) == b"gnp"


async def test_what_no_script_took_expires(redis_client: redis.Redis, settings: Settings) -> None:
    assert settings.redis_url is not None
    url, keys = settings.redis_url, Keys(settings.key_prefix)
    async with open_async_redis(url) as client:
        with pytest.raises(redis.ResponseError, match="today"):
            await AsyncScriptRunner(client, settings).run(REFUSAL, before=upload_input(keys.upload("i"), b"abc"))
    with open_redis(url) as client, pytest.raises(redis.ResponseError, match="today"):
        ScriptRunner(client, settings).run(REFUSAL, before=upload_results(keys.upload("r"), [b"abc"]))
    assert sorted(uploads(redis_client, keys)) == [keys.upload(name).encode() for name in "ir"]
    assert all(0 < redis_client.pttl(name) <= 60_000 for name in uploads(redis_client, keys))


async def test_results_that_did_not_arrive_whole_end_no_job(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        worker, job = open_consumer(), make_job()
        await producer.enqueue(job)
        [claim] = worker.claim(1, 30.0)
        texts = {"results": "[]", "stages": "{}", "warnings": "[]"}
        lost = {"upload": "lost", "files": 1, "bytes": 3, "batch_jobs": 1, **texts, **worker._fence(claim)}
        assert ScriptRunner(redis_client, settings).run(scripts.COMPLETE, lost).status == "no_upload"
        record = await producer.get(job.id)
        assert record is not None and not record.state.final
        assert worker.complete(claim, [(PNG, b"png")], {}, [])
