"""The replies of the Lua scripts, one frozen dataclass each, as pydantic validates them from JSON.

An empty list is absent in a reply, because the JSON encoder of Redis cannot tell it from an empty object.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import Json

from giantleap.service.jobs.job import Job, JobError, JobRecord, JobState, Priority, ResultFile


@dataclass(frozen=True, slots=True)
class StoredJob:
    """The fields of a job's hash, texts in Redis; `job` is absent in the outcome that the end of a job publishes."""

    state: JobState
    deliveries: int
    job: Json[Job] | None = None
    created_at_s: float | None = None
    started_at_s: float | None = None
    finished_at_s: float | None = None
    cancel: bool = False
    stages: Json[dict[str, float]] = field(default_factory=dict)
    results: Json[tuple[ResultFile, ...]] = ()
    warnings: Json[tuple[str, ...]] = ()
    error: Json[JobError] | None = None
    queue_position: int | None = None
    estimated_start_s: float | None = None
    deadline_left_ms: float | None = None

    def to_record(self, created: Job | None = None) -> JobRecord:
        """The record of the stored job, or of `created` if this is an outcome."""
        job = self.job or created
        if job is None:
            raise ValueError("a stored job without its job needs the job that was created")
        if self.created_at_s is not None:
            job = replace(job, created_at_s=self.created_at_s)
        left_ms = self.deadline_left_ms
        return JobRecord(
            job=job,
            state=self.state,
            deliveries=self.deliveries,
            started_at_s=self.started_at_s,
            finished_at_s=self.finished_at_s,
            queue_position=self.queue_position,
            cancel_requested=self.cancel,
            stages=self.stages,
            results=self.results,
            warnings=self.warnings,
            error=self.error,
            estimated_start_s=self.estimated_start_s,
            deadline_left_s=None if left_ms is None else left_ms / 1000,
        )


@dataclass(frozen=True, slots=True)
class EnqueueReply:
    """The outcome of a new job. If refused, `amount` is the amount in use, `wait_us` the time until it is allowed.

    `jobs` are those in the queue, with the one that was created.
    """

    status: Literal["created", "existing", "mismatch", "full", "full_px", "busy", "work", "storage", "upload"]
    job_id: str
    created_at_s: float | None = None
    queue_position: int | None = None
    estimated_start_s: float | None = None
    jobs: int | None = None
    amount: int = 0
    wait_us: int = 0


@dataclass(frozen=True, slots=True)
class DeleteReply:
    """The record of a job that was canceled instead; keys of the files that must be deleted before the job is."""

    record: StoredJob | None = None
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SweepReply:
    """Whether it is this sweeper's turn, the time of Redis, and the keys of the files that no job needs."""

    granted: bool
    now_s: float
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RateLimitReply:
    """Microseconds until the owner may send again; 0: the request is paid."""

    wait_us: int


@dataclass(frozen=True, slots=True)
class ListReply:
    """A page of an owner's jobs."""

    records: tuple[StoredJob, ...] = ()
    next_cursor: str | None = None


@dataclass(frozen=True, slots=True)
class LaneStats:
    """The jobs that wait in a lane, and the median seconds of its queue's recent jobs."""

    queue: str
    priority: Priority
    queued: int
    median_s: float | None = None


@dataclass(frozen=True, slots=True)
class StatsReply:
    """The size of everything; `generate_workers` and `decode_workers` run only these stages."""

    processing: int
    delayed: int
    dead_lettered: int
    oldest_age_us: float
    live_workers: int
    generate_workers: int
    decode_workers: int
    blob_bytes: int
    lanes: tuple[LaneStats, ...] = ()
    durations_s: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class DevicesReply:
    """The devices of the live workers, each a JSON text."""

    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A job that failed for good; `job` is None once its record has expired or was deleted."""

    id: str
    lane: str
    deliveries: int
    error: Json[JobError]
    failed_at_ms: int
    has_input: bool
    job: Json[Job] | None = None


@dataclass(frozen=True, slots=True)
class DeadLettersReply:
    """The latest dead letters."""

    letters: tuple[DeadLetter, ...] = ()


@dataclass(frozen=True, slots=True)
class DroppedReply:
    """Whether the dead letter was there."""

    dropped: bool


@dataclass(frozen=True, slots=True)
class ServerReply:
    """How the server treats its data; None: its user may not read it."""

    redis_version: str | None = None
    role: str | None = None
    used_memory: int | None = None
    maxmemory: int | None = None
    total_system_memory: int | None = None
    maxmemory_policy: str | None = None
    aof_enabled: bool | None = None
    aof_last_write_status: str | None = None


@dataclass(frozen=True, slots=True)
class IdsReply:
    """Ids of jobs."""

    ids: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A message that now belongs to the worker. `stages` is there if another worker transferred the job.

    `waited_s`: how long the job exists; absent if an API process of an older version made it.
    """

    id: str
    job: str
    lane: str
    message: str
    delivery: int
    input_bytes: int
    waited_s: float = 0.0
    stages: Json[dict[str, float]] | None = None
    warnings: Json[tuple[str, ...]] = ()
    input_key: str | None = None


@dataclass(frozen=True, slots=True)
class ClaimReply:
    """The claims; without any, the last id of each lane's stream and the time until the next retry is due."""

    claims: tuple[ClaimedJob, ...] = ()
    last_ids: tuple[str, ...] = ()
    retry_ms: float | None = None


@dataclass(frozen=True, slots=True)
class SettleReply:
    """The outcome of a worker's write. `lost`: the claim is another worker's, or a deadline has ended the job."""

    status: Literal["done", "retried", "canceled", "lost", "no_room", "no_upload"]


@dataclass(frozen=True, slots=True)
class Delivery:
    """A webhook that is due; `attempt` counts from 1, `error` is there if the job failed."""

    id: str
    attempt: int
    url: str
    job_id: str
    state: JobState
    bundle: str
    finished_at_s: float
    error: Json[JobError] | None = None
    results: Json[tuple[ResultFile, ...]] = ()


@dataclass(frozen=True, slots=True)
class WebhooksReply:
    """The deliveries that the sender now holds."""

    deliveries: tuple[Delivery, ...] = ()
