"""What a job is, as values: its parameters, its states, its record and its events, and their JSON form.

Everything here is pure; `giantleap.service.jobqueue.producer` (API side) and `giantleap.service.jobqueue.consumer`
(worker side) store and move these values.
"""

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal, Self

from giantleap.models.bundle.descriptor import DecodeName, Method


class JobState(StrEnum):
    """A job's life: queued -> processing -> one of the three final states.

    A retry goes back to queued, and so does a job that one worker drew for another to finish.
    """

    QUEUED = "queued"
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def final(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED)


class Priority(StrEnum):
    HIGH = "high"
    LOW = "low"


@dataclass(frozen=True, slots=True)
class GenerateParams:
    """A prompt to draw. Sizes are of the final image; `base_size_px` is what the base model draws.

    With a `strength` the drawing starts from an image, the input blob: a PNG file of the base size.
    """

    prompt: str
    negative_prompt: str
    scale: float
    width_px: int
    height_px: int
    steps: int
    guidance_scale: float
    seed: int
    num_images: int
    output_format: Literal["png", "jpeg", "webp"]
    method: Method = "lua"
    decode: DecodeName = "exact"
    strength: float | None = None

    kind: Literal["generate"] = "generate"

    @property
    def base_size_px(self) -> tuple[int, int]:
        """Width and height of the image that the base model draws."""
        factor = 1 if self.method == "direct" else self.scale
        return round(self.width_px / factor), round(self.height_px / factor)


@dataclass(frozen=True, slots=True)
class UpscaleParams:
    """A latent [channels, latent_height, latent_width] or an image to enlarge.

    The input blob of a latent is a safetensors file with one tensor `latent` of shape [B, C, h, w], already validated
    and converted to the raw latent space by the API. That of an image, which has `image_width_px` and
    `image_height_px`, is the checked file; the latent's size is then that of the image filled up to whole latents.
    With `one_frame` it came as a video of one frame, and a latent that is answered is one, too: [C, 1, h, w].
    """

    scale: float
    latent_space: str
    batch_items: int
    channels: int
    latent_height: int
    latent_width: int
    output: Literal["image", "latent"]
    output_format: Literal["png", "jpeg", "webp"]
    method: Method = "lua"
    decode: DecodeName = "exact"
    image_width_px: int | None = None
    image_height_px: int | None = None
    one_frame: bool = False

    kind: Literal["upscale"] = "upscale"


JobParams = GenerateParams | UpscaleParams


@dataclass(frozen=True, slots=True)
class Webhook:
    """Whom to tell that a job has ended; `events` are the final states that are told."""

    url: str
    events: tuple[str, ...]


def _fields(value: "JobParams | Webhook | Job") -> dict[str, Any]:
    """The fields by name. `dataclasses.asdict` copies every value as well, which took a twentieth of a request."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class Job:
    """A request that was accepted: what the queue stores and the worker runs.

    `owner` is the name of the API key that asked for it, "" where the service runs without keys; `latent_px` the latent
    pixels of all its images after upscaling; a job that has not ended `cancel_after_s` after it was accepted fails.
    """

    id: str
    bundle: str
    priority: Priority
    created_at_s: float
    params: JobParams
    warnings: tuple[str, ...] = ()
    traceparent: str | None = None
    owner: str = ""
    latent_px: int = 0
    cancel_after_s: float | None = None
    webhook: Webhook | None = None

    def to_json(self) -> str:
        webhook = None if self.webhook is None else _fields(self.webhook)
        return json.dumps(_fields(self) | {"params": _fields(self.params), "webhook": webhook}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        raw: dict[str, Any] = json.loads(text)
        params, webhook = raw.pop("params"), raw.get("webhook")
        kinds: dict[str, type[JobParams]] = {"generate": GenerateParams, "upscale": UpscaleParams}
        return cls(
            id=raw["id"],
            bundle=raw["bundle"],
            priority=Priority(raw["priority"]),
            created_at_s=raw["created_at_s"],
            params=kinds[params["kind"]](**params),
            warnings=tuple(raw["warnings"]),
            traceparent=raw.get("traceparent"),
            owner=raw.get("owner", ""),
            latent_px=raw.get("latent_px", 0),
            cancel_after_s=raw.get("cancel_after_s"),
            webhook=None if webhook is None else Webhook(webhook["url"], tuple(webhook["events"])),
        )

    def payload_sha256(self) -> str:
        """Digest of who asked for what, without id and times: equal for two posts of the same request."""
        asked = {"bundle": self.bundle, "priority": self.priority, **_fields(self.params)}
        if self.owner:
            asked["owner"] = self.owner
        if self.webhook is not None:
            asked["webhook"] = _fields(self.webhook)
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ResultFile:
    """One result of a job (an image or a latent) as stored in the blobs."""

    content_type: str
    size_bytes: int
    seed: int | None = None
    width_px: int | None = None
    height_px: int | None = None


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed: the fields of `giantleap.service.errors.GiantleapError`, stored."""

    code: str
    detail: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as read back from the store. Times are Unix seconds; `stages` maps stage name to seconds.

    `estimated_start_s` is how long it will probably still wait; None where it does not wait, or nothing is known.
    `deadline_left_s` is the time to its deadline when it was read, negative after it.
    """

    job: Job
    state: JobState
    deliveries: int = 0
    started_at_s: float | None = None
    finished_at_s: float | None = None
    queue_position: int | None = None
    cancel_requested: bool = False
    stages: dict[str, float] = field(default_factory=dict)
    results: tuple[ResultFile, ...] = ()
    warnings: tuple[str, ...] = ()
    error: JobError | None = None
    estimated_start_s: float | None = None
    deadline_left_s: float | None = None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One entry of a job's progress stream. `id` is the stream id, used as the SSE event id.

    `name` is one of: queued, started, step (data: step, steps), stage (data: stage, seconds), retrying, done
    (data: state); `done` is always the last.
    """

    id: str
    name: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class QueueStats:
    """The queue at one moment, read from Redis in one round trip.

    `queued` and the medians are by queue (`giantleap.service.jobqueue.keys`). Of the live workers `drawing_workers`
    only draw and `finishing_workers` only upscale and decode.
    """

    queued: dict[tuple[str, Priority], int]
    processing: int
    delayed: int
    dead_lettered: int
    oldest_age_s: float
    limit: int
    live_workers: int
    recent_job_median_s: float | None
    blob_bytes: int
    blob_budget_bytes: int
    queue_median_s: dict[str, float] = field(default_factory=dict)
    drawing_workers: int = 0
    finishing_workers: int = 0


def to_rfc3339(time_s: float) -> str:
    """A Unix time as RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def stages_s(record: JobRecord) -> dict[str, float]:
    """Seconds of each stage in order, the wait in the queue first."""
    if record.started_at_s is None or "queue" in record.stages:
        return dict(record.stages)
    return {"queue": max(0.0, record.started_at_s - record.job.created_at_s), **record.stages}
