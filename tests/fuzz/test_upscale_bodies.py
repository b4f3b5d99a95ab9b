"""Mutated bodies against the real app and a real Redis: each is queued or refused in the route's own error form."""

import asyncio
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator

import psutil
import pytest
from fastapi import FastAPI

from giantleap.service.api.app import create_app
from giantleap.service.api.problems import CLIENT_GONE, PROBLEM_TYPE
from giantleap.service.jobqueue.client import open_async_redis
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.settings import Settings, read_settings
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis
from tests.fuzz.asgi import Got, ask
from tests.fuzz.bodies import Sent, draw_request
from tests.service.paper_bundle import write_paper_bundle

MEMBERS = {"type", "title", "status", "detail", "code", "instance", "retryable"}
GROWTH_MIB = 50
_FLUSH_EVERY = 200


@pytest.fixture(scope="module")
def fuzz_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    root = tmp_path_factory.mktemp("fuzz")
    server = EmbeddedRedis(appendfsync="everysec")
    url = server.start(root / "redis")
    bundle_dir = write_paper_bundle(root / "paper")
    yield read_settings(
        redis_url=url, key_prefix="fuzz", bundle=(bundle_dir,), max_body_bytes=1 << 20, max_image_px=1 << 20
    )
    server.stop()


def judge(sent: Sent, got: Got) -> str:
    """What became of a request; fails where it is not queued and not refused as it should be."""
    if got.status == 202:
        return "queued"
    if got.status == CLIENT_GONE:  # a front that waits for the job: the sender is gone when its body is sent
        return "queued, then left"
    assert 400 <= got.status < 500, f"{sent.name}: {got.status} {got.body[:300]!r}"
    body = json.loads(got.body)
    if sent.path.startswith("/v2/"):
        assert set(body) == {"error"}, f"{sent.name}: {body}"
        return str(got.status)
    assert got.headers["content-type"] == PROBLEM_TYPE, f"{sent.name}: {got.headers}"
    assert set(body) >= MEMBERS and body["status"] == got.status, f"{sent.name}: {body}"
    return str(body["code"])


async def run(settings: Settings, numbers: range) -> tuple[Counter[str], list[int]]:
    """What became of each request, and the process' memory (bytes) after each tenth of them."""
    assert settings.redis_url is not None
    client = open_async_redis(settings.redis_url)
    producer = JobProducer(client, settings)
    await producer.open()
    app: FastAPI = create_app(settings, producer)
    ends: Counter[str] = Counter()
    rss_bytes = []
    process = psutil.Process()
    for number in numbers:
        sent = draw_request(number)
        if not sent.path.startswith("/v2/"):
            sent.headers["prefer"] = "respond-async"
        cuts = (number % 61, number % 997) if number % 3 == 0 else ()
        ends[f"{sent.path}: {judge(sent, await asyncio.wait_for(ask(app, sent, cuts), 60))}"] += 1
        if number % _FLUSH_EVERY == 0:
            await client.flushall()  # the queue never fills: every request goes the whole way
        if (number + 1) % (len(numbers) // 10) == 0:
            gc.collect()
            rss_bytes.append(process.memory_info().rss)
    await producer.close()
    await client.aclose()
    return ends, rss_bytes


# Starlette leaves the spooled file of a broken form to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_500_mutated_bodies_are_queued_or_refused(fuzz_settings: Settings) -> None:
    ends, _ = await run(fuzz_settings, range(500))
    assert ends.total() == 500
    assert ends["/upscale: queued"] > 20, "the run must reach the queue"
    assert {code.partition(": ")[2] for code in ends} >= {
        "malformed_request", "invalid_request", "unsupported_media_type", "payload_too_large"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(1200)
async def test_20000_mutated_bodies_leave_the_memory_as_it_was(
    fuzz_settings: Settings, record_property: Callable[[str, object], None]
) -> None:
    ends, rss_bytes = await run(fuzz_settings, range(20_000))
    record_property("bodies", ends.total())
    record_property("memory after 2,000 and all, MiB", [rss_bytes[0] >> 20, rss_bytes[-1] >> 20])
    record_property("ends", dict(ends.most_common()))
    print("\n".join(f"{count:>6} {end}" for end, count in ends.most_common()))
    growth_mib = (rss_bytes[-1] - rss_bytes[0]) / (1 << 20)
    print(f"memory after 2,000 and after 20,000 bodies: {rss_bytes[0] >> 20} and {rss_bytes[-1] >> 20} MiB")
    assert growth_mib < GROWTH_MIB
