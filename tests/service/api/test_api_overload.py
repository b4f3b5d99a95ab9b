"""A crowd against a small queue, and a Redis that goes away: every client gets a clear answer in time, none hangs."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import load, save

from giantleap.service.api.app import create_app
from giantleap.service.jobqueue.admission import slots
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.job import GenerateParams, ResultFile
from giantleap.service.settings import Settings
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis
from tests.service.live_server import live_server
from tests.service.paper_bundle import CHANNELS, write_paper_bundle
from tests.service.thread_worker import thread_worker
from tests.streams import close_stream

CLIENTS = 64
QUEUE_LIMIT = 32
JOB_S = 0.02
STAGES = {"generate": JOB_S / 2, "decode": JOB_S / 2}


@pytest.fixture
def overload_settings(settings: Settings, tmp_path: Path) -> Settings:
    bundle_dir = write_paper_bundle(tmp_path / "paper")
    return settings.model_copy(
        update={"bundle": (bundle_dir,), "queue_limit": QUEUE_LIMIT, "visibility_timeout_s": 10.0}
    )


def work(claim: Claim) -> tuple[ResultFile, bytes]:
    """A result that only this job can have: its seed, or its own latent."""
    params = claim.job.params
    if isinstance(params, GenerateParams):
        content = f"image {params.seed}".encode()
        return ResultFile("image/png", len(content), params.seed), content
    content = save({"latent": load(claim.body or b"")["latent"] * 2})
    return ResultFile("application/x-safetensors", len(content)), content


def end_slowly(consumer: JobConsumer, claim: Claim) -> None:
    """Takes `JOB_S` for each job, and tells of a step."""
    consumer.emit(claim, "step", {"step": 1, "steps": 1})
    time.sleep(JOB_S)
    consumer.complete(claim, [work(claim)], STAGES, ())


def paper_worker(settings: Settings) -> contextlib.AbstractContextManager[None]:
    return thread_worker(settings, "paper", end_slowly)


async def call(client: httpx.AsyncClient, index: int) -> httpx.Response:
    """One of four kinds of client, each with a seed or a latent of its own."""
    if index % 4 == 3:
        latent = np.full((CHANNELS, 4, 4), index, np.float32)
        headers = {"Content-Type": "application/x-safetensors", "Accept": "application/x-safetensors"}
        return await client.post("/upscale?output=latent", content=save({"latent": latent}), headers=headers)
    headers = ({"Accept": "image/png"}, {}, {"Prefer": "respond-async"})[index % 4]
    return await client.post("/generate", json={"prompt": "a", "seed": index}, headers=headers)


def assert_own_result(response: httpx.Response, index: int) -> None:
    kind = index % 4
    if kind == 0:
        assert response.content == f"image {index}".encode()
    elif kind == 3:
        assert (load(response.content)["latent"] == 2 * index).all()
    else:
        assert response.json()["seed"] == index


async def wait_for_depth(client: httpx.AsyncClient, jobs: int) -> None:
    while f'queue_depth{{bundle="paper",priority="high"}} {jobs}.0' not in (await client.get("/metrics")).text:
        await asyncio.sleep(0.02)


async def test_a_crowd_gets_200_202_or_429_and_nobody_hangs(overload_settings: Settings) -> None:
    with live_server(create_app(overload_settings)) as url, paper_worker(overload_settings):
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client:
            responses = await asyncio.gather(*(call(client, index) for index in range(CLIENTS)))
            statuses = [response.status_code for response in responses]
            assert set(statuses) == {200, 202, 429}
            assert CLIENTS - statuses.count(429) >= QUEUE_LIMIT, "the queue was filled before anyone was sent away"
            for index, response in enumerate(responses):
                if response.status_code == 429:
                    assert 1 <= int(response.headers["retry-after"]) <= 600
                    assert response.json()["code"] == "queue_full"
                else:
                    assert_own_result(response, index)
            for response in (response for response in responses if response.status_code == 202):
                body = response.json()
                while body["status"] in ("queued", "processing"):
                    await asyncio.sleep(0.05)
                    body = (await client.get(body["status_url"])).json()
                result = await client.get(body["result_url"])
                assert result.content == f"image {body['seed']}".encode()
            metrics = (await client.get("/metrics")).text
            assert f'giantleap_rejections_total{{reason="queue_full"}} {statuses.count(429)}.0' in metrics
            assert (await client.get("/readyz")).status_code == 200


async def refused_unread(url: str, headers: str) -> bytes:
    """The start of the response to a request whose body never comes."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100\r\n{headers}\r\n".encode())
        await writer.drain()
        return await reader.readuntil(b"\r\n\r\n")
    finally:
        await close_stream(writer)


async def test_a_full_queue_refuses_new_jobs_before_their_body_is_read(
    overload_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "STATE_S", 600.0)
    settings = overload_settings.model_copy(update={"queue_limit": 1})
    first, key = {"prompt": "a", "seed": 1}, {"Prefer": "respond-async", "Idempotency-Key": "first"}
    with live_server(create_app(settings)) as url:
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            created = await client.post("/generate", json=first, headers=key)
            assert created.status_code == 202
            assert (await client.post("/generate", json={"prompt": "a"})).json()["code"] == "queue_full"
            answer = await refused_unread(url, "Content-Type: application/json\r\n")
            assert answer.startswith(b"HTTP/1.1 429 ") and b"\r\nretry-after: " in answer.lower()
            repeated = await client.post("/generate", json=first, headers=key)
            assert repeated.json()["id"] == created.json()["id"], "a key may belong to a job that is there"
            assert (await client.get(created.json()["status_url"])).status_code == 200
            metrics = (await client.get("/metrics")).text
            assert 'giantleap_rejections_total{reason="queue_full"} 2.0' in metrics


async def test_a_queue_that_was_full_is_checked_again_after_a_moment(overload_settings: Settings) -> None:
    settings = overload_settings.model_copy(update={"queue_limit": 1})
    with live_server(create_app(settings)) as url:
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            first = await client.post("/generate", json={"prompt": "a"}, headers={"Prefer": "respond-async"})
            assert (await client.post("/generate", json={"prompt": "a"})).status_code == 429
            with paper_worker(settings):
                while (await client.get(first.json()["status_url"])).json()["status"] != "succeeded":
                    await asyncio.sleep(slots.STATE_S)
                assert (await client.post("/generate", json={"prompt": "a", "seed": 2})).status_code == 200


async def test_clients_that_obey_retry_after_are_all_served(overload_settings: Settings) -> None:
    with live_server(create_app(overload_settings)) as url, paper_worker(overload_settings):
        # A connection for each attempt: one that idles as long as the server keeps it may close under a request.
        limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client:

            async def call_until_served(index: int) -> None:
                key = {"Accept": "image/png", "Idempotency-Key": f"client-{index}"}
                for _ in range(10):
                    response = await client.post("/generate", json={"prompt": "a", "seed": index}, headers=key)
                    if response.status_code != 429:
                        break
                    assert int(response.headers["retry-after"]) <= 10, "32 jobs of some hundredths of a second"
                    await asyncio.sleep(int(response.headers["retry-after"]))
                assert response.status_code == 200 and response.content == f"image {index}".encode()

            await call_until_served(0)  # from here on the queue knows how long a job takes
            await asyncio.wait_for(asyncio.gather(*map(call_until_served, range(1, CLIENTS))), 100)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_over_the_limit_gets_its_answer_over_a_real_socket(
    overload_settings: Settings, chunked: bool
) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield bytes(1 << 16)

    app = create_app(overload_settings.model_copy(update={"max_body_bytes": 1 << 20}))
    with live_server(app) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            content = parts() if chunked else bytes(1 << 22)
            headers = {"Content-Type": "application/octet-stream"}
            response = await client.post("/upscale", content=content, headers=headers)
            assert response.status_code == 413 and response.json()["code"] == "payload_too_large"
            assert (await client.get("/livez")).status_code == 200


async def test_a_lost_redis_is_a_quick_503_and_the_waiting_are_served_when_it_is_back(
    overload_settings: Settings, tmp_path: Path
) -> None:
    server = EmbeddedRedis()
    redis_url = server.start(tmp_path / "redis")
    settings = overload_settings.model_copy(update={"redis_url": redis_url})
    try:
        with live_server(create_app(settings)) as url:
            async with httpx.AsyncClient(base_url=url, timeout=120) as client:
                waiting = asyncio.create_task(
                    client.post("/generate", json={"prompt": "a", "seed": 7}, headers={"Accept": "image/png"})
                )
                posted = await client.post("/generate", json={"prompt": "a"}, headers={"Prefer": "respond-async"})
                job = posted.json()
                await asyncio.wait_for(wait_for_depth(client, 2), 60)
                server.stop()
                calls = (
                    client.post("/generate", json={"prompt": "a"}),
                    client.get(job["status_url"]),
                    client.get("/readyz"),
                )
                for response in await asyncio.gather(*calls):
                    assert response.status_code == 503 and response.json()["code"] == "not_ready"
                    assert int(response.headers["retry-after"]) >= 1
                assert (await client.get("/livez")).status_code == 200
                server.start(tmp_path / "redis", int(redis_url.rpartition(":")[2].partition("/")[0]))
                with paper_worker(settings):
                    assert (await waiting).content == b"image 7"
    finally:
        server.stop()
