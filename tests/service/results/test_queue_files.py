"""The queue with a store: Redis holds records and keys, a job ends when its bytes are safe, no file stays behind."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from giantleap.service.api.sweeper import Sweeper
from giantleap.service.errors import QueueFull, StoreUnavailable
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.dead_letters import DeadLetters
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import GenerateParams, Job, JobError, JobState, ResultFile
from giantleap.service.results.concurrent import AsyncResultStore
from giantleap.service.results.files import FileStore
from giantleap.service.results.jobs import JobFiles
from giantleap.service.results.keys import PART_SUFFIX, new_keys
from giantleap.service.results.store import ResultStore, open_store
from giantleap.service.settings import Settings
from tests.redis_fixtures import ConsumerOpener, JobMaker, ProducerOpener

pytestmark = pytest.mark.anyio

RESULTS = [(ResultFile("image/png", 3, seed=7), b"png"), (ResultFile("image/webp", 4, seed=8), b"webp")]
LARGE = bytes(1 << 20)  # of every store
PAST_S = 7200.0


@dataclasses.dataclass(frozen=True, slots=True)
class StoredQueue:
    """A queue with its store: what every test here needs of both."""

    settings: Settings
    store: ResultStore
    make_job: JobMaker
    open_producer: ProducerOpener
    open_consumer: ConsumerOpener

    def names(self) -> list[str]:
        """The names of everything in the store."""
        batches = self.store.list_expired(self.settings.key_prefix, time.time() + 1e8)
        return sorted(name for batch in batches for name in batch)

    def sweeper(self, producer: JobProducer) -> Sweeper:
        return Sweeper(producer, AsyncResultStore(self.store, 1 << 20), self.settings)

    def put_old(self, job_id: str) -> str:
        """An object of a job whose time has passed long ago."""
        [key] = new_keys(self.settings.key_prefix, job_id, "result", 1, 60, time.time() - PAST_S)
        self.store.put(key, b"x", "image/png")
        return key


@pytest.fixture
def queue(
    settings: Settings, make_job: JobMaker, open_producer: ProducerOpener, open_consumer: ConsumerOpener
) -> StoredQueue:
    store = open_store(settings)
    assert store is not None
    return StoredQueue(settings, store, make_job, open_producer, open_consumer)


def take(worker: JobConsumer) -> Claim:
    [claim] = worker.claim(1, 30)
    return claim


async def test_results_lie_in_the_store_and_their_keys_in_the_record(queue: StoredQueue) -> None:
    job, worker = queue.make_job(num_images=2), queue.open_consumer()
    async with queue.open_producer() as producer:
        await producer.enqueue(job)
        assert worker.complete(take(worker), RESULTS, {}, []) is JobState.SUCCEEDED
        record = await producer.wait(job.id, 5, job)
        keys = [file.key for file in record.results]
        assert [await producer.read_result(job.id, index, key) for index, key in enumerate(keys)] == [b"png", b"webp"]
        assert queue.names() == sorted(map(str, keys))
        assert await producer.read_result(job.id, 0) is None, "Redis has none of it"
        assert (await producer.stats()).blob_bytes == 0


@pytest.mark.parametrize(("missing_bytes", "is_stored"), [(0, True), (1, False)], ids=["large", "small"])
async def test_a_large_input_lies_in_the_store_until_the_job_has_ended(
    queue: StoredQueue, missing_bytes: int, is_stored: bool
) -> None:
    worker, body = queue.open_consumer(), bytes(queue.store.large_input_bytes - missing_bytes)
    async with queue.open_producer() as producer:
        job = queue.make_job()
        await producer.enqueue(job, body)
        assert len(queue.names()) == is_stored
        assert (await producer.stats()).blob_bytes == (0 if is_stored else len(body))
        assert await producer.read_input(job.id) == body
        claim = take(worker)
        assert claim.body == body
        worker.complete(claim, [], {}, [])
        assert queue.names() == []
        assert (await producer.stats()).blob_bytes == 0


async def test_an_input_of_a_job_that_was_not_added_is_deleted(queue: StoredQueue) -> None:
    job = queue.make_job()
    async with queue.open_producer(queue_limit=1) as producer:
        assert (await producer.enqueue(job, LARGE, "key")).created
        kept = queue.names()
        assert not (await producer.enqueue(dataclasses.replace(job), LARGE, "key")).created
        for _ in range(2):  # the second is refused before its body is sent
            with pytest.raises(QueueFull):
                await producer.enqueue(queue.make_job(), LARGE)
        assert queue.names() == kept and len(kept) == 1


async def test_a_worker_that_is_late_leaves_no_file_and_overwrites_none(
    queue: StoredQueue, make_stale: Callable[[Claim], None]
) -> None:
    frozen, other = queue.open_consumer(lease=False, consumer="frozen"), queue.open_consumer(consumer="other")
    async with queue.open_producer() as producer:
        job = queue.make_job()
        await producer.enqueue(job)
        late = take(frozen)
        make_stale(late)
        assert other.complete(take(other), RESULTS[:1], {}, []) is JobState.SUCCEEDED
        before = queue.names()
        assert frozen.complete(late, [(RESULTS[0][0], b"late")], {}, []) is None
        record = await producer.get(job.id)
        assert record is not None and queue.names() == before == [record.results[0].key]
        assert await producer.read_result(job.id, 0, record.results[0].key) == b"png"


async def test_a_deleted_job_has_no_file(queue: StoredQueue) -> None:
    worker = queue.open_consumer(max_deliveries=1)
    async with queue.open_producer(max_deliveries=1) as producer:
        job, failed = queue.make_job(), queue.make_job()
        await producer.enqueue(job)
        worker.complete(take(worker), RESULTS, {}, [])
        await producer.enqueue(failed, LARGE)
        worker.fail(take(worker), JobError("job_failed", "no"))
        assert len(queue.names()) == 3, "the input of a job that failed is there for another attempt"
        assert await producer.delete(failed.id) is None and await producer.delete(job.id) is None
        assert queue.names() == []
        assert await producer.get(job.id) is None and await producer.delete(job.id) is None


async def test_a_dead_letter_with_a_stored_input_runs_again(queue: StoredQueue) -> None:
    worker = queue.open_consumer()
    async with queue.open_producer() as producer:
        job: Job = queue.make_job()
        assert isinstance(job.params, GenerateParams)
        job = dataclasses.replace(job, params=dataclasses.replace(job.params, strength=0.5))
        await producer.enqueue(job, LARGE)
        worker.fail(take(worker), JobError("job_failed", "no"))
        [letter] = await DeadLetters(producer).list(10)
        assert letter.has_input
        await DeadLetters(producer).retry(job.id)
        assert take(worker).body == LARGE


async def test_the_sweeper_deletes_orphans_whose_time_has_passed_and_nothing_else(queue: StoredQueue) -> None:
    """Orphans: of a job that never was, of one that ended otherwise, of an earlier attempt at one that has ended."""
    worker = queue.open_consumer()
    async with queue.open_producer() as producer:
        done, canceled, running = queue.make_job(), queue.make_job(), queue.make_job()
        await producer.enqueue(done)
        claim = take(worker)
        old = [(dataclasses.replace(RESULTS[0][0], key=queue.put_old(done.id)), b"")]
        worker._files = None  # the record names an object whose time has passed
        worker.complete(claim, old, {}, [])
        await producer.enqueue(canceled)
        await producer.cancel(canceled.id)
        await producer.enqueue(running)
        kept = [old[0][0].key or "", queue.put_old(running.id)]
        [fresh] = new_keys(queue.settings.key_prefix, "no-job", "input", 1, 60, time.time())
        queue.store.put(fresh, b"x", "image/png")
        orphans = [queue.put_old(each) for each in ("no-job", done.id, canceled.id)]
        assert await queue.sweeper(producer).sweep() == len(orphans)
        assert queue.names() == sorted([*kept, fresh])


async def test_results_expire_with_their_records(queue: StoredQueue) -> None:
    worker = queue.open_consumer(job_ttl_s=1)
    async with queue.open_producer(job_ttl_s=1) as producer:
        job = queue.make_job()
        await producer.enqueue(job)
        worker._files = JobFiles(queue.store, queue.settings.model_copy(update={"job_ttl_s": 1}))
        worker.complete(take(worker), RESULTS, {}, [])
        record = await producer.get(job.id)
        assert record is not None and record.results[0].key is not None
        swept = queue.sweeper(producer)
        while await producer.get(job.id) is not None:
            await swept.sweep()
            assert await producer.read_result(job.id, 0, record.results[0].key) == b"png" or not await producer.get(
                job.id
            ), "as long as there is a record, there are its bytes"
        while queue.names():
            await swept.sweep()


async def test_one_sweeper_works_at_a_time(queue: StoredQueue) -> None:
    async with queue.open_producer() as producer:
        first, second = (queue.sweeper(producer) for _ in range(2))
        assert await first.sweep() == 0
        queue.put_old("no-job")
        assert await second.sweep() == 0, "it is the other's turn"
        assert await first.sweep() == 1


class AwayStore(FileStore):
    """A store that is away while `is_away`."""

    is_away = False

    def _refuse(self) -> None:
        if self.is_away:
            raise StoreUnavailable("the store is away", retry_after_s=5)

    def put(self, key: str, content: bytes, content_type: str) -> None:
        self._refuse()
        super().put(key, content, content_type)

    def get(self, key: str) -> bytes | None:
        self._refuse()
        return super().get(key)

    def delete(self, keys: Sequence[str]) -> None:
        self._refuse()
        super().delete(keys)


@pytest.mark.parametrize("store_url", ["file"], indirect=True)
async def test_while_the_store_is_away_jobs_are_retried_and_none_is_lost_or_started_in_vain(
    open_producer: ProducerOpener, make_job: JobMaker, settings: Settings, tmp_path: Path
) -> None:
    store = AwayStore(tmp_path / "away", settings.key_prefix)
    assert settings.redis_url is not None
    client = open_redis(settings.redis_url)
    worker = JobConsumer(client, settings, ("pocket",), "w", files=JobFiles(store, settings))
    worker.open()
    try:
        async with open_producer() as producer:
            producer._files = AsyncResultStore(store, 1 << 20)
            job = make_job()
            await producer.enqueue(job, LARGE)
            store.is_away = True
            assert worker.claim(1, 0.1) == []
            record = await producer.get(job.id)
            assert record is not None and (record.state, record.deliveries) == (JobState.QUEUED, 0)
            store.is_away = False
            claim = take(worker)
            store.is_away = True
            with pytest.raises(StoreUnavailable) as caught:
                worker.complete(claim, RESULTS, {}, [])
            error = JobError(caught.value.code, caught.value.detail, caught.value.retryable)
            assert worker.fail(claim, error) is JobState.QUEUED
            with pytest.raises(StoreUnavailable):
                await producer.enqueue(make_job(), LARGE)
            store.is_away = False
            assert worker.complete(take(worker), RESULTS, {}, []) is JobState.SUCCEEDED
            store.is_away = True
            with pytest.raises(StoreUnavailable):
                await producer.delete(job.id)
            assert await producer.get(job.id) is not None, "what could not be deleted is still there"
    finally:
        worker.close()
        client.close()


@pytest.mark.parametrize("store_url", ["file"], indirect=True)
async def test_a_file_that_was_never_finished_is_an_orphan(queue: StoredQueue, tmp_path: Path) -> None:
    queue.put_old("no-job")
    [path] = [path for path in tmp_path.rglob("*result-*") if path.is_file()]
    path.rename(path.with_name(path.name + PART_SUFFIX))
    (path.parent / "somebody's").write_text("x")
    async with queue.open_producer() as producer:
        assert await queue.sweeper(producer).sweep() == 1
    assert [each.name for each in tmp_path.rglob("*") if each.is_file()] == ["somebody's"]
