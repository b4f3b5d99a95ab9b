"""A load of minutes on a real Redis: the lease holds, a cancel acts meanwhile, and a failed load is tried again."""

import asyncio
import threading

from giantleap.models.bundle.bundle import BundleError
from giantleap.service.jobs.job import JobState
from giantleap.service.settings import Settings
from tests.redis_fixtures import ConsumerOpener, JobMaker, ProducerOpener, Put
from tests.service.fakes import open_worker
from tests.service.worker.test_bundles import Opener, make_cache

WITHIN_S = 120.0


def test_a_job_keeps_its_lease_through_a_long_load_and_is_canceled_within_it(
    settings: Settings, put: Put, open_consumer: ConsumerOpener, open_producer: ProducerOpener
) -> None:
    job, stop, taken = put(bundle="a"), threading.Event(), []
    worker, other = open_consumer(("a",)), open_consumer(("a",), consumer="other")

    async def cancel() -> JobState:
        async with open_producer() as producer:
            await producer.cancel(job.id)
            return (await producer.wait(job.id, WITHIN_S)).state

    def load(name: str) -> None:
        taken.extend(other.claim(1, 2.4 * settings.visibility_timeout_s))
        states.append(asyncio.run(cancel()))
        stop.set()

    states: list[JobState] = []
    open_worker(None, worker, settings, bundles=make_cache(Opener(load), "a"), stop=stop)[0].run()
    assert taken == [] and states == [JobState.CANCELED]


async def test_a_job_whose_bundle_was_not_loaded_runs_again_and_succeeds(
    settings: Settings, make_job: JobMaker, open_consumer: ConsumerOpener, open_producer: ProducerOpener
) -> None:
    job, stop, failures = make_job(bundle="a"), threading.Event(), ["once"]

    def fail_once(name: str) -> None:
        if failures:
            raise BundleError(failures.pop())

    async with open_producer() as producer:
        await producer.enqueue(job)
        cache = make_cache(Opener(fail_once), "a")
        worker, _ = open_worker(None, open_consumer(("a",)), settings, bundles=cache, stop=stop)
        running = asyncio.create_task(asyncio.to_thread(worker.run))
        record = await producer.wait(job.id, WITHIN_S)
        stop.set()
        await running
        events = [event.name async for event in producer.events(job.id)]
    assert record.state is JobState.SUCCEEDED and record.stages["load"] > 0
    assert [name for name in events if name in ("loading", "retrying", "done")] == [
        "loading",
        "retrying",
        "loading",
        "done",
    ]
