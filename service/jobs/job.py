"""Jobs as values: parameters, states, records and events, and the JSON form of a job.

`giantleap.service.jobqueue.producer` (API) and `giantleap.service.jobqueue.consumer` (worker) store and move them.
"""

import hashlib
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final, Literal, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from giantleap.models.adapters.files import AdapterUse
from giantleap.models.bundle.descriptor import DecodeName, Method
from giantleap.models.generation.refinement import Refinement
from giantleap.models.pixels.image_formats import DEFAULT_FILE, FileOptions, ImageFormat
from giantleap.service.errors import field_errors

FinalState = Literal["succeeded", "failed", "canceled"]
FINAL_STATES: Final[tuple[FinalState, ...]] = get_args(FinalState)

_NO_UNKNOWN_FIELDS = ConfigDict(extra="forbid", hide_input_in_errors=True)
"""A worker must not run a job of a newer version without the fields that it does not know."""


class JobState(StrEnum):
    """A job's life: queued -> processing -> one of the three final states.

    A retry goes back to queued, and so does a job whose base latents one worker made for another to decode.
    """

    QUEUED = "queued"
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"

    @property
    def final(self) -> bool:
        """Whether the job has ended."""
        return self.value in FINAL_STATES


class Priority(StrEnum):
    """Which jobs workers claim first."""

    HIGH = "high"
    LOW = "low"


@dataclass(frozen=True, slots=True)
class GenerateParams:
    """Images to generate from a prompt.

    Sizes are those of the final image; `base_size_px` is the size that the base model generates. With a `strength`
    generation starts from an image, of which with `mask` only a part is generated again; `images` is the number of
    reference images. The job's input blob has them (`giantleap.service.jobs.edits.inputs`). `refine` is a second, short
    sampling of the enlarged latent. With `embed_parameters` the files name the prompt and the seed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _NO_UNKNOWN_FIELDS

    prompt: str
    negative_prompt: str
    scale: int | float
    width_px: int
    height_px: int
    steps: int
    guidance_scale: float
    seed: int
    num_images: int
    output_format: ImageFormat
    method: Method = "lua"
    decode: DecodeName = "exact"
    strength: float | None = None
    mask: bool = False
    images: int = 0
    refine: Refinement | None = None
    embed_parameters: bool = False
    loras: tuple[AdapterUse, ...] = ()
    previews: int = 0
    file: FileOptions = DEFAULT_FILE

    kind: Literal["generate"] = "generate"

    @property
    def from_image(self) -> bool:
        """Whether images of the client come in, as the job's input blob."""
        return self.strength is not None or self.images > 0

    @property
    def base_size_px(self) -> tuple[int, int]:
        """Width and height of the image that the base model generates."""
        factor = 1 if self.method == "direct" else self.scale
        return round(self.width_px / factor), round(self.height_px / factor)


@dataclass(frozen=True, slots=True)
class UpscaleParams:
    """A latent [channels, latent_height, latent_width] or an image to enlarge.

    The input blob of a latent is a safetensors file with one tensor `latent` of shape [B, C, h, w], which the API has
    validated and converted to the raw latent space. The input blob of an image, which has `image_width_px` and
    `image_height_px`, is the validated file; the latent size is then that of the image padded to whole latent pixels.
    With `one_frame` the latent was sent as a video of one frame, and is returned as one: [C, 1, h, w].

    Prompts, guidance and seed are those of the refine pass; without one they are empty, 0 and None.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _NO_UNKNOWN_FIELDS

    scale: int | float
    latent_space: str
    batch_items: int
    channels: int
    latent_height: int
    latent_width: int
    output: Literal["image", "latent"]
    output_format: ImageFormat
    method: Method = "lua"
    decode: DecodeName = "exact"
    image_width_px: int | None = None
    image_height_px: int | None = None
    one_frame: bool = False
    refine: Refinement | None = None
    prompt: str = ""
    negative_prompt: str = ""
    guidance_scale: float = 0.0
    seed: int | None = None
    file: FileOptions = DEFAULT_FILE

    kind: Literal["upscale"] = "upscale"


JobParams = GenerateParams | UpscaleParams


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where to post a notification when a job has ended; `events` are the final states to report."""

    __pydantic_config__: ClassVar[ConfigDict] = _NO_UNKNOWN_FIELDS

    url: str
    events: tuple[FinalState, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """An accepted request: what the queue stores and the worker runs.

    Attributes:
        owner: Name of the API key that the request came with; "" where the service runs without keys.
        latent_px: Latent pixels of all images of the job after upscaling.
        cancel_after_s: The job fails unless it has ended so long after it was accepted.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _NO_UNKNOWN_FIELDS

    id: str
    bundle: str
    _: KW_ONLY
    priority: Priority
    created_at_s: float
    params: Annotated[JobParams, Field(discriminator="kind")]
    warnings: tuple[str, ...] = ()
    traceparent: str | None = None
    owner: str = ""
    latent_px: int = 0
    cancel_after_s: float | None = None
    webhook: Webhook | None = None

    def to_json(self) -> str:
        """The job as the queue stores it."""
        return _JOB.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> "Job":
        """The job of `to_json`; fields that an older version did not write take their defaults.

        Raises:
            ValueError: The text is not a job.
        """
        try:
            return _JOB.validate_json(text)
        except ValidationError as error:  # its text would quote the prompt
            faults = field_errors(error.errors(include_url=False, include_input=False))
            reasons = "; ".join(f"{name}: {reason}" for name, reason in faults)
            raise ValueError(f"not a job of this version: {reasons}") from None

    def payload_sha256(self) -> str:
        """Digest of the request and its owner, without id and times: equal for two posts of the same request."""
        return hashlib.sha256(_JOB.dump_json(self, include=_PAYLOAD)).hexdigest()


_JOB: Final = TypeAdapter(Job)
_PAYLOAD: Final = {"bundle", "priority", "params", "owner", "webhook"}


@dataclass(frozen=True, slots=True)
class ResultFile:
    """One result of a job (an image or a latent). `key` names it in the result store; None: it is in Redis."""

    content_type: str
    size_bytes: int
    seed: int | None = None
    width_px: int | None = None
    height_px: int | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed: the fields of a `giantleap.service.errors.GiantleapError`, as stored."""

    code: str
    detail: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as read back from the store. Times are Unix seconds; `stages` maps the name of a stage to its seconds.

    Attributes:
        estimated_start_s: Probable wait until the job starts; None where it is not waiting or nothing is known.
        deadline_left_s: Time to the job's deadline when the record was read; negative after the deadline.
    """

    job: Job
    state: JobState
    _: KW_ONLY
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

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """The warnings of the API and of the worker, each once."""
        return tuple(dict.fromkeys((*self.job.warnings, *self.warnings)))

    @property
    def stages_s(self) -> dict[str, float]:
        """Seconds of each stage in order, the wait in the queue first."""
        if self.started_at_s is None or "queue" in self.stages:
            return dict(self.stages)
        return {"queue": max(0.0, self.started_at_s - self.job.created_at_s), **self.stages}


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One entry of a job's progress stream.

    Attributes:
        id: Id in the Redis stream, sent as the id of the server-sent event.
        name: queued, started, step (data: step, steps), preview (data: index, step, width, height, image), progress
            (data: stage, seconds, fraction where known), stage (data: stage, seconds), retrying, or done (data: state),
            which is always the last.
    """

    id: str
    name: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class QueueStats:
    """The queue at one moment, read from Redis in one round trip.

    `queued` and `queue_median_s` are by queue (`giantleap.service.jobqueue.keys`). Of the live workers,
    `generate_workers` only generate and `decode_workers` only upscale and decode.
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
    generate_workers: int = 0
    decode_workers: int = 0


def to_rfc3339(time_s: float) -> str:
    """A Unix time as RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
