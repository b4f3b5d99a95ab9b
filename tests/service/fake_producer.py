"""A fake `giantleap.service.jobqueue.producer.JobProducer` in memory; each test scripts how its jobs end."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace

from giantleap.service.errors import GiantleapError, InvalidRequest, QueueFull
from giantleap.service.jobqueue.admission.gate import Permit
from giantleap.service.jobqueue.producer import Enqueued, Page
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.grid import Charge
from giantleap.service.jobs.job import (
    GenerateParams,
    Job,
    JobError,
    JobEvent,
    JobRecord,
    JobState,
    QueueStats,
    ResultFile,
)

IMAGE = b"\x89PNG not really"

End = Callable[[Job], JobRecord]


def succeed(job: Job) -> JobRecord:
    """One result per image; it waited 0.25 s and took 1.5 s."""
    start_s = job.created_at_s + 0.25
    if isinstance(job.params, GenerateParams):
        kind, count, seed = f"image/{job.params.output_format}", job.params.num_images, job.params.seed
        results = tuple(ResultFile(kind, len(IMAGE), seed + index, 64, 64) for index in range(count))
    else:
        latent = job.params.output == "latent"
        kind = "application/x-safetensors" if latent else f"image/{job.params.output_format}"
        results = (ResultFile(kind, len(IMAGE)),) * (1 if latent else job.params.batch_items)
    return JobRecord(
        job,
        JobState.SUCCEEDED,
        deliveries=1,
        started_at_s=start_s,
        finished_at_s=start_s + 1.5,
        stages={"generate": 1.0, "upscale": 0.25, "decode": 0.125, "encode": 0.125},
        results=results,
        warnings=job.warnings,
    )


def fail(job: Job) -> JobRecord:
    return replace(
        succeed(job), state=JobState.FAILED, results=(), error=JobError("engine_fault", "out of memory", retryable=True)
    )


def expire(job: Job) -> JobRecord:
    """As the scripts end a job whose deadline has passed."""
    error = JobError("deadline_passed", "The job did not end in time.", retryable=False)
    return replace(fail(job), error=error)


def stay_queued(job: Job) -> JobRecord:
    return JobRecord(job, JobState.QUEUED, queue_position=3, warnings=job.warnings)


class OpenGate:
    """The gate of a queue that is never full; counts all permits, and those that are not released."""

    def __init__(self) -> None:
        self.taken = 0
        self.permits = 0

    def must_wait(self) -> bool:
        return False

    def try_admit(self) -> Permit | QueueFull | None:
        self.taken += 1
        self.permits += 1
        return Permit(self._take_back_permit)

    async def admit(self) -> Permit | QueueFull:
        answer = self.try_admit()
        assert answer is not None
        return answer

    def _take_back_permit(self) -> None:
        self.permits -= 1


@dataclass
class FakeProducer:
    """Every enqueued job becomes `end(job)`; `refusal` is raised instead of an enqueue, `outage` by everything."""

    end: End = succeed
    refusal: GiantleapError | None = None
    outage: GiantleapError | None = None
    live_workers: int = 1
    gate: OpenGate = field(default_factory=OpenGate)
    devices: tuple[Device, ...] = ()
    warnings: tuple[str, ...] = ()
    records: dict[str, JobRecord] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)
    event_list: list[JobEvent] = field(default_factory=list)
    endless_events: bool = False
    spent: list[str] = field(default_factory=list)
    limits: list[tuple[int | None, Charge | None]] = field(default_factory=list)
    waits: int = 0
    open_events: int = 0
    is_open: bool = False

    @property
    def jobs(self) -> list[Job]:
        return [record.job for record in self.records.values()]

    async def open(self) -> None:
        self.is_open = True

    async def close(self) -> None:
        self.is_open = False

    async def enqueue(
        self,
        job: Job,
        body: bytes | None = None,
        idempotency_key: str | None = None,
        max_live: int | None = None,
        charge: Charge | None = None,
    ) -> Enqueued:
        self._require_up()
        self.limits.append((max_live, charge))
        if self.refusal is not None:
            raise self.refusal
        digest = job.payload_sha256() + hashlib.sha256(body or b"").hexdigest()
        if idempotency_key is not None:
            job_id, known = self.keys.setdefault(f"{job.owner} {idempotency_key}", (job.id, digest))
            if known != digest:
                raise InvalidRequest("the key was used for another request")
            if job_id != job.id:
                return Enqueued(job_id, created=False, queue_position=0)
        self.records[job.id] = self.end(job)
        if body is not None:
            self.blobs[job.id] = body
        return Enqueued(job.id, created=True, queue_position=len(self.records) - 1)

    async def acquire_rate_limit(self, owner: str, per_minute: int) -> float:
        self._require_up()
        self.spent.append(owner)
        return 1.5 if self.spent.count(owner) > per_minute else 0.0

    async def get(self, job_id: str) -> JobRecord | None:
        self._require_up()
        return self.records.get(job_id)

    async def list_jobs(
        self, owner: str, state: JobState | None = None, most: int = 20, cursor: str | None = None
    ) -> Page:
        self._require_up()
        records = [record for record in self.records.values() if state in (None, record.state)]
        return Page(tuple(records[::-1][:most]), None)

    async def cancel(self, job_id: str) -> JobRecord | None:
        self._require_up()
        record = self.records.get(job_id)
        if record is not None and not record.state.final:
            self.records[job_id] = replace(record, state=JobState.CANCELED, cancel_requested=True, queue_position=None)
        return self.records.get(job_id)

    async def delete(self, job_id: str) -> JobRecord | None:
        if self.records[job_id].state.final:
            del self.records[job_id]
            return None
        return await self.cancel(job_id)

    async def read_result(self, job_id: str, index: int, key: str | None = None) -> bytes | None:
        self._require_up()
        return IMAGE if index < len(self.records[job_id].results) else None

    async def wait(self, job_id: str, timeout_s: float, created: Job | None = None) -> JobRecord:
        self._require_up()
        self.waits += 1
        try:
            deadline_s = asyncio.get_running_loop().time() + timeout_s
            while not self.records[job_id].state.final and asyncio.get_running_loop().time() < deadline_s:
                await asyncio.sleep(0.005)
            return self.records[job_id]
        finally:
            self.waits -= 1

    async def events(self, job_id: str, last_event_id: str = "0-0") -> AsyncGenerator[JobEvent]:
        self.open_events += 1
        try:
            for event in self.event_list:
                self._require_up()
                if [int(part) for part in event.id.split("-")] > [int(part) for part in last_event_id.split("-")]:
                    yield event
            while self.endless_events:
                await asyncio.sleep(0.005)
                self._require_up()
        finally:
            self.open_events -= 1

    async def read_devices(self) -> None:
        self._require_up()

    async def stats(self) -> QueueStats:
        self._require_up()
        return QueueStats({}, 0, 0, 0, 0.0, 32, self.live_workers, None, 0, 1 << 30)

    def _require_up(self) -> None:
        if self.outage is not None:
            raise self.outage
