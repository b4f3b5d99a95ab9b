"""Every form of a Redis URL, and the whole queue on a real cluster of three nodes."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis

from giantleap.service.errors import BadConfiguration, NotReady
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.client import open_async_redis, open_redis, read_address
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import Job, JobError, JobState, ResultFile
from giantleap.service.settings import Settings, read_settings
from tests.ports import free_ports
from tests.service.redis_groups import Server, cluster, is_whole
from tests.streams import close_stream
from tests.waiting import wait_until

SECRET = "open-sesame"
EMPTY = {b"HELLO": b"%0\r\n", b"SENTINEL": b"*0\r\n"}  # replies in RESP3


@pytest.mark.parametrize("url", ["redis://h:1/2", "rediss://h", "unix:///run/redis.sock?db=1"])
def test_urls_of_one_server_are_left_to_redis_py(url: str) -> None:
    address = read_address(url)
    assert (address.kind, address.url) == ("server", url)


@pytest.mark.parametrize("opened", [open_redis, open_async_redis])
def test_a_url_of_a_socket_of_the_file_system_makes_connections(opened: Any) -> None:
    made = opened("unix:///run/redis.sock?db=1").connection_pool.make_connection()
    assert (made.path, made.db, made.socket_timeout) == ("/run/redis.sock", 1, 10.0)


def test_a_sentinel_url_names_hosts_service_database_and_logins() -> None:
    address = read_address("redis+sentinel://me:p%40ss@a,b:7000,[::1]/jobs/3?sentinel_password=s")
    assert (address.kind, address.tls, address.service, address.db) == ("sentinel", False, "jobs", 3)
    assert address.hosts == (("a", 26379), ("b", 7000), ("::1", 26379))
    assert address.login == {"username": "me", "password": "p@ss"}
    assert address.sentinel_login == {"password": "s"}


@asynccontextmanager
async def ignorant_sentinel() -> AsyncIterator[tuple[str, list[asyncio.Event]]]:
    """A sentinel that knows no master: its URL, and an event for each connection, set when the client has closed it."""
    closed: list[asyncio.Event] = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        closed.append(asyncio.Event())
        ended = closed[-1]
        while received := await reader.read(4096):
            for command in received.split(b"\r\n*"):
                writer.write(next((reply for name, reply in EMPTY.items() if name in command), b"+OK\r\n"))
        await close_stream(writer)
        ended.set()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        yield f"redis+sentinel://127.0.0.1:{server.sockets[0].getsockname()[1]}/jobs", closed


async def test_a_closed_client_has_no_connection_to_a_sentinel() -> None:
    async with ignorant_sentinel() as (url, closed):
        client = open_async_redis(url)
        with pytest.raises(redis.ConnectionError):
            await client.ping()
        await client.aclose()
        for_threads = open_redis(url)
        with pytest.raises(redis.ConnectionError):
            await asyncio.to_thread(for_threads.ping)
        for_threads.close()
        assert len(closed) >= 2
        await asyncio.wait_for(asyncio.gather(*(each.wait() for each in closed)), timeout=10)


def test_a_cluster_url_names_hosts_and_login() -> None:
    address = read_address("rediss+cluster://:pass@a:7000,b")
    assert (address.kind, address.tls, address.hosts) == ("cluster", True, (("a", 7000), ("b", 6379)))
    assert address.login == {"password": "pass"}


@pytest.mark.parametrize(
    "url",
    [
        "localhost:6379",
        f"http://u:{SECRET}@h",
        f"redis+sentinel://u:{SECRET}@h",
        f"redis+sentinel://u:{SECRET}@h/jobs/zero",
        f"redis+sentinel://u:{SECRET}@h/jobs?db=1",
        f"redis+sentinel://u:{SECRET}@h:port/jobs",
        f"redis+cluster://u:{SECRET}@h/1",
        f"redis+cluster://u:{SECRET}@a,,b",
        f"redis://u:{SECRET}@h:port",
        f"redis+other://u:{SECRET}@h",
        f"redis://u:{SECRET}@[::1/0",
        f"redis+cluster://u:{SECRET}@[::1,h",
        f"redis+sentinel://u:{SECRET}@h,[::1/jobs",
        f"redis+sentinel://u:{SECRET}/@h/jobs",
        f"redis+sentinel://u:p@h/jobs?sentinel_password&{SECRET}",
        f"redis://u:{SECRET}\u2100@h/0",
        f"redis+cluster://u:{SECRET}\u2100@h",
    ],
)
@pytest.mark.parametrize("opened", [open_redis, open_async_redis])
def test_a_url_that_cannot_be_read_is_refused_without_its_secret(url: str, opened: Any) -> None:
    with pytest.raises(BadConfiguration, match="Redis URL") as refused:
        opened(url)
    assert SECRET not in refused.value.detail


def test_clients_connect_and_read_within_bounded_times() -> None:
    urls = ("redis://:p@h/0", "redis+sentinel://:p@h/jobs")
    for client in (*map(open_redis, urls), *map(open_async_redis, urls), open_async_redis("redis+cluster://:p@h")):
        options: dict[str, Any] = client.get_connection_kwargs()
        assert 0 < options["socket_connect_timeout"] <= 5 and 0 < options["socket_timeout"] <= 10
        assert options["password"] == "p"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    with cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


def cluster_settings(nodes: list[Server], prefix: str) -> Settings:
    url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    return read_settings(redis_url=url, key_prefix=prefix, visibility_timeout_s=10, retry_backoff_s=0.1, job_ttl_s=60)


def prefix_on(node: int, nodes: list[Server]) -> str:
    """A key prefix whose slot that node has: all keys of one queue lie in one slot."""
    names = (f"queue-{number}" for number in range(1000))
    share = range(node * 16384 // 3, (node + 1) * 16384 // 3)
    return next(n for n in names if nodes[0].client.execute_command("CLUSTER", "KEYSLOT", Keys(n).tag) in share)


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[tuple[JobProducer, JobConsumer]]:
    """Both ends of a queue."""
    assert settings.redis_url is not None
    client = open_async_redis(settings.redis_url)
    producer = JobProducer(client, settings)
    consumer = JobConsumer(open_redis(settings.redis_url), settings, ["pocket"], "w")
    await producer.open()
    consumer.open()
    try:
        yield producer, consumer
    finally:
        await producer.close()
        await asyncio.to_thread(consumer.close)
        await client.aclose()


def claim_one(consumer: JobConsumer) -> Claim:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        if claimed := consumer.claim(1, 1.0):
            return claimed[0]
    raise AssertionError("nothing to claim")


def end(consumer: JobConsumer, bodies: list[bytes | None]) -> None:
    """One job succeeds with an event and a result, one fails, one is released."""
    for ended in ("complete", "fail", "release"):
        claim = claim_one(consumer)
        bodies.append(claim.body)
        if ended == "complete":
            consumer.emit(claim, "step", {"step": 1, "steps": 1})
            assert consumer.find_canceled([claim]) == set()
            assert consumer.complete(claim, [(ResultFile("text/plain", 3), b"abc")], {}, [])
        elif ended == "fail":
            assert consumer.fail(claim, JobError("job_failed", "no"), {})
        else:
            consumer.release([claim])


@pytest.mark.parametrize("node", [0, 1, 2])
async def test_the_whole_life_of_jobs_on_a_cluster(
    node: int, nodes: list[Server], make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = cluster_settings(nodes, prefix_on(node, nodes))
    keys = Keys(settings.key_prefix)
    monkeypatch.setattr("giantleap.service.jobqueue.producer._POLL_S", 300.0)  # a wait that ends is one that was woken

    async with opened(settings) as (producer, consumer):

        def subscribed() -> bool:
            return any(dict(each.client.pubsub_numsub(keys.done_channel))[keys.done_channel] for each in nodes)

        await asyncio.to_thread(wait_until, subscribed, "the producer listens")
        done, failed, released = jobs = [make_job() for _ in range(3)]
        assert (await producer.enqueue(done, b"input", idempotency_key="k")).created
        assert not (await producer.enqueue(done, b"input", idempotency_key="k")).created
        for job in jobs[1:]:
            await producer.enqueue(job)
        waiting = asyncio.create_task(producer.wait(done.id, 200.0))
        bodies: list[bytes | None] = []
        await asyncio.to_thread(end, consumer, bodies)
        assert (await asyncio.wait_for(waiting, 60)).state is JobState.SUCCEEDED
        assert bodies == [b"input", None, None]
        assert await producer.read_result(done.id, 0) == b"abc"
        assert [event.name async for event in producer.events(done.id)] == ["queued", "started", "step", "done"]
        record = await producer.get(failed.id)
        assert record is not None and record.state is JobState.FAILED
        canceled = await producer.cancel(released.id)
        assert canceled is not None and canceled.state is JobState.CANCELED
        stats = await producer.stats()
        assert (stats.live_workers, stats.processing, stats.dead_lettered) == (1, 0, 1)
    names: dict[int, Any] = {each.port: each.client.keys("*") for each in nodes}
    assert [port for port in names if any(key.startswith(keys.tag) for key in names[port])] == [nodes[node].port]


async def test_a_node_that_dies_and_returns_is_waited_for(nodes: list[Server], make_job: Any) -> None:
    settings = cluster_settings(nodes, prefix_on(1, nodes))

    async def accept(producer: JobProducer, job: Job) -> None:
        deadline_s = time.monotonic() + 60
        while True:
            try:
                await producer.enqueue(job)
                return
            except NotReady:
                assert time.monotonic() < deadline_s, "the cluster is whole again"
                await asyncio.sleep(0.05)

    async with opened(settings) as (producer, consumer):
        before, after = make_job(), make_job()
        await producer.enqueue(before)
        await asyncio.sleep(1.5)  # appendfsync everysec: what is older is on disk
        nodes[1].kill()
        with pytest.raises(NotReady):
            await producer.enqueue(after)
        nodes[1].start()
        await asyncio.to_thread(wait_until, lambda: all(map(is_whole, nodes)), "the cluster is whole")
        await accept(producer, after)
        for job in (before, after):
            claim = await asyncio.to_thread(claim_one, consumer)
            assert claim.job.id == job.id and await asyncio.to_thread(consumer.complete, claim, [], {}, [])
        assert (await producer.wait(after.id, 60)).state is JobState.SUCCEEDED


async def test_a_cluster_that_is_away_is_not_ready_and_its_password_stays_secret(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"redis+cluster://:{SECRET}@127.0.0.1:1"
    with pytest.raises(NotReady, match="no node") as away:
        open_redis(url, max_outage_s=0)
    assert SECRET not in str(away.value)
    client = open_async_redis(url)
    with pytest.raises(NotReady) as refused:
        await JobProducer(client, settings).ping()
    assert SECRET not in str(refused.value)
    await client.aclose()
    assert SECRET not in caplog.text and os.environ.get("GIANTLEAP_REDIS_URL") is None


async def test_a_worker_whose_redis_is_full_keeps_its_results_until_there_is_room(
    tmp_path_factory: pytest.TempPathFactory, make_job: Any
) -> None:
    server = Server(tmp_path_factory.mktemp("full") / "server", free_ports(1)[0], "maxmemory-policy noeviction")
    server.start()
    settings = read_settings(redis_url=f"redis://127.0.0.1:{server.port}/0", visibility_timeout_s=10, job_ttl_s=60)
    try:
        async with opened(settings) as (producer, consumer):
            job = make_job()
            await producer.enqueue(job)
            claim = await asyncio.to_thread(claim_one, consumer)
            server.client.config_set("maxmemory", 1)
            ending = asyncio.create_task(
                asyncio.to_thread(consumer.complete, claim, [(ResultFile("a", 1), b"a")], {}, [])
            )
            before = server.client.info("commandstats")["cmdstat_evalsha"]["failed_calls"]
            await asyncio.to_thread(
                wait_until,
                lambda: server.client.info("commandstats")["cmdstat_evalsha"]["failed_calls"] > before,
                "the worker was refused",
            )
            assert not ending.done()
            server.client.config_set("maxmemory", 0)
            assert await asyncio.wait_for(ending, 60)
            assert await producer.read_result(job.id, 0) == b"a"
    finally:
        server.kill()
