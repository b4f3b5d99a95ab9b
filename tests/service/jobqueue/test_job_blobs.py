"""Inputs and results under the byte budget, against a real Redis: the account is exact whatever happens."""

import asyncio
import uuid
from typing import Any

import pytest

from giantleap.service.errors import StorageFull
from giantleap.service.jobs.job import ResultFile

BUDGET_BYTES = 100


def file_of(blob: bytes) -> tuple[ResultFile, bytes]:
    return ResultFile("image/png", len(blob)), blob


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
