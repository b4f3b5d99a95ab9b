"""A Redis that is out of memory and may evict nothing: a clear answer that passes, and workers that wait it out."""

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from giantleap.service.api.app import create_app
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.client import open_async_redis, open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import JobState, ResultFile
from giantleap.service.settings import Settings, read_settings
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis
from tests.redis_fixtures import SERVERS, server_binary
from tests.service.live_server import live_server
from tests.service.paper_bundle import write_paper_bundle

PNG = ResultFile("image/png", 3)


@pytest.fixture(params=SERVERS)
def full_settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a server of its own: it is filled for everybody."""
    server = EmbeddedRedis(server_binary(request.param), "everysec")
    redis_url = server.start(tmp_path / "redis")
    bundle = write_paper_bundle(tmp_path / "paper")
    yield read_settings(
        redis_url=redis_url, key_prefix=f"full-{uuid.uuid4().hex[:8]}", bundle=(bundle,), visibility_timeout_s=30.0
    )
    server.stop()


def set_full(settings: Settings, full: bool) -> None:
    assert settings.redis_url is not None
    with redis.Redis.from_url(settings.redis_url) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1 if full else 0)


async def test_requests_get_503_with_retry_after_and_reading_goes_on(full_settings: Settings) -> None:
    with live_server(create_app(full_settings)) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            headers = {"Prefer": "respond-async"}
            created = (await client.post("/generate", json={"prompt": "a"}, headers=headers)).json()
            set_full(full_settings, True)
            for answer in (
                await client.post("/generate", json={"prompt": "a"}, headers=headers),
                await client.post("/generate", json={"prompt": "a"}),
                await client.put(f"/jobs/{uuid.uuid4()}", json={"prompt": "a"}),
                await client.delete(created["status_url"]),
            ):
                assert answer.status_code == 503 and answer.json()["code"] == "not_ready", answer.text
                assert answer.json()["retryable"] and int(answer.headers["retry-after"]) >= 1
            openai = await client.post("/v1/images/generations", json={"prompt": "a"})
            assert openai.status_code == 503 and openai.json()["error"] and int(openai.headers["retry-after"]) >= 1
            assert (await client.get(created["status_url"])).json()["status"] == "queued"
            assert [job["id"] for job in (await client.get("/jobs")).json()["jobs"]] == [created["id"]]
            assert (await client.get("/metrics")).status_code == 200
            set_full(full_settings, False)
            assert (await client.delete(created["status_url"])).json()["status"] == "canceled"
            assert (await client.post("/generate", json={"prompt": "a"}, headers=headers)).status_code == 202


async def test_a_worker_waits_until_there_is_memory_and_then_ends_its_jobs(
    full_settings: Settings, make_job: Any
) -> None:
    assert full_settings.redis_url is not None
    client = open_redis(full_settings.redis_url)
    worker = JobConsumer(client, full_settings, ["pocket"], "w")
    worker.open()
    try:
        first, second = make_job(), make_job()
        await enqueue(full_settings, first, second)
        [claim] = worker.claim(1, 1.0)
        set_full(full_settings, True)
        assert worker.claim(1, 0.2) == []
        worker.emit(claim, "step", {"step": 1, "steps": 4})
        ended: list[JobState | None] = []
        ending = threading.Thread(target=lambda: ended.append(worker.complete(claim, [(PNG, b"png")], {}, [])))
        ending.start()
        ending.join(0.3)
        assert ending.is_alive() and ended == [], "it waits"
        set_full(full_settings, False)
        ending.join(60)
        assert ended == [JobState.SUCCEEDED]
        left: list[Claim] = worker.claim(1, 30.0)
        assert [claim.job.id for claim in left] == [second.id]
        assert worker.complete(left[0], [(PNG, b"png")], {}, [])
    finally:
        set_full(full_settings, False)
        worker.close()
        client.close()


async def enqueue(settings: Settings, *jobs: Any) -> None:
    assert settings.redis_url is not None
    async with open_async_redis(settings.redis_url) as client:
        producer = JobProducer(client, settings)
        for job in jobs:
            await producer.enqueue(job)
