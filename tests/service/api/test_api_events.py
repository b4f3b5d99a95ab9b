"""Progress as server-sent events: complete, resumable, kept alive, and gone without a trace when the client is."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from giantleap.service.api.app import create_app
from giantleap.service.api.sse import read_last_event_id, stream_events, to_block
from giantleap.service.errors import MalformedRequest, NotReady
from giantleap.service.jobs.job import GenerateParams, Job, JobEvent, Priority
from giantleap.service.settings import Settings, read_settings
from giantleap.service.supervisor.embedded_redis import free_port
from tests.service.fake_producer import FakeProducer, stay_queued, succeed
from tests.service.live_server import live_server
from tests.service.paper_bundle import write_paper_bundle

EVENTS = [
    JobEvent("10-0", "queued", {"position": 2}),
    JobEvent("11-0", "started", {"delivery": 1}),
    JobEvent("12-0", "step", {"step": 1, "steps": 2}),
    JobEvent("12-1", "step", {"step": 2, "steps": 2}),
    JobEvent("13-0", "stage", {"stage": "generate", "seconds": 0.5}),
    JobEvent("14-0", "done", {"state": "succeeded"}),
]


@pytest.fixture
def bundle_dir(tmp_path: Path) -> Path:
    return write_paper_bundle(tmp_path / "paper")


def stored_job() -> Job:
    params = GenerateParams("a red sphere", "", 2, 128, 128, 8, 3.0, 1, 1, "png")
    return Job(str(uuid.uuid4()), "paper", priority=Priority.HIGH, created_at_s=time.time(), params=params)


def parse(text: str) -> list[JobEvent]:
    """Events of a stream, by the rules of the format; comments and retry lines left out."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if "event" in fields:
            events.append(JobEvent(fields["id"], fields["event"], json.loads(fields["data"])))
    return events


async def collect(producer: FakeProducer, bundle_dir: Path, headers: dict[str, str] | None = None) -> httpx.Response:
    job = stored_job()
    producer.records[job.id] = stay_queued(job)
    app = create_app(read_settings(bundle=(bundle_dir,)), producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        return await client.get(f"/jobs/{job.id}/events", headers=headers)


async def test_every_event_is_sent_in_order(bundle_dir: Path) -> None:
    producer = FakeProducer(event_list=EVENTS)
    response = await collect(producer, bundle_dir)
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert parse(response.text) == EVENTS and "retry: " in response.text
    assert producer.open_events == 0


async def test_a_client_resumes_after_the_last_event_that_it_got(bundle_dir: Path) -> None:
    response = await collect(FakeProducer(event_list=EVENTS), bundle_dir, {"Last-Event-ID": "12-0"})
    assert parse(response.text) == EVENTS[3:]


@pytest.mark.parametrize("last", [None, "14-0", "15-0"])
async def test_a_stream_without_an_event_left_is_204_for_eventsource_to_stop(
    last: str | None, bundle_dir: Path
) -> None:
    job, headers = stored_job(), {} if last is None else {"Last-Event-ID": last}
    producer = FakeProducer(event_list=[] if last is None else EVENTS, records={job.id: succeed(job)})
    app = create_app(read_settings(bundle=(bundle_dir,)), producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        response = await client.get(f"/jobs/{job.id}/events", headers=headers)
        assert (response.status_code, response.content) == (204, b"")
        if last is not None:
            earlier = await client.get(f"/jobs/{job.id}/events", headers={"Last-Event-ID": "13-0"})
            assert earlier.status_code == 200 and parse(earlier.text) == EVENTS[5:]
    assert producer.open_events == 0


async def test_eventsource_gets_each_event_once_and_then_204(settings: Settings, bundle_dir: Path) -> None:
    app = create_app(settings.model_copy(update={"bundle": (bundle_dir,)}))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://giantleap") as client,
    ):
        job = (await client.post("/generate", json={"prompt": "a"}, headers={"Prefer": "respond-async"})).json()
        await client.delete(job["status_url"])
        seen: list[JobEvent] = []
        for _ in range(5):  # as a browser: connect again with the last id until 204
            headers = {"Last-Event-ID": seen[-1].id} if seen else {}
            response = await client.get(job["events_url"], headers=headers)
            if response.status_code == 204:
                break
            seen += parse(response.text)
        assert response.status_code == 204 and [event.name for event in seen] == ["queued", "done"]


async def test_an_id_of_another_stream_is_malformed(bundle_dir: Path) -> None:
    response = await collect(FakeProducer(event_list=EVENTS), bundle_dir, {"Last-Event-ID": "nonsense"})
    assert response.status_code == 400 and response.headers["content-type"] == "application/problem+json"
    assert read_last_event_id(None) == read_last_event_id("") == "0-0"
    for bad in ("1", "1-", "$", "1-2\n", "9" * 30 + "-0", "9" * 20 + "-0", "0-" + "9" * 20):
        with pytest.raises(MalformedRequest):
            read_last_event_id(bad)


def test_a_block_holds_one_line_of_data() -> None:
    assert to_block("stage", {"text": "two\nlines"}, "1-0") == (
        'id: 1-0\nevent: stage\ndata: {"text":"two\\nlines"}\n\n'
    )


async def test_a_quiet_stream_is_kept_alive() -> None:
    producer = FakeProducer(event_list=EVENTS[:1], endless_events=True)
    stream = stream_events(producer.events("job"), asyncio.Event(), heartbeat_s=0.02)
    blocks = [await anext(stream) for _ in range(5)]
    assert parse("".join(blocks)) == EVENTS[:1]
    assert blocks[-2:] == [": heartbeat\n\n"] * 2
    await stream.aclose()
    assert producer.open_events == 0, "the source was closed with the stream"


async def test_a_stream_ends_when_the_process_stops() -> None:
    producer, stopping = FakeProducer(endless_events=True), asyncio.Event()
    stream = stream_events(producer.events("job"), stopping)
    await anext(stream)
    pending = asyncio.ensure_future(anext(stream, "end"))
    await asyncio.sleep(0.02)
    stopping.set()
    assert await asyncio.wait_for(pending, 60) == "end"
    assert producer.open_events == 0


async def test_a_stream_whose_store_is_lost_ends_for_the_client_to_come_back() -> None:
    producer = FakeProducer(event_list=EVENTS[:2], endless_events=True)
    stream = stream_events(producer.events("job"), asyncio.Event())
    blocks = [await anext(stream) for _ in range(3)]
    producer.outage = NotReady("Redis does not answer")
    blocks += [block async for block in stream]
    assert parse("".join(blocks)) == EVENTS[:2] and blocks[-1].startswith(": not_ready")


async def test_a_client_that_leaves_closes_its_stream(bundle_dir: Path) -> None:
    job = stored_job()
    producer = FakeProducer(event_list=EVENTS[:1], endless_events=True, records={job.id: stay_queued(job)})
    app = create_app(read_settings(bundle=(bundle_dir,)), producer)  # type: ignore[arg-type]
    with live_server(app) as url:
        async with httpx.AsyncClient() as client:
            async with client.stream("GET", f"{url}/jobs/{job.id}/events", timeout=60) as response:
                lines = response.aiter_lines()
                while await anext(lines) != "event: queued":
                    pass
                assert producer.open_events == 1
            deadline_s = time.monotonic() + 60
            while producer.open_events and time.monotonic() < deadline_s:
                await asyncio.sleep(0.01)
    assert producer.open_events == 0


async def test_events_come_through_redis_as_they_happen(settings: Settings, bundle_dir: Path) -> None:
    settings = settings.model_copy(update={"bundle": (bundle_dir,)})
    app = create_app(settings)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://giantleap") as client,
    ):
        posted = await client.post("/generate", json={"prompt": "a"}, headers={"Prefer": "respond-async"})
        url = posted.json()["status_url"]
        assert posted.status_code == 202
        reading = asyncio.create_task(client.get(f"{url}/events"))
        await asyncio.sleep(0.1)
        canceled = await client.delete(url)
        assert canceled.json()["status"] == "canceled"
        events = parse((await asyncio.wait_for(reading, 60)).text)
    assert [event.name for event in events] == ["queued", "done"]
    assert events[0].data == {"position": 0} and events[1].data == {"state": "canceled"}


SERVE = """
import sys, uvicorn
from pathlib import Path
from giantleap.service.api.app import create_app
from giantleap.service.settings import read_settings
settings = read_settings(bundle=(Path(sys.argv[1]),), redis_url=sys.argv[2], key_prefix=sys.argv[3])
uvicorn.run(create_app(settings), port=int(sys.argv[4]), log_config=None, timeout_graceful_shutdown=20)
"""


async def _lines(url: str) -> AsyncIterator[str]:
    async with httpx.AsyncClient(timeout=60) as client, client.stream("GET", url) as response:
        async for line in response.aiter_lines():
            yield line


async def test_sigterm_ends_streams_and_waits_at_once(settings: Settings, bundle_dir: Path) -> None:
    port = free_port()
    argv = [sys.executable, "-c", SERVE, str(bundle_dir), str(settings.redis_url), settings.key_prefix, str(port)]
    process = subprocess.Popen(argv)
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=60) as caller:
            deadline_s = time.monotonic() + 90
            while time.monotonic() < deadline_s:
                try:
                    assert (await caller.get("/livez")).status_code == 200
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.1)
            job = (await caller.post("/generate", json={"prompt": "a"}, headers={"Prefer": "respond-async"})).json()
            lines = _lines(url + job["events_url"])
            assert (await anext(lines)).startswith("retry")
            waiting = asyncio.create_task(caller.post("/generate", json={"prompt": "a"}))
            while 'queue_depth{bundle="paper",priority="high"} 2.0' not in (await caller.get("/metrics")).text:
                await asyncio.sleep(0.02)
            os.kill(process.pid, signal.SIGTERM)
            response = await waiting
            assert response.status_code == 503 and response.json()["job_id"]
            assert [line async for line in lines if line.startswith("event")] == ["event: queued"]
            process.wait(120)  # a job waits 300 s, a stream as long as it likes
    finally:
        process.kill()
        process.wait()
