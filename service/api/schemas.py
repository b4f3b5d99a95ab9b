"""The JSON responses of the HTTP interface, as pydantic models: jobs, bundles, health, problems.

Requests are in `giantleap.service.jobs.requests`. Times are RFC 3339 in UTC, durations are seconds, image sizes are
pixels of the final image.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from giantleap.models.bundle.descriptor import METHODS, DecodeName, Method
from giantleap.models.latent_space import Packing
from giantleap.models.worker_role import WorkerRole
from giantleap.service.api.problems import from_job_error, problem_body
from giantleap.service.jobqueue.dead_letters import blocked_reason
from giantleap.service.jobqueue.keys import to_bundle
from giantleap.service.jobqueue.replies import DeadLetter
from giantleap.service.jobs.bundles import ServedBundle
from giantleap.service.jobs.devices import Device, DeviceKind
from giantleap.service.jobs.edits.checks import max_references, supports_mask
from giantleap.service.jobs.job import JobRecord, JobState, Priority, to_rfc3339
from giantleap.service.links import Links
from giantleap.service.settings import Settings


class FieldProblem(BaseModel):
    """An invalid field. Its value is never repeated."""

    field: str = Field(description="Name of the field; nested names are joined by dots.", examples=["steps"])
    reason: str = Field(description="What was sent and what is allowed.")


class Problem(BaseModel):
    """An error (RFC 9457). `code` is stable; `instance` is the X-Request-Id to look for in the log."""

    type: str = Field(description="The code as a URN.", examples=["urn:giantleap:problem:queue_full"])
    title: str = Field(description="Meaning of the code; the same for every error with this code.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What was sent, what is allowed, what to do.")
    code: str = Field(description="Stable, machine-readable code of the error.", examples=["queue_full"])
    instance: str = Field(description="The X-Request-Id of the response and of the log lines of the request.")
    retryable: bool = Field(description="Whether the same request may succeed later.")
    errors: list[FieldProblem] | None = Field(None, description="Only with code invalid_request.")
    job_id: str | None = Field(None, description="Id of the job that the error is about, if any.")
    status_url: str | None = Field(None, description="Path of that job.")
    needed_bytes: int | None = Field(None, description="Only with does_not_fit: memory that the job needs.")
    device_bytes: int | None = Field(None, description="Only with does_not_fit: memory of the largest device.")
    largest: dict[str, int] | None = Field(
        None, description="Only with does_not_fit: largest width and height that fit."
    )
    needed_megapixel_steps: float | None = Field(
        None, description="Only with work_limited, over_budget: work of the job."
    )
    megapixel_steps_per_minute: int | None = Field(
        None, description="Only with work_limited, over_budget: budget of the key."
    )
    reasons: list[str] | None = Field(None, description="Only of /readyz: each reason.")


class ResultBody(BaseModel):
    """One result file of a job."""

    url: str = Field(description="Path of the file; a signed path needs no API key.")
    content_type: str = Field(description="An image type, or application/x-safetensors.")
    size_bytes: int = Field(description="Size of the file.")
    seed: int | None = Field(description="Seed that reproduces this image; null for an upscale without a refine pass.")
    width: int | None = Field(description="Width in pixels; null for a latent.")
    height: int | None = Field(description="Height in pixels; null for a latent.")


class JobBody(BaseModel):
    """A job. It never holds the prompt."""

    id: str = Field(description="A UUID in lower case.")
    status: JobState = Field(description="queued, processing; final: succeeded, failed, canceled.")
    kind: Literal["generate", "upscale"] = Field(description="Route that created the job.")
    bundle: str = Field(description="Bundle that runs the job.")
    method: Method = Field(
        description="Upscaling method: the requested one or the bundle's default, never a substitute."
    )
    decode: DecodeName = Field(description="exact, tiled or tiny.")
    scale: int | float = Field(description="Scale factor of each side.")
    priority: Priority = Field(description="high is claimed before low.")
    seed: int | None = Field(description="Seed of the first image; null for an upscale without a refine pass.")
    created_at: str = Field(description="Time of acceptance, RFC 3339 in UTC.", examples=["2026-11-20T13:45:00.123Z"])
    started_at: str | None = Field(description="Time of the first claim by a worker; null before.")
    finished_at: str | None = Field(description="Time of the final state; null before.")
    queue_position: int | None = Field(description="Number of jobs ahead in the queue; null once claimed.")
    estimated_start_s: float | None = Field(
        None, description="Estimated seconds until the start; null if the job does not wait or no estimate exists."
    )
    cancel_requested: bool = Field(description="Whether a cancel was requested; the job stops after the running step.")
    stages: dict[str, float] = Field(description="Seconds spent in each stage, including the queue.")
    warnings: list[str] = Field(description="Warnings, such as words of the prompt that the bundle does not know.")
    results: list[ResultBody] = Field(description="Result files; empty until the job has succeeded.")
    result_url: str | None = Field(description="Path of the first result; null until the job has succeeded.")
    status_url: str = Field(description="GET: the current state of the job.")
    events_url: str = Field(description="GET: progress as server-sent events; signed like results.")
    cancel_url: str = Field(description="POST: cancel the job.")
    error: dict[str, Any] | None = Field(description="Problem document if status is failed, else null.")


class JobsBody(BaseModel):
    """A page of the caller's jobs, newest first."""

    jobs: list[JobBody] = Field(description="Newest first.")
    next_cursor: str | None = Field(description="Pass it as `cursor` to get the next page; null on the last page.")


class DeadLetterBody(BaseModel):
    """A job that failed permanently."""

    id: str = Field(description="Id of the job.")
    bundle: str = Field(description="Bundle that ran the job.")
    deliveries: int = Field(description="Number of starts.")
    failed_at: str = Field(description="Time of the failure, RFC 3339 in UTC.")
    owner: str | None = Field(description="Name of the API key; null without keys or after the job record has expired.")
    error: dict[str, Any] = Field(description="Problem document.")
    blocked_reason: str | None = Field(description="Why the job cannot be retried; null if it can.")


class DeadLettersBody(BaseModel):
    """Jobs that failed permanently."""

    dead_letters: list[DeadLetterBody] = Field(description="Newest first.")


class Version(BaseModel):
    """The running version."""

    version: str = Field(description="Version of Giantleap.", examples=["0.1.0"])


class LatentSpaceBody(BaseModel):
    """The latents that /upscale takes for a bundle: scaled = (raw - shift) * scale, or (raw - mean) / std * scale."""

    name: str = Field(description="Name to send as `latent_space` to /upscale.")
    channels: int = Field(description="Channels of a raw latent.")
    stride: int = Field(description="Image pixels per latent pixel.")
    scale: float = Field(description="Factor applied to a raw latent to scale it.")
    shift: float = Field(description="Subtracted from a raw latent before the factor is applied.")
    packing: Packing = Field(
        description="Packing of scaled latents; flux: 2 x 2 patches as tokens; rows: latent pixels as tokens; frame: a "
        "video of one frame; none: not packed."
    )
    mean: list[float] | None = Field(description="Mean of each channel, used instead of shift; null if not used.")
    std: list[float] | None = Field(
        description="Standard deviation of each channel; divides before the factor; null if not used."
    )


class LoraBody(BaseModel):
    """A LoRA that requests for a bundle may name."""

    name: str = Field(description="Name to send in `loras`.")
    base: str | None = Field(description="Base model according to the file; null if it does not say.")
    rank: int = Field(description="Largest rank of its layers.")
    size_bytes: int = Field(description="Size of the file.")
    sha256: str = Field(description="SHA-256 of the file.")


class ModelBody(BaseModel):
    """A bundle with its defaults and limits."""

    name: str = Field(description="Name to send as `bundle`.")
    title: str = Field(description="One-line description.")
    license: str = Field(description="License of the base model.")
    provenance: str = Field(description="Origin of the weights.")
    method: Method = Field(description="Default method.")
    methods: dict[Method, list[int | float]] = Field(description="Available methods with their scale factors.")
    unavailable: dict[Method, str] = Field(description="Unavailable methods with the reason.")
    decodes: list[DecodeName] = Field(description="Available decodes.")
    from_image: bool = Field(description="Whether `init_image` is supported.")
    mask: bool = Field(description="Whether `mask` is supported.")
    max_images_in: int = Field(
        description="Maximum number of reference images (`images` of /generate); 0: not supported."
    )
    negative_prompt: bool = Field(description="Whether `negative_prompt` is supported.")
    refine: bool = Field(description="Whether `refine` is supported.")
    refine_unavailable: str | None = Field(description="Why `refine` is not supported; null if it is.")
    previews: bool = Field(description="Whether `previews` is supported.")
    scales: list[int | float] = Field(description="All scale factors of all methods.")
    steps: int = Field(description="Default number of denoising steps.")
    max_steps: int = Field(description="Maximum number of denoising steps.")
    guidance_scale: float = Field(description="Default guidance scale.")
    scale: int | float = Field(description="Default scale factor.")
    base_width: int = Field(
        description="Default width of the base image, pixels; the final image is `scale` times as wide."
    )
    base_height: int = Field(description="Default height of the base image, pixels.")
    min_base: int = Field(description="Minimum side of the base image, pixels.")
    max_base: int = Field(description="Maximum side of the base image, pixels.")
    max_direct: int | None = Field(
        description="Maximum side of an image of method `direct`, pixels; null if unavailable."
    )
    multiple: int = Field(description="Sides of the base image are multiples of this, pixels.")
    max_image_pixels: int = Field(description="Maximum pixels (width x height) of a final image.")
    max_images: int = Field(description="Maximum number of images of one job.")
    max_prompt_chars: int = Field(description="Maximum length of a prompt.")
    closed_vocabulary: bool = Field(
        description="Whether unknown words of a prompt have no meaning; `warnings` lists them."
    )
    latent_space: LatentSpaceBody = Field(description="Latent space of the bundle.")
    loras: list[LoraBody] = Field(description="LoRAs that fit the bundle.")
    engine: str = Field(description="Engine that runs LUA.")
    modes: dict[str, str] = Field(description="Memory modes: storage, offload, compilation and cache; empty: none.")
    loaded: bool = Field(
        description="Whether a worker has the bundle in memory; if not, a job waits until it is loaded."
    )


class Ready(BaseModel):
    """Readiness of this process."""

    ready: bool = Field(description="Whether requests are accepted and run.")
    reasons: list[str] = Field(description="Why the service is not ready; empty if it is.")
    warnings: list[str] = Field(
        description="Faults of the Redis configuration that may lose accepted jobs; empty if none."
    )


class WorkerBody(BaseModel):
    """A live worker."""

    device: DeviceKind = Field(description="Device type.")
    role: WorkerRole = Field(description="Stages that it runs.")
    memory_bytes: int = Field(description="Device memory available for weights and activations.")
    loaded_bytes: int = Field(description="Memory in use once its bundles, or as many as fit at once, are loaded.")
    bundles: list[str] = Field(description="Bundles whose jobs it claims.")
    loaded: list[str] = Field(description="Bundles in memory now.")


def to_worker_body(device: Device) -> WorkerBody:
    """A worker as GET /workers lists it."""
    return WorkerBody(
        device=device.kind,
        role=device.role,
        memory_bytes=device.memory_bytes,
        loaded_bytes=device.loaded_bytes,
        bundles=sorted(device.bundles),
        loaded=sorted(device.loaded),
    )


def to_model_body(served: ServedBundle, settings: Settings, loaded: bool) -> ModelBody:
    """A bundle as GET /models lists it."""
    bundle = served.bundle
    defaults, limits, space = bundle.defaults, bundle.limits, bundle.latent_space
    return ModelBody(
        name=bundle.name,
        title=bundle.about.title,
        license=bundle.about.license,
        provenance=bundle.about.provenance,
        method=defaults.method,
        methods={method: list(bundle.scales_of(method)) for method in bundle.methods},
        unavailable={method: reason for method in METHODS if (reason := bundle.unavailable_reason(method))},
        decodes=list(bundle.decodes),
        from_image=bundle.supports_init_image,
        mask=supports_mask(bundle),
        max_images_in=max_references(bundle),
        negative_prompt=bundle.takes_negative_prompt,
        refine=not bundle.refine_unavailable,
        refine_unavailable=bundle.refine_unavailable or None,
        previews=not bundle.descriptor.previews_unavailable,
        scales=list(bundle.scales),
        steps=defaults.steps,
        max_steps=limits.max_steps,
        guidance_scale=defaults.guidance_scale,
        scale=defaults.scale,
        base_width=defaults.base_width_px,
        base_height=defaults.base_height_px,
        min_base=limits.min_base_px,
        max_base=limits.max_base_px,
        max_direct=limits.max_direct_px,
        multiple=limits.multiple_px,
        max_image_pixels=settings.max_image_px,
        max_images=settings.max_num_images,
        max_prompt_chars=settings.max_prompt_chars,
        closed_vocabulary=bundle.closed_vocabulary,
        latent_space=LatentSpaceBody(
            name=space.name,
            channels=space.channels,
            stride=space.stride_px,
            scale=space.scale,
            shift=space.shift,
            packing=space.packing,
            mean=None if space.mean is None else list(space.mean),
            std=None if space.std is None else list(space.std),
        ),
        loras=[
            LoraBody(name=each.name, base=each.base, rank=each.rank, size_bytes=each.size_bytes, sha256=each.sha256)
            for each in served.loras.values()
        ],
        engine="torch" if bundle.lua is None else settings.engine,
        modes=bundle.modes.named,
        loaded=loaded,
    )


def to_job_body(record: JobRecord, links: Links) -> JobBody:
    """The body of a job."""
    job = record.job
    results = [
        ResultBody(
            url=links.result(job.id, index),
            content_type=result.content_type,
            size_bytes=result.size_bytes,
            seed=result.seed,
            width=result.width_px,
            height=result.height_px,
        )
        for index, result in enumerate(record.results)
    ]
    return JobBody(
        id=job.id,
        status=record.state,
        kind=job.params.kind,
        bundle=job.bundle,
        method=job.params.method,
        decode=job.params.decode,
        scale=job.params.scale,
        priority=job.priority,
        seed=job.params.seed,
        created_at=to_rfc3339(job.created_at_s),
        started_at=None if record.started_at_s is None else to_rfc3339(record.started_at_s),
        finished_at=None if record.finished_at_s is None else to_rfc3339(record.finished_at_s),
        queue_position=record.queue_position,
        estimated_start_s=record.estimated_start_s,
        cancel_requested=record.cancel_requested,
        stages=record.stages_s,
        warnings=list(record.all_warnings),
        results=results,
        result_url=results[0].url if results else None,
        status_url=links.job(job.id),
        events_url=links.events(job.id),
        cancel_url=f"{links.job(job.id)}/cancel",
        error=problem_body(from_job_error(record.error), job.id) if record.error is not None else None,
    )


def to_dead_letter_body(letter: DeadLetter) -> DeadLetterBody:
    """The body of a dead letter."""
    return DeadLetterBody(
        id=letter.id,
        bundle=to_bundle(letter.lane.rpartition(":")[0]),
        deliveries=letter.deliveries,
        failed_at=to_rfc3339(letter.failed_at_ms / 1000),
        owner=None if letter.job is None else letter.job.owner or None,
        error=problem_body(from_job_error(letter.error), letter.id),
        blocked_reason=blocked_reason(letter),
    )
