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
    """One field that is not valid; its value is never repeated."""

    field: str = Field(description="Its name; fields of a field are parted by dots.", examples=["steps"])
    reason: str = Field(description="What came and what is allowed.")


class Problem(BaseModel):
    """An error (RFC 9457). `code` is stable; `instance` is the X-Request-Id to look for in the log."""

    type: str = Field(description="The code as a URN.", examples=["urn:giantleap:problem:queue_full"])
    title: str = Field(description="What the code means; the same for each error of this code.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What came, what is allowed, what to do.")
    code: str = Field(description="What to decide by; it never changes.", examples=["queue_full"])
    instance: str = Field(description="The X-Request-Id of the answer, under which the log has the request.")
    retryable: bool = Field(description="Whether the same request may succeed later.")
    errors: list[FieldProblem] | None = Field(None, description="Only with code invalid_request.")
    job_id: str | None = Field(None, description="The job that the error is about, where there is one.")
    status_url: str | None = Field(None, description="Path of that job.")
    needed_bytes: int | None = Field(None, description="Of does_not_fit: what the job needs.")
    device_bytes: int | None = Field(None, description="Of does_not_fit: what the largest device has.")
    largest: dict[str, int] | None = Field(None, description="Of does_not_fit: width and height that would fit.")
    needed_megapixel_steps: float | None = Field(None, description="Of work_limited, over_budget: work of the job.")
    megapixel_steps_per_minute: int | None = Field(None, description="Of work_limited, over_budget: the key's budget.")
    reasons: list[str] | None = Field(None, description="Of /readyz: each reason.")


class ResultBody(BaseModel):
    """One file that a job made."""

    url: str = Field(description="Path of the file; signed, where the service signs: then it needs no key.")
    content_type: str = Field(description="An image type, or application/x-safetensors.")
    size_bytes: int = Field(description="Length of the file.")
    seed: int | None = Field(description="Gives this image again; null for an upscale that is not refined.")
    width: int | None = Field(description="Pixels.")
    height: int | None = Field(description="Pixels.")


class JobBody(BaseModel):
    """A job. It never holds the prompt."""

    id: str = Field(description="A UUID in lower case.")
    status: JobState = Field(description="queued and processing go on; succeeded, failed and canceled are final.")
    kind: Literal["generate", "upscale"] = Field(description="The route that made it.")
    bundle: str = Field(description="What runs it.")
    method: Method = Field(description="How the image is enlarged: always the requested method.")
    decode: DecodeName = Field(description="exact, or how the image differs from that.")
    scale: int | float = Field(description="Enlargement of each side.")
    priority: Priority = Field(description="high is claimed before low.")
    seed: int | None = Field(description="Seed of the first image; null for an upscale that is not refined.")
    created_at: str = Field(description="When it was accepted, RFC 3339 in UTC.", examples=["2026-11-20T13:45:00.123Z"])
    started_at: str | None = Field(description="When a worker claimed it; null before.")
    finished_at: str | None = Field(description="When it reached its final state; null before.")
    queue_position: int | None = Field(description="Jobs that are claimed before this one; null once claimed.")
    estimated_start_s: float | None = Field(
        None, description="Seconds until it starts, from the jobs before it; null where it does not wait or none ended."
    )
    cancel_requested: bool = Field(description="It will stop after the step that runs.")
    stages: dict[str, float] = Field(description="Seconds spent in each stage, the queue included.")
    warnings: list[str] = Field(description="For example words of the prompt that the bundle does not know.")
    results: list[ResultBody] = Field(description="Its files; empty until it has succeeded.")
    result_url: str | None = Field(description="The first result; null until the job has succeeded.")
    status_url: str = Field(description="GET: this document as it is then.")
    events_url: str = Field(description="GET: its progress as server-sent events; signed as the results are.")
    cancel_url: str = Field(description="POST: cancel it.")
    error: dict[str, Any] | None = Field(description="A problem, where status is failed.")


class JobsBody(BaseModel):
    """A page of the caller's jobs, newest first."""

    jobs: list[JobBody] = Field(description="Newest first.")
    next_cursor: str | None = Field(description="Send it as cursor for the next page; null on the last one.")


class DeadLetterBody(BaseModel):
    """A job that failed for good."""

    id: str = Field(description="The job.")
    bundle: str = Field(description="What ran it.")
    deliveries: int = Field(description="How often it was started.")
    failed_at: str = Field(description="RFC 3339 in UTC.")
    owner: str | None = Field(description="Name of its API key; null without keys, or once its record has expired.")
    error: dict[str, Any] = Field(description="A problem.")
    blocked_reason: str | None = Field(description="Why it cannot be retried; null where it can.")


class DeadLettersBody(BaseModel):
    """The jobs that failed for good."""

    dead_letters: list[DeadLetterBody] = Field(description="The latest first.")


class Version(BaseModel):
    """What runs here."""

    version: str = Field(description="Of Giantleap.", examples=["0.1.0"])


class LatentSpaceBody(BaseModel):
    """The latents that /upscale takes for a bundle: scaled = (raw - shift) * scale, or (raw - mean) / std * scale."""

    name: str = Field(description="What latent_space of /upscale is compared with.")
    channels: int = Field(description="Of a raw latent.")
    stride: int = Field(description="Image pixels per latent pixel.")
    scale: float = Field(description="Factor of a scaled latent.")
    shift: float = Field(description="Taken from a raw latent before the factor.")
    packing: Packing = Field(
        description="flux: 2 x 2 patches become tokens; rows: pixels do; frame: a video of one frame; none: as it is."
    )
    mean: list[float] | None = Field(description="Per channel, in place of shift; null where there is none.")
    std: list[float] | None = Field(description="Per channel, divides before the factor; null where there is none.")


class LoraBody(BaseModel):
    """A LoRA that requests for a bundle may name."""

    name: str = Field(description="What loras of a request are compared with.")
    base: str | None = Field(description="The model that it was made for, as its file says; null where it does not.")
    rank: int = Field(description="The largest of its layers.")
    size_bytes: int = Field(description="Of its file.")
    sha256: str = Field(description="Of its file.")


class ModelBody(BaseModel):
    """A bundle that jobs may name, with what a request gets that does not say, and what it may ask for."""

    name: str = Field(description="What a request's bundle is compared with.")
    title: str = Field(description="What it draws, in a line.")
    license: str = Field(description="Of the base model.")
    provenance: str = Field(description="Where its weights come from.")
    method: Method = Field(description="The method by default.")
    methods: dict[Method, list[int | float]] = Field(
        description="The methods that the bundle has, with their enlargements."
    )
    unavailable: dict[Method, str] = Field(description="The other methods, with the reason.")
    decodes: list[DecodeName] = Field(description="The ways to decode that it has.")
    from_image: bool = Field(description="Whether init_image is taken.")
    mask: bool = Field(description="Whether a mask is taken with it.")
    max_images_in: int = Field(description="Most reference images, images of /generate; 0: none.")
    negative_prompt: bool = Field(description="Whether a negative prompt is taken.")
    refine: bool = Field(description="Whether an enlarged latent can be refined.")
    refine_unavailable: str | None = Field(description="Why not; null if it can.")
    previews: bool = Field(description="Whether previews can be made on the way.")
    scales: list[int | float] = Field(description="Every enlargement, by whatever method.")
    steps: int = Field(description="Denoising steps by default.")
    max_steps: int = Field(description="Most denoising steps.")
    guidance_scale: float = Field(description="Weight of the prompt by default.")
    scale: int | float = Field(description="Enlargement by default.")
    base_width: int = Field(description="Pixels of the base image by default; the final one is `scale` times as wide.")
    base_height: int = Field(description="Pixels, as base_width.")
    min_base: int = Field(description="Smallest side of the base image, pixels.")
    max_base: int = Field(description="Largest side of the base image, pixels.")
    max_direct: int | None = Field(description="Largest side of an image that method direct draws, pixels.")
    multiple: int = Field(description="Sides of the base image are multiples of this, pixels.")
    max_image_pixels: int = Field(description="Most pixels, width x height, of a final image.")
    max_images: int = Field(description="Most images of one job.")
    max_prompt_chars: int = Field(description="Longest prompt.")
    closed_vocabulary: bool = Field(description="Words that are not in the vocabulary have no meaning; they are named.")
    latent_space: LatentSpaceBody = Field(description="Its latents.")
    loras: list[LoraBody] = Field(description="The LoRAs that fit it.")
    engine: str = Field(description="What runs LUA.")
    modes: dict[str, str] = Field(
        description="How its weights are stored, moved, compiled and skipped; empty: plainly."
    )
    loaded: bool = Field(description="Whether a worker has it in memory; if none has, a job waits for the load.")


class Ready(BaseModel):
    """Whether requests should be sent here, and if not, why."""

    ready: bool = Field(description="true: send requests here.")
    reasons: list[str] = Field(description="Why not; empty where ready.")
    warnings: list[str] = Field(description="How Redis may lose accepted jobs; empty where it is set up well.")


class WorkerBody(BaseModel):
    """A live worker: its device, what it runs and what it has in memory."""

    device: DeviceKind = Field(description="What it computes on.")
    role: WorkerRole = Field(description="The stages that it runs.")
    memory_bytes: int = Field(description="What weights and activations may use of the device.")
    loaded_bytes: int = Field(description="In use once its bundles are loaded, or as many as may be at once.")
    bundles: list[str] = Field(description="The bundles whose jobs it takes.")
    loaded: list[str] = Field(description="Those of them that are in memory now.")


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
