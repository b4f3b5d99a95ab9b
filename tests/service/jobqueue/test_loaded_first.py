"""Which jobs a worker takes that has a part of its bundles in memory: those of loaded ones, or all of one other."""

import asyncio
from collections.abc import Sequence

import pytest
import redis

from giantleap.service.jobqueue.claims import LoadedBundles
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.job import Job, Priority
from giantleap.service.settings import Settings
from tests.redis_fixtures import ConsumerOpener, ProducerOpener, Put

BUNDLES = ("a", "b", "c", "d")
LOADED = LoadedBundles(("a", "b"), go_first=True)
OLDEST = LoadedBundles(("a", "b"), go_first=False)


@pytest.fixture
def worker(open_consumer: ConsumerOpener) -> JobConsumer:
    return open_consumer(bundles=BUNDLES)


def put_each(put: Put, bundles: str, priority: Priority = Priority.HIGH) -> list[Job]:
    return [put(priority, bundle=bundle) for bundle in bundles]


def take(worker: JobConsumer, loaded: LoadedBundles, max_jobs: int = 8) -> str:
    return "".join(sorted(claim.job.bundle for claim in worker.claim(max_jobs, 0.0, loaded)))


@pytest.mark.parametrize(
    ("waiting", "loaded", "expected"),
    [
        pytest.param("cdcabab", LOADED, ["aabb", "cc", "d", ""], id="loaded first, then the oldest one other"),
        pytest.param("cdcabab", OLDEST, ["cc", "d", "aabb", ""], id="the oldest"),
        pytest.param("acdbc", OLDEST, ["ab", "cc", "d"], id="the oldest is loaded"),
        pytest.param("dcdc", LOADED, ["dd", "cc"], id="none is loaded"),
    ],
)
def test_a_claim_has_jobs_of_loaded_bundles_or_of_one_other(
    put: Put, worker: JobConsumer, waiting: str, loaded: LoadedBundles, expected: Sequence[str]
) -> None:
    put_each(put, waiting)
    assert [take(worker, loaded) for _ in expected] == expected


def test_a_priority_goes_before_a_loaded_bundle(put: Put, worker: JobConsumer) -> None:
    put_each(put, "aa", Priority.LOW)
    put_each(put, "c")
    assert [take(worker, LOADED), take(worker, LOADED)] == ["c", "aa"]


def test_jobs_of_low_priority_join_those_of_their_bundle(put: Put, worker: JobConsumer) -> None:
    put_each(put, "cd", Priority.LOW)
    put_each(put, "c")
    assert take(worker, LOADED) == "cc"


def test_a_steady_flow_of_loaded_bundles_leaves_the_oldest_job_waiting_no_longer_than_they_go_first(
    put: Put, worker: JobConsumer
) -> None:
    put_each(put, "d")
    for _ in range(5):
        put_each(put, "ab")
        assert take(worker, LOADED) == "ab"
    put_each(put, "ab")
    assert take(worker, OLDEST) == "d"


def test_a_job_that_was_given_back_is_taken_with_those_of_its_bundle(put: Put, worker: JobConsumer) -> None:
    put_each(put, "c")
    worker.release(worker.claim(1, 0.0, LOADED))
    put_each(put, "acd")
    assert [take(worker, LOADED) for _ in range(3)] == ["cc", "a", "d"]


def test_messages_of_canceled_jobs_leave_the_streams_of_bundles_that_nobody_asks_for(
    put: Put, worker: JobConsumer, redis_client: redis.Redis, settings: Settings, open_producer: ProducerOpener
) -> None:
    [job] = put_each(put, "c")

    async def cancel() -> None:
        async with open_producer() as producer:
            await producer.cancel(job.id)

    asyncio.run(cancel())
    put_each(put, "a")
    stream = Keys(settings.key_prefix).stream("c:high")
    assert redis_client.xlen(stream) == 1
    assert take(worker, LOADED) == "a"
    assert redis_client.xlen(stream) == 0


async def test_what_a_worker_announces_is_known_before_its_next_heartbeat(
    open_consumer: ConsumerOpener, open_producer: ProducerOpener
) -> None:
    worker = open_consumer(bundles=BUNDLES, visibility_timeout_s=3600.0)
    for loaded in (("a",), ("a", "b"), ()):
        worker.announce(Device("cpu", 1, 0, {name: {} for name in BUNDLES}, loaded=loaded))
        async with open_producer() as producer:
            assert [device.loaded for device in producer.devices] == [loaded]
