"""The judge of a chaos run finds every fault that it is there for, one at a time."""

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest
import redis

from giantleap.service.jobqueue.client import open_async_redis, open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import GenerateParams, Job, Priority, ResultFile
from giantleap.service.settings import Settings, read_settings
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis
from tests.chaos.harness import Note
from tests.chaos.judge import Verdict, judge

PREFIX = "judge"
JOBS = ("job-a", "job-b", "job-c")
KEYS = Keys(PREFIX)
Ended = tuple[redis.Redis, list[Note]]


def run_jobs(settings: Settings) -> list[Note]:
    """Three jobs, ended; what a worker's journal would hold."""
    assert settings.redis_url is not None
    params = GenerateParams("a", "", 2, 64, 64, 4, 1.0, 7, 1, "png")

    async def enqueue() -> None:
        async with open_async_redis(settings.redis_url or "") as client:
            producer = JobProducer(client, settings)
            for job_id in JOBS:
                await producer.enqueue(
                    Job(job_id, "paper", priority=Priority.HIGH, created_at_s=time.time(), params=params)
                )

    asyncio.run(enqueue())
    worker = JobConsumer(open_redis(settings.redis_url), settings, ["paper"], "w")
    notes = []
    for claim in worker.claim(3, 30.0):
        content = f"{claim.job.id} {claim.delivery} 1".encode()
        assert worker.complete(claim, [(ResultFile("image/png", len(content)), content)], {}, ())
        notes += [Note(what, claim.job.id, claim.delivery, 1, 0.0) for what in ("start", "ending", "accepted")]
    return notes


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = EmbeddedRedis(appendfsync="everysec")
    yield server.start(tmp_path_factory.mktemp("judge"))
    server.stop()


@pytest.fixture
def ended(server_url: str) -> Iterator[Ended]:
    with redis.Redis.from_url(server_url) as client:
        client.flushall()
        yield client, run_jobs(read_settings(redis_url=server_url, key_prefix=PREFIX))


def judged(ended: Ended, killed_pids: tuple[int, ...] = ()) -> Verdict:
    client, notes = ended
    return judge(client, PREFIX, JOBS, notes, killed_pids)


def test_nothing_is_found_where_every_job_ended_once(ended: Ended) -> None:
    assert judged(ended).is_clean


FAULTS: dict[str, tuple[str, Callable[[redis.Redis, list[Note]], object]]] = {
    "a lost record": ("lost", lambda client, notes: client.delete(KEYS.job("job-a"))),
    "a failed job": ("failed", lambda client, notes: client.hset(KEYS.job("job-a"), "state", "failed")),
    "a job that runs": ("failed", lambda client, notes: client.hset(KEYS.job("job-a"), "state", "processing")),
    "a second end": (
        "not_one_done",
        lambda client, notes: client.xadd(KEYS.events("job-a"), {"name": "done", "data": "{}"}),
    ),
    "no end": ("not_one_done", lambda client, notes: client.delete(KEYS.events("job-a"))),
    "a second result": ("not_one_result", lambda client, notes: client.hset(KEYS.result("job-a"), "1", b"job-a 1 1")),
    "the result of another": (
        "not_one_result",
        lambda client, notes: client.hset(KEYS.result("job-a"), "0", b"job-b 1 1"),
    ),
    "the result of an earlier start": (
        "not_one_result",
        lambda client, notes: client.hset(KEYS.job("job-a"), "deliveries", 2),
    ),
    "two ends in the journal": (
        "accepted_twice",
        lambda client, notes: notes.append(Note("accepted", "job-a", 2, 2, 0.0)),
    ),
    "an end that nobody wrote": (
        "unexplained",
        lambda client, notes: notes.remove(Note("accepted", "job-a", 1, 1, 0.0)),
    ),
    "a job that nobody was promised": (
        "strangers",
        lambda client, notes: client.hset(KEYS.job("x"), "state", "queued"),
    ),
    "a message": ("leaks", lambda client, notes: client.xadd(KEYS.stream("paper:high"), {"job": "job-a"})),
    "a running job": ("leaks", lambda client, notes: client.sadd(f"{KEYS.tag}:running", "job-a")),
    "an input": ("leaks", lambda client, notes: client.set(KEYS.input("job-a"), b"x")),
    "a live job of an owner": ("leaks", lambda client, notes: client.sadd(f"{KEYS.tag}:live:me", "job-a")),
    "bytes that are not there": ("leaks", lambda client, notes: client.incrby(f"{KEYS.tag}:blob_bytes", 1)),
    "pixels that do not wait": ("leaks", lambda client, notes: client.incrby(f"{KEYS.tag}:queued_px", 64)),
    "a dead letter": ("leaks", lambda client, notes: client.xadd(KEYS.dead, {"job": "job-a"})),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found(name: str, ended: Ended) -> None:
    fault, cause = FAULTS[name]
    cause(*ended)
    verdict = judged(ended)
    assert getattr(verdict, fault), f"{name}: {verdict}"


def test_a_killed_worker_explains_an_end_without_a_note_but_of_its_own_start_only(ended: Ended) -> None:
    notes = ended[1]
    notes.remove(Note("accepted", "job-a", 1, 1, 0.0))
    assert judged(ended, killed_pids=(1,)).is_clean
    notes.remove(Note("ending", "job-a", 1, 1, 0.0))
    assert judged(ended, killed_pids=(1,)).unexplained == ("job-a",)
