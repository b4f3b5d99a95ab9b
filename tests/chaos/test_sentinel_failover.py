"""A master that dies under load is replaced by Sentinel; what asynchronous replication can lose, and what bounds it."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from giantleap.service.errors import NotFound, NotReady
from giantleap.service.jobqueue.client import open_async_redis, open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import GenerateParams, Job, JobState, Priority, ResultFile
from giantleap.service.settings import Settings, read_settings
from tests.service.redis_groups import Server, sentinels
from tests.waiting import wait_until

pytestmark = pytest.mark.chaos

NEEDS_REPLICA = ("min-replicas-to-write 1", "min-replicas-max-lag 2")


def make_job() -> Job:
    params = GenerateParams("a red ball", "", 2, 64, 64, 4, 1.0, 7, 1, "png")
    return Job(f"job-{time.monotonic_ns()}", "pocket", priority=Priority.HIGH, created_at_s=time.time(), params=params)


def settings_of(watchers: list[Server]) -> Settings:
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in watchers)
    return read_settings(
        redis_url=f"redis+sentinel://{hosts}/jobs", visibility_timeout_s=10, queue_limit=100_000, job_ttl_s=600
    )


@contextmanager
def working(settings: Settings) -> Iterator[None]:
    """A worker in a thread that ends each job at once with its id as the result."""
    stop = threading.Event()

    def work() -> None:
        assert settings.redis_url is not None
        consumer = JobConsumer(open_redis(settings.redis_url), settings, ["pocket"], "w")
        consumer.open()
        while not stop.is_set():
            for claim in consumer.claim(4, 0.5):
                result = claim.job.id.encode()
                consumer.complete(claim, [(ResultFile("text/plain", len(result)), result)], {}, [])
        consumer.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(120)
        assert not thread.is_alive()


class Load:
    """Enqueues jobs without pause and keeps when each was acknowledged."""

    def __init__(self, producer: JobProducer) -> None:
        self.producer = producer
        self.accepted_s: dict[str, float] = {}
        self.refused = 0
        self.stopping = False

    async def run(self) -> None:
        while not self.stopping:
            job = make_job()
            try:
                await self.producer.enqueue(job)
                self.accepted_s[job.id] = time.monotonic()
            except NotReady:
                self.refused += 1
            await asyncio.sleep(0.01)


async def await_accepted(load: Load, after_s: float, number: int) -> None:
    deadline_s = time.monotonic() + 120
    while sum(accepted_s > after_s for accepted_s in load.accepted_s.values()) < number:
        assert time.monotonic() < deadline_s, "jobs are accepted again"
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("options", [(), NEEDS_REPLICA], ids=["any", "needs-replica"])
async def test_jobs_outlive_a_failover_but_for_those_of_its_last_moment(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    async def scenario(master: Server, settings: Settings) -> None:
        assert settings.redis_url is not None
        client = open_async_redis(settings.redis_url)
        producer = JobProducer(client, settings)
        await producer.open()
        load = Load(producer)
        loads = [asyncio.create_task(load.run()) for _ in range(3)]
        await await_accepted(load, 0.0, 100)
        master.kill()
        killed_s = time.monotonic()
        await asyncio.sleep(5)  # longer than down-after: the replica is promoted before the old master returns
        master.start()
        await await_accepted(load, killed_s + 0.5, 100)
        load.stopping = True
        await asyncio.gather(*loads)
        lost, first_s = [], min(accepted_s for accepted_s in load.accepted_s.values() if accepted_s > killed_s + 0.5)
        for job_id, accepted_s in load.accepted_s.items():
            try:
                record = await producer.wait(job_id, 120.0)
            except NotFound:
                lost.append(accepted_s)
                continue
            assert record.state is JobState.SUCCEEDED
            assert await producer.read_result(job_id, 0) == job_id.encode()
            assert [event.name async for event in producer.events(job_id)].count("done") == 1
        print(
            f"\nfailover: {len(load.accepted_s)} accepted, {load.refused} refused, first one after "
            f"{first_s - killed_s:.1f} s, {len(lost)} lost, all within "
            f"{max((killed_s - each for each in lost), default=0.0):.3f} s before the kill"
        )
        assert all(killed_s - 1.0 < each <= killed_s + 0.5 for each in lost), "only what was not yet replicated"
        await producer.close()
        await client.aclose()

    with sentinels(tmp_path, *options) as (master, _, watchers):
        settings = settings_of(watchers)
        with working(settings):
            await scenario(master, settings)


def _has_written(server: Server) -> bool:
    state = server.client.info("persistence")
    names = ("aof_rewrite_in_progress", "aof_rewrite_scheduled", "aof_buffer_length")
    return state["aof_enabled"] == 1 and not any(state[name] for name in names)


async def test_what_the_replica_has_not_got_is_lost_with_the_master(tmp_path: Path) -> None:
    async def scenario(master: Server, replica: Server, settings: Settings) -> None:
        assert settings.redis_url is not None
        client = open_async_redis(settings.redis_url)
        producer = JobProducer(client, settings)
        await producer.open()
        kept, lost = make_job(), make_job()
        await producer.enqueue(kept)
        assert master.client.wait(1, 30_000) == 1
        # A replica acknowledges what its file does not hold yet, and just after a synchronization it has no file.
        await asyncio.to_thread(wait_until, lambda: _has_written(replica), "the replica's file")
        replica.kill()
        await producer.enqueue(lost)
        master.kill()
        replica.start()
        await asyncio.to_thread(
            wait_until, lambda: replica.client.info("replication")["role"] == "master", "a new master"
        )
        deadline_s = time.monotonic() + 60
        while True:
            try:
                records = [await producer.get(kept.id), await producer.get(lost.id)]
                break
            except NotReady:
                assert time.monotonic() < deadline_s
        assert records[0] is not None and records[1] is None, "acknowledged, and gone"
        await producer.close()
        await client.aclose()

    with sentinels(tmp_path) as (master, replica, watchers):
        await scenario(master, replica, settings_of(watchers))


async def test_a_master_that_needs_a_replica_refuses_jobs_without_one(tmp_path: Path) -> None:
    async def scenario(replica: Server, settings: Settings) -> None:
        assert settings.redis_url is not None
        client = open_async_redis(settings.redis_url)
        producer = JobProducer(client, settings)
        await producer.open()
        await producer.enqueue(make_job())
        replica.kill()
        deadline_s = time.monotonic() + 60
        with pytest.raises(NotReady):
            while time.monotonic() < deadline_s:
                await producer.enqueue(make_job())
                await asyncio.sleep(0.1)
        replica.start()
        while True:
            try:
                await producer.enqueue(make_job())
                break
            except NotReady:
                assert time.monotonic() < deadline_s + 60
                await asyncio.sleep(0.1)
        await producer.close()
        await client.aclose()

    with sentinels(tmp_path, *NEEDS_REPLICA) as (_, replica, watchers):
        await scenario(replica, settings_of(watchers))
