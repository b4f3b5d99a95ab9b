"""HEAD answers what GET answers, without the body, on every route that has GET."""

import asyncio
import uuid
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from tests.service.compat_fakes import FileProducer, build_app
from tests.service.fake_producer import stay_queued
from tests.service.live_server import live_server

PROMPT = "a red sphere on a green floor"
CHANGING = ("date", "x-request-id", "content-length")  # the body of an error has the id of its request


def paths_of(app: FastAPI, job_id: str) -> list[str]:
    paths = [path for path, operations in app.openapi()["paths"].items() if "get" in operations]
    assert len(paths) > 12
    named = [path.format(job_id=job_id, model="paper") for path in paths]
    return [
        *named,
        "/openapi.json",
        "/docs",
        "/docs/start.js",
        "/",
        "/ui",
        "/ui/app.js",
        "/ui/none.js",
        f"/jobs/{uuid.uuid4()}",
        "/nothing",
        "/generate",
        "/models/",
    ]


def test_head_has_the_status_and_headers_of_get_everywhere(bundle_dirs: tuple[Path, ...]) -> None:
    producer = FileProducer()
    app = build_app(producer, bundle_dirs)
    with live_server(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        job_id = client.post("/generate", json={"prompt": PROMPT}).json()["id"]
        for path in paths_of(app, job_id):
            got, head = client.get(path), client.head(path)
            assert head.status_code == got.status_code and head.content == b"", path
            assert {name: value for name, value in head.headers.items() if name not in CHANGING} == {
                name: value for name, value in got.headers.items() if name not in CHANGING
            }, path
            if got.is_success and not path.endswith("/metrics"):  # which count these requests
                assert head.headers.get("content-length") == got.headers.get("content-length"), path
        refused = client.head("/generate")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        assert client.post("/models").headers["allow"] == "GET, HEAD"


async def test_head_of_a_stream_ends_at_once_and_leaves_nothing_open(bundle_dirs: tuple[Path, ...]) -> None:
    producer = FileProducer(endless_events=True)
    producer.end = stay_queued
    with live_server(build_app(producer, bundle_dirs)) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            job = (await client.post("/generate", json={"prompt": PROMPT}, headers={"Prefer": "respond-async"})).json()
            for _ in range(3):
                head = await client.head(job["events_url"])
                assert head.status_code == 200 and head.headers["content-type"].startswith("text/event-stream")
            async with asyncio.timeout(60):
                while producer.open_events:
                    await asyncio.sleep(0.01)


@pytest.mark.parametrize("path", ["/models", "/nothing", "/generate"])
async def test_the_body_is_dropped_whatever_serves_the_app(path: str, bundle_dirs: tuple[Path, ...]) -> None:
    transport = httpx.ASGITransport(build_app(FileProducer(), bundle_dirs))
    async with httpx.AsyncClient(transport=transport, base_url="http://giantleap") as client:
        assert (await client.head(path)).content == b""


async def test_metrics_count_head_under_its_own_name_and_route(bundle_dirs: tuple[Path, ...]) -> None:
    transport = httpx.ASGITransport(build_app(FileProducer(), bundle_dirs))
    async with httpx.AsyncClient(transport=transport, base_url="http://giantleap") as client:
        await client.head("/models")
        assert 'code="200",method="HEAD",route="/models"' in (await client.get("/metrics")).text
