"""Inputs and results under the byte budget, against a real Redis: the account is exact whatever happens."""

import asyncio
import uuid
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, assume
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from giantleap.service.errors import StorageFull
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.runner import ScriptRunner, upload_input
from giantleap.service.jobs.job import JobError, ResultFile
from giantleap.service.settings import Settings
from tests.redis_fixtures import enqueue_arguments

BUDGET_BYTES = 100


def file_of(blob: bytes) -> tuple[ResultFile, bytes]:
    return ResultFile("image/png", len(blob)), blob


class BlobAccount(RuleBasedStateMachine):
    """Random lives of jobs beside a model of what must be stored.

    Live inputs, and what may go from oldest to newest: results, and the inputs of jobs that failed for good.
    """

    base: Settings
    client: redis.Redis
    make_job: Any

    def __init__(self) -> None:
        super().__init__()
        changes = {"key_prefix": f"blobs-{uuid.uuid4().hex[:8]}", "blob_budget_bytes": BUDGET_BYTES}
        self.settings = self.base.model_copy(update=changes)
        self.keys = Keys(self.settings.key_prefix)
        self.scripts = ScriptRunner(self.client, self.settings)
        self.worker = JobConsumer(self.client, self.settings, ["pocket"], "w")
        self.known: list[str] = []
        self.inputs: dict[str, int] = {}
        self.results: dict[str, int] = {}
        self.failed: set[str] = set()
        self.queued: list[str] = []
        self.running: list[Claim] = []

    def used_bytes(self) -> int:
        return sum(self.inputs.values()) + sum(self.results.values())

    def make_room(self, size_bytes: int) -> bool:
        if size_bytes > 0 and sum(self.inputs.values()) + size_bytes > BUDGET_BYTES:
            return False
        while size_bytes > 0 and self.used_bytes() + size_bytes > BUDGET_BYTES:
            del self.results[next(iter(self.results))]
        return True

    @rule(size_bytes=st.integers(0, 60))
    def enqueue(self, size_bytes: int) -> None:
        job = self.make_job()
        before = upload_input(self.keys.upload(job.id), b"i" * size_bytes) if size_bytes else []
        arguments = enqueue_arguments(job, upload=job.id if size_bytes else "", input_bytes=size_bytes)
        reply = self.scripts.run(scripts.ENQUEUE, arguments, before=before, value=job.to_json())
        self.known.append(job.id)
        assert reply.status == ("created" if self.make_room(size_bytes) else "storage")
        if reply.status == "created":
            self.inputs[job.id] = size_bytes
            self.queued.append(job.id)

    @precondition(lambda self: self.queued)
    @rule()
    def claim(self) -> None:
        [claim] = self.worker.claim(1, 0.0)
        assert claim.job.id == self.queued.pop(0)
        assert claim.body == (b"i" * self.inputs[claim.job.id] or None)
        self.running.append(claim)

    @precondition(lambda self: self.running)
    @rule(sizes_bytes=st.lists(st.integers(0, 60), max_size=3), pick=st.integers(0))
    def finish(self, sizes_bytes: list[int], pick: int) -> None:
        claim = self.running[pick % len(self.running)]
        own_bytes = self.inputs[claim.job.id]
        files = [file_of(b"r" * size) for size in sizes_bytes]
        if not self.make_room(sum(sizes_bytes) - own_bytes):
            with pytest.raises(StorageFull):
                self.worker.complete(claim, files, {}, [])
            return
        assert self.worker.complete(claim, files, {}, [])
        self.running.remove(claim)
        del self.inputs[claim.job.id]
        if sum(sizes_bytes):
            self.results[claim.job.id] = sum(sizes_bytes)

    @precondition(lambda self: self.running)
    @rule(pick=st.integers(0))
    def fail(self, pick: int) -> None:
        claim = self.running.pop(pick % len(self.running))
        assert self.worker.fail(claim, JobError("invalid_request", "NaN in the latent"))
        self.failed.add(claim.job.id)
        if size_bytes := self.inputs.pop(claim.job.id):
            self.results[claim.job.id] = size_bytes

    @precondition(lambda self: self.queued)
    @rule(pick=st.integers(0))
    def cancel_queued(self, pick: int) -> None:
        job_id = self.queued.pop(pick % len(self.queued))
        self.scripts.run(scripts.CANCEL_JOB, {"id": job_id})
        del self.inputs[job_id]

    @rule()
    def expire_oldest(self) -> None:
        assume(self.results)
        oldest = next(iter(self.results))
        self.client.zadd(f"{self.keys.tag}:blob_results", {oldest: 0})
        self.scripts.run(scripts.READ_STATS)
        del self.results[oldest]

    @invariant()
    def account_is_what_is_stored(self) -> None:
        with self.client.pipeline(transaction=False) as pipe:
            for job_id in self.known:
                pipe.strlen(self.keys.input(job_id))
                pipe.hvals(self.keys.result(job_id))
            pipe.get(f"{self.keys.tag}:blob_bytes")
            *stored, counted = pipe.execute()
        inputs = {job_id: size for job_id, size in zip(self.known, stored[::2], strict=True) if size}
        results = {
            job_id: sum(map(len, blobs)) for job_id, blobs in zip(self.known, stored[1::2], strict=True) if blobs
        }
        left = {job_id: size for job_id, size in self.results.items() if job_id in self.failed}
        assert inputs == {job_id: size for job_id, size in self.inputs.items() if size} | left
        assert results == {job_id: size for job_id, size in self.results.items() if job_id not in self.failed}
        assert int(counted or 0) == self.used_bytes() <= BUDGET_BYTES
        assert list(self.client.scan_iter(match=self.keys.upload("*"))) == []

    def teardown(self) -> None:
        self.client.delete(*self.client.scan_iter(match=f"{self.keys.tag}*"), "absent")


def test_account_is_exact_in_every_random_life(settings: Settings, redis_client: redis.Redis, make_job: Any) -> None:
    machine = type(
        "Account", (BlobAccount,), {"base": settings, "client": redis_client, "make_job": staticmethod(make_job)}
    )
    limits = hypothesis_settings(
        max_examples=10, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=limits)


async def test_oldest_results_make_room_for_new_ones_and_live_inputs_never_do(
    open_producer: Any, open_consumer: Any, make_job: Any
) -> None:
    async with open_producer(blob_budget_bytes=10) as producer:
        worker = open_consumer(blob_budget_bytes=10)
        jobs = [make_job() for _ in range(4)]
        for job in jobs[:2]:
            await producer.enqueue(job)
            [claim] = worker.claim(1, 1.0)
            assert worker.complete(claim, [file_of(b"abc")], {}, [])
        await producer.enqueue(jobs[2], b"12345678")
        assert await producer.read_result(jobs[0].id, 0) is None, "evicted for the input"
        assert await producer.read_result(jobs[1].id, 0) is None
        with pytest.raises(StorageFull):
            await producer.enqueue(jobs[3], b"123")
        [claim] = worker.claim(1, 1.0)
        assert claim.body == b"12345678"
        with pytest.raises(StorageFull):
            worker.complete(claim, [file_of(b"x" * 11)], {}, [])
        assert worker.complete(claim, [file_of(b"1234"), file_of(b"567890")], {}, []), "its own input made room"
        assert await producer.read_result(jobs[2].id, 1) == b"567890"
        assert await producer.read_result(jobs[2].id, 2) is None
        assert (await producer.stats()).blob_bytes == 10


async def test_expired_results_give_their_bytes_back(open_producer: Any, open_consumer: Any, make_job: Any) -> None:
    async with open_producer(job_ttl_s=3) as producer:
        worker = open_consumer(job_ttl_s=3)
        job = make_job()
        await producer.enqueue(job)
        [claim] = worker.claim(1, 1.0)
        worker.complete(claim, [file_of(b"abc")], {}, [])
        assert (await producer.stats()).blob_bytes == 3
        async with asyncio.timeout(60):
            while (await producer.stats()).blob_bytes:
                await asyncio.sleep(0.1)
        assert await producer.read_result(job.id, 0) is None
        assert await producer.get(job.id) is None


async def test_large_blobs_pass_unchanged(open_producer: Any, open_consumer: Any, make_job: Any) -> None:
    large = uuid.uuid4().bytes * (1 << 20)
    async with open_producer() as producer:
        job = make_job()
        await producer.enqueue(job, large)
        worker = open_consumer()
        [claim] = worker.claim(1, 60.0)
        assert claim.body == large
        assert worker.complete(claim, [file_of(large)], {}, [])
        assert await producer.read_result(job.id, 0) == large
