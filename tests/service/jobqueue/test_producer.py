"""The producer's side against a real Redis, both the system's and the bundled one."""

import asyncio
import dataclasses
import logging
import time
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from giantleap.service.errors import InvalidRequest, MalformedRequest, NotFound, NotReady, QueueFull, StorageFull
from giantleap.service.jobqueue.backpressure import retry_after_s
from giantleap.service.jobqueue.client import open_async_redis
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import JobError, JobEvent, JobState, Priority, QueueStats, ResultFile
from giantleap.service.settings import Settings
from tests.redis_fixtures import SERVERS
from tests.waiting import wait_until

PNG = ResultFile("image/png", 3, seed=7)


@pytest.fixture(params=SERVERS)
def redis_url(request: pytest.FixtureRequest, start_server: Any) -> str:
    url: str = start_server(request.param)
    return url


def snapshot(client: redis.Redis, settings: Settings) -> dict[bytes, bytes | None]:
    """Every key of one test with its serialized value."""
    return {key: client.dump(key) for key in client.scan_iter(match=f"{{{settings.key_prefix}}}*")}


async def read_events(producer: JobProducer, job_id: str, last_event_id: str = "0-0") -> list[JobEvent]:
    return [event async for event in producer.events(job_id, last_event_id)]


async def test_enqueued_job_is_read_back_whole(open_producer: Any, make_job: Any) -> None:
    async with open_producer() as producer:
        job = dataclasses.replace(make_job(), warnings=("unknown word: zorp",))
        done = await producer.enqueue(job)
        record = await producer.get(job.id)
        assert (done.job_id, done.created, done.queue_position) == (job.id, True, 0)
        assert record is not None
        assert record.job == dataclasses.replace(job, created_at_s=record.job.created_at_s)
        assert record.state is JobState.QUEUED
        assert (record.queue_position, record.deliveries, record.started_at_s) == (0, 0, None)
        assert record.all_warnings == ("unknown word: zorp",)
        assert await producer.get("no-such-job") is None


async def test_queue_position_counts_high_priority_before_low(open_producer: Any, make_job: Any) -> None:
    async with open_producer() as producer:
        low = make_job(Priority.LOW)
        await producer.enqueue(low)
        positions = [(await producer.enqueue(make_job())).queue_position for _ in range(3)]
        assert positions == [0, 1, 2]
        record = await producer.get(low.id)
        assert record is not None and record.queue_position == 3


async def test_repeated_enqueue_of_one_job_adds_it_once(
    open_producer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        job = make_job()
        replies = [await producer.enqueue(job, b"latent") for _ in range(3)]
        assert [reply.created for reply in replies] == [True, False, False]
        assert {reply.job_id for reply in replies} == {job.id}
        assert redis_client.xlen(Keys(settings.key_prefix).stream("pocket:high")) == 1
        assert (await producer.stats()).blob_bytes == 6
        with pytest.raises(InvalidRequest):
            await producer.enqueue(job, b"another latent")


async def test_over_the_limit_nothing_is_written(
    open_producer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer(queue_limit=2) as producer:
        await producer.enqueue(make_job())
        await producer.enqueue(make_job(Priority.LOW, bundle="other"))
        before = snapshot(redis_client, settings)
        with pytest.raises(QueueFull) as refused:
            await producer.enqueue(make_job(), b"latent", idempotency_key="k")
        assert refused.value.retry_after_s is not None and 1 <= refused.value.retry_after_s <= 600
        assert snapshot(redis_client, settings) == before


async def test_over_the_blob_budget_nothing_is_written(
    open_producer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer(blob_budget_bytes=10) as producer:
        await producer.enqueue(make_job(), b"12345678")
        before = snapshot(redis_client, settings)
        with pytest.raises(StorageFull):
            await producer.enqueue(make_job(), b"123", idempotency_key="k")
        assert snapshot(redis_client, settings) == before


async def test_limit_is_exact_under_concurrent_producers(open_producer: Any, make_job: Any) -> None:
    async def try_one(producer: JobProducer, priority: Priority) -> bool:
        try:
            return (await producer.enqueue(make_job(priority))).created
        except QueueFull:
            return False

    async with open_producer(queue_limit=32) as one, open_producer(queue_limit=32) as two:
        tries = [try_one((one, two)[n % 2], (Priority.HIGH, Priority.LOW)[n // 2 % 2]) for n in range(96)]
        accepted = await asyncio.gather(*tries)
        assert sum(accepted) == 32
        assert sum((await one.stats()).queued.values()) == 32


async def test_delayed_retries_count_against_the_limit(open_producer: Any, open_consumer: Any, make_job: Any) -> None:
    async with open_producer(queue_limit=1) as producer:
        await producer.enqueue(make_job())
        worker = open_consumer(retry_backoff_s=60.0)
        [claim] = worker.claim(1, 1.0)
        assert worker.fail(claim, JobError("engine_fault", "lost device", retryable=True))
        with pytest.raises(QueueFull):
            await producer.enqueue(make_job())


async def test_concurrent_retries_under_one_key_make_one_job(
    open_producer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as one, open_producer() as two:
        tries = [(one, two)[n % 2].enqueue(make_job(), b"latent", idempotency_key="order 66") for n in range(40)]
        replies = await asyncio.gather(*tries)
        assert len({reply.job_id for reply in replies}) == 1
        assert sum(reply.created for reply in replies) == 1
        assert redis_client.xlen(Keys(settings.key_prefix).stream("pocket:high")) == 1


async def test_a_key_with_another_payload_is_refused(open_producer: Any, make_job: Any) -> None:
    async with open_producer() as producer:
        first = await producer.enqueue(make_job(seed=1), b"latent", idempotency_key="k")
        with pytest.raises(InvalidRequest):
            await producer.enqueue(make_job(seed=2), b"latent", idempotency_key="k")
        with pytest.raises(InvalidRequest):
            await producer.enqueue(make_job(seed=1), b"other", idempotency_key="k")
        again = await producer.enqueue(make_job(seed=1), b"latent", idempotency_key="k")
        assert (again.job_id, again.created) == (first.job_id, False)


async def test_canceled_queued_job_is_final_at_once_and_never_claimed(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        gone, queued = make_job(), make_job()
        await producer.enqueue(gone, b"latent")
        await producer.enqueue(queued)
        record = await producer.cancel(gone.id)
        assert record is not None
        assert (record.state, record.cancel_requested) == (JobState.CANCELED, True)
        assert (await producer.wait(gone.id, 5.0)).state is JobState.CANCELED
        assert [event.name for event in await read_events(producer, gone.id)] == ["queued", "done"]
        waiting = await producer.get(queued.id)
        assert waiting is not None and waiting.queue_position == 0
        assert (await producer.stats()).blob_bytes == 0
        stream = Keys(settings.key_prefix).stream("pocket:high")
        assert redis_client.xlen(stream) == 2, "the message stays, so that the group's lag stays known"
        assert [claim.job.id for claim in open_consumer().claim(8, 1.0)] == [queued.id]
        assert redis_client.xlen(stream) == 1
        [group] = redis_client.xinfo_groups(stream)
        assert group.get("lag", 0) == 0, "null where the server cannot tell"


async def test_cancel_leaves_a_final_job_as_it_is(open_producer: Any, open_consumer: Any, make_job: Any) -> None:
    async with open_producer() as producer:
        job = make_job()
        await producer.enqueue(job)
        worker = open_consumer()
        [claim] = worker.claim(1, 1.0)
        assert worker.complete(claim, [(PNG, b"png")], {"decode": 0.5}, ["late warning"])
        before = await producer.get(job.id)
        assert await producer.cancel(job.id) == before
        assert before is not None and not before.cancel_requested
        assert (before.stages, before.results, before.warnings) == ({"decode": 0.5}, (PNG,), ("late warning",))
        assert await producer.cancel("no-such-job") is None


async def test_a_crowd_is_refused_without_a_look_at_the_queue_for_each(
    open_producer: Any, make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_producer(queue_limit=1) as producer:
        await producer.enqueue(make_job())
        looks = 0
        stats = producer.stats

        async def counted() -> QueueStats:
            nonlocal looks
            looks += 1
            found: QueueStats = await stats()
            return found

        monkeypatch.setattr(producer, "stats", counted)
        for _ in range(40):
            with pytest.raises(QueueFull) as refused:
                await producer.enqueue(make_job())
            assert refused.value.retry_after_s == 1
        assert 1 <= looks < 40


async def test_the_end_of_a_job_wakes_its_waiters_and_not_a_poll(
    open_producer: Any, open_consumer: Any, make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("giantleap.service.jobqueue.producer._POLL_S", 600.0)
    async with open_producer() as producer:
        jobs = [make_job() for _ in range(5)]
        for job in jobs:
            await producer.enqueue(job)
        worker = open_consumer()
        waits = [asyncio.create_task(producer.wait(job.id, 300.0)) for job in jobs]
        await asyncio.sleep(0.2)
        for claim in await asyncio.to_thread(worker.claim, 5, 1.0):
            await asyncio.to_thread(worker.complete, claim, [(PNG, b"png")], {}, [])
            record = await asyncio.wait_for(waits[[job.id for job in jobs].index(claim.job.id)], 120)
            assert record.state is JobState.SUCCEEDED


async def test_wait_for_a_new_job_takes_its_end_from_the_message(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    channel = Keys(settings.key_prefix).done_channel
    monkeypatch.setattr("giantleap.service.jobqueue.producer._POLL_S", 600.0)  # no read but after the message
    async with open_producer() as producer:
        deadline_s = time.monotonic() + 30.0
        while redis_client.pubsub_numsub(channel)[0][1] == 0:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)
        reads: list[str] = []
        get = producer.get

        async def counted(job_id: str) -> Any:
            reads.append(job_id)
            return await get(job_id)

        monkeypatch.setattr(producer, "get", counted)
        worker = open_consumer()
        early, late = make_job(), make_job()
        await producer.enqueue(early)
        [claim] = await asyncio.to_thread(worker.claim, 1, 30.0)
        await asyncio.to_thread(worker.complete, claim, [(PNG, b"png")], {"encode": 0.5}, ["a word of warning"])
        while early.id not in producer._completions._outcomes:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)
        record = await producer.wait(early.id, 600.0, created=early)
        assert (record.state, record.warnings) == (JobState.SUCCEEDED, ("a word of warning",))
        assert record == await get(early.id)
        await producer.enqueue(late)
        waiting = asyncio.create_task(producer.wait(late.id, 600.0, created=late))
        [claim] = await asyncio.to_thread(worker.claim, 1, 30.0)
        await asyncio.to_thread(worker.fail, claim, JobError("job_failed", "it cannot be drawn"))
        assert await waiting == await get(late.id)
        assert reads == []


async def test_wait_takes_no_end_of_an_earlier_job_under_the_same_id(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        worker, job = open_consumer(), make_job()
        await producer.enqueue(job)
        [claim] = await asyncio.to_thread(worker.claim, 1, 30.0)
        await asyncio.to_thread(worker.fail, claim, JobError("job_failed", "it cannot be drawn"))
        assert (await producer.wait(job.id, 60.0, created=job)).state is JobState.FAILED
        redis_client.delete(Keys(settings.key_prefix).job(job.id))  # as when its time to live has passed
        assert (await producer.enqueue(job)).created
        assert (await producer.wait(job.id, 0.2, created=job)).state is JobState.QUEUED


async def test_wait_for_a_new_job_outlives_a_message_that_never_comes(
    open_producer: Any, open_consumer: Any, make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_producer() as producer:
        monkeypatch.setattr(producer._completions, "on_completion", lambda record: None)
        job = make_job()
        await producer.enqueue(job)
        worker = open_consumer()
        [claim] = await asyncio.to_thread(worker.claim, 1, 30.0)
        await asyncio.to_thread(worker.complete, claim, [(PNG, b"png")], {}, [])
        assert (await producer.wait(job.id, 30.0, created=job)).state is JobState.SUCCEEDED


async def test_wait_gives_the_latest_record_at_its_timeout(open_producer: Any, make_job: Any) -> None:
    async with open_producer() as producer:
        job = make_job()
        await producer.enqueue(job)
        started_s = time.perf_counter()
        assert (await producer.wait(job.id, 0.3)).state is JobState.QUEUED
        assert time.perf_counter() - started_s > 0.25
        with pytest.raises(NotFound):
            await producer.wait("no-such-job", 5.0)


async def test_waiters_share_one_connection(
    open_producer: Any, make_job: Any, redis_client: redis.Redis, start_server: Any
) -> None:
    def subscribed() -> int:
        return sum(int(client["sub"]) for client in redis_client.client_list())

    async with open_producer() as producer:
        job = make_job()
        await producer.enqueue(job)
        await asyncio.to_thread(wait_until, lambda: subscribed() == 1, "the producer listens")
        waits = [asyncio.create_task(producer.wait(job.id, 0.5)) for _ in range(20)]
        await asyncio.sleep(0.25)
        assert subscribed() == 1 and redis_client.info("clients")["blocked_clients"] == 0
        await asyncio.gather(*waits)


async def test_events_resume_after_any_of_them_and_end_after_done(
    open_producer: Any, open_consumer: Any, make_job: Any
) -> None:
    async with open_producer() as producer:
        job = make_job()
        await producer.enqueue(job)
        live = asyncio.create_task(read_events(producer, job.id))
        worker = open_consumer()
        [claim] = await asyncio.to_thread(worker.claim, 1, 1.0)
        for step in (1, 2):
            worker.emit(claim, "step", {"step": step, "steps": 2})
            await asyncio.sleep(0.02)
        worker.complete(claim, [], {}, [])
        events = await asyncio.wait_for(live, 30.0)
        assert [event.name for event in events] == ["queued", "started", "step", "step", "done"]
        assert events[2].data == {"step": 1, "steps": 2}
        assert events[-1].data == {"state": "succeeded"}
        for n, event in enumerate(events):
            assert await asyncio.wait_for(read_events(producer, job.id, event.id), 30.0) == events[n + 1 :]


async def test_events_refuse_a_malformed_id_and_an_unknown_job(open_producer: Any, make_job: Any) -> None:
    async with open_producer() as producer:
        job = make_job()
        await producer.enqueue(job)
        for bad in ("$", "later", "1-2-3", "", "-"):
            with pytest.raises(MalformedRequest):
                await read_events(producer, job.id, bad)
        with pytest.raises(NotFound):
            await read_events(producer, "no-such-job")


async def test_event_stream_keeps_no_more_than_its_limit_and_always_the_end(
    open_producer: Any, open_consumer: Any, make_job: Any
) -> None:
    async with open_producer() as producer:
        job = make_job()
        await producer.enqueue(job)
        worker = open_consumer(event_limit=16)
        [claim] = worker.claim(1, 1.0)
        for step in range(40):
            worker.emit(claim, "step", {"step": step, "steps": 40})
        worker.complete(claim, [], {}, [])
        events = await read_events(producer, job.id)
        assert len(events) == 16
        assert events[-1].name == "done"


async def test_stats_count_jobs_in_every_place(open_producer: Any, open_consumer: Any, make_job: Any) -> None:
    async with open_producer() as producer:
        worker = open_consumer(retry_backoff_s=60.0)
        for _ in range(4):
            await producer.enqueue(make_job(), b"1234")
        retried, dead, done, _running = worker.claim(4, 1.0)
        worker.fail(retried, JobError("engine_fault", "lost device", retryable=True))
        worker.fail(dead, JobError("invalid_request", "NaN in the latent"))
        worker.complete(done, [(PNG, b"png")], {}, [])
        await producer.enqueue(make_job(Priority.LOW))
        await asyncio.sleep(0.05)
        stats = await producer.stats()
        assert stats.queued[("pocket", Priority.LOW)] == 1
        assert sum(stats.queued.values()) == 1
        assert (stats.processing, stats.delayed, stats.dead_lettered) == (1, 1, 1)
        assert stats.live_workers == 1
        assert stats.blob_bytes == 2 * 4 + 3 + 4, "of two live jobs, a result, and a job that may be tried again"
        assert 0.04 < stats.oldest_age_s < 60.0
        assert stats.recent_job_median_s is not None and 0 < stats.recent_job_median_s < 60.0


async def test_every_key_has_a_ttl_or_a_known_cap_once_jobs_are_final(
    open_producer: Any, open_consumer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer() as producer:
        worker = open_consumer()
        for n in range(4):
            await producer.enqueue(make_job(), b"1234", idempotency_key=str(n))
        done, failed, canceled, stopped = worker.claim(4, 1.0)
        worker.complete(done, [(PNG, b"png")], {}, [])
        worker.fail(failed, JobError("invalid_request", "NaN in the latent"))
        await producer.cancel(stopped.job.id)
        worker.cancel(canceled)
        worker.cancel(stopped)
    tag = f"{{{settings.key_prefix}}}"
    capped = ("seen_ms", "lanes", "stream:", "blob_bytes", "blob_results", "blob_sizes", "durations", "dead")
    keys = list(redis_client.scan_iter(match=f"{tag}*"))
    lasting = {key.decode().removeprefix(f"{tag}:") for key in keys if redis_client.ttl(key) < 0}
    assert all(name.startswith(capped) for name in lasting), lasting
    names = {key.decode().removeprefix(f"{tag}:").partition(":")[0] for key in keys}
    assert {"job", "events", "result", "idempotency", "stream", "dead"} <= names
    assert [key for key in keys if b":input:" in key] == [f"{tag}:input:{failed.job.id}".encode()]


async def test_no_log_line_and_no_dead_letter_holds_a_prompt(
    open_producer: Any,
    open_consumer: Any,
    make_job: Any,
    redis_client: redis.Redis,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with open_producer(queue_limit=1) as producer:
        await producer.enqueue(make_job(prompt="violet secret"))
        with pytest.raises(QueueFull) as refused:
            await producer.enqueue(make_job(prompt="violet secret"))
        assert "violet" not in refused.value.detail
        slow, quick = open_consumer(lease=False, visibility_timeout_s=1.0), open_consumer(visibility_timeout_s=1.0)
        [late] = slow.claim(1, 1.0)
        await asyncio.sleep(1.1)
        [claim] = quick.claim(1, 60.0)
        assert not slow.complete(late, [], {}, [])
        quick.fail(claim, JobError("invalid_request", "NaN in the latent"))
    assert "ended too late" in caplog.text
    assert "violet" not in caplog.text
    assert "violet" not in str(redis_client.xrange(Keys(settings.key_prefix).dead))


async def test_unreachable_redis_is_not_ready(settings: Settings, make_job: Any) -> None:
    async with open_async_redis("redis://127.0.0.1:1/0") as client:
        producer = JobProducer(client, settings)
        await producer.open()  # a process may start before its Redis
        with pytest.raises(NotReady):
            await producer.enqueue(make_job())
        await producer.close()


def stats_of(queued: int, workers: int, median_s: float | None) -> QueueStats:
    return QueueStats({("pocket", Priority.HIGH): queued}, 0, 0, 0, 0.0, 256, workers, median_s, 0, 1)


def test_retry_after_is_depth_times_median_over_workers() -> None:
    assert retry_after_s(stats_of(10, 2, 3.1)) == 16
    assert retry_after_s(stats_of(10, 0, 3.0)) == 30
    assert retry_after_s(stats_of(10, 1, None)) == 10


@given(st.integers(0, 10**6), st.integers(0, 1000), st.none() | st.floats(0, 1e5))
def test_retry_after_stays_between_a_second_and_ten_minutes(queued: int, workers: int, median_s: float | None) -> None:
    assert 1 <= retry_after_s(stats_of(queued, workers, median_s)) <= 600
