"""The JSON forms of the HTTP interface, as pydantic models: requests, the job body, bundles, health, problems.

Values are checked here for form (types, ranges that never change); `giantleap.service.jobs.planning` checks them
against the bundle and the settings. Times are RFC 3339 in UTC, durations seconds, sizes of images pixels of the final
image.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.bundle.descriptor import METHODS, DecodeName, Method
from giantleap.models.latent_space import Packing
from giantleap.models.lua.spec import to_scale
from giantleap.service.api.problems import from_job_error, problem_body
from giantleap.service.jobs.job import GenerateParams, JobRecord, JobState, Priority
from giantleap.service.settings import Settings

OutputFormat = Literal["png", "jpeg", "webp"]
PriorityName = Literal["high", "low"]
MAX_SEED = 2**63 - 1

WebhookEvent = Literal["succeeded", "failed", "canceled"]
SideField = Annotated[int | None, Field(ge=1, le=65_536, examples=[256])]


Scale = Annotated[float, Field(ge=1, le=64, allow_inf_nan=False), AfterValidator(to_scale)]
DecodeField: Any = Field(
    "exact",
    description="exact: the whole image at once, in strips where memory asks for it, to the same result; tiled: "
    "overlapping tiles, which changes the image; tiny: a fast preview by a small decoder, where the bundle has one.",
)


class WebhookRequest(BaseModel):
    """Where to post a signed note when the job has ended."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: str = Field(min_length=1, max_length=2048, description="http or https; an address that is not public: 422.")
    events: Annotated[tuple[WebhookEvent, ...], Field(min_length=1, max_length=3, strict=False)] = Field(
        ("succeeded", "failed", "canceled"), description="The final states that are told."
    )


class GenerateRequest(BaseModel):
    """A prompt to draw. What is left out takes the bundle's default (`GET /models` lists them)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: Annotated[
        str, StringConstraints(min_length=1, pattern=r"\S"), Field(examples=["a red sphere on a green floor"])
    ] = Field(description="What to draw.")
    negative_prompt: str | None = Field(None, description="What to keep away from.")
    scale: Scale | None = Field(
        None, examples=[2], description="Enlargement of the base latent; 1: none. The bundle lists them."
    )
    width: SideField = Field(None, description="Width of the final image, pixels.")
    height: SideField = Field(None, description="Height of the final image, pixels.")
    steps: int | None = Field(None, ge=1, le=1000, description="Denoising steps.")
    guidance_scale: float | None = Field(
        None, ge=0.0, le=100.0, allow_inf_nan=False, description="Weight of the prompt; 1 or less: no guidance."
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Seed of the first image, the next ones follow; drawn if left out."
    )
    num_images: int = Field(1, ge=1, description="Images of this job.")
    bundle: str | None = Field(None, max_length=128, description="Name of a bundle; the first one if left out.")
    output_format: OutputFormat | None = Field(
        None, description="File format; if left out, the one that Accept names, else png."
    )
    priority: PriorityName = Field("high", description="high is claimed before low.")
    method: Method | None = Field(
        None,
        description="lua: enlarge the latent, decode once; bicubic: the same by interpolation; swinir: decode, then "
        "enlarge pixels; direct: draw at the final size. The bundle's default if left out; never replaced by another.",
    )
    decode: DecodeName = DecodeField
    init_image: str | None = Field(
        None,
        min_length=1,
        description="Image to start from, PNG, JPEG or WebP as base64, also as a data: URL; resized to the base size.",
    )
    strength: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        allow_inf_nan=False,
        description="How far to leave init_image: its share of the steps is run. 0.6 if left out.",
    )
    webhook: WebhookRequest | None = Field(None, description="Whom to tell when the job has ended.")


class UpscaleQuery(BaseModel):
    """How to read and enlarge the latent or the image in the body."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Scale | None = Field(None, description="Enlargement; the bundle's default if left out.")
    latent_space: str | None = Field(
        None, max_length=64, description="Latent space of the tensor; it must be the bundle's."
    )
    scaled: bool = Field(
        False,
        description="true: as a diffusion pipeline hands it out, (raw - shift) x scale; false: raw VAE latent.",
    )
    bundle: str | None = Field(None, max_length=128, description="Name of a bundle; the first one if left out.")
    output: Literal["image", "latent"] = Field("image", description="Decode the result, or answer the raw latent.")
    output_format: OutputFormat | None = Field(
        None, description="File format of an image; if left out, the one that Accept names, else png."
    )
    priority: PriorityName = Field("high", description="high is claimed before low.")
    method: Literal["lua", "bicubic", "swinir"] | None = Field(
        None, description="As of /generate; swinir enlarges the pixels of an image as they are."
    )
    decode: DecodeName = DecodeField
    width: SideField = Field(None, description="Only for a packed tensor: width of its own image, pixels.")
    height: SideField = Field(None, description="Only for a packed tensor: height of its own image, pixels.")
    webhook_url: str | None = Field(
        None, min_length=1, max_length=2048, description="Where to post a signed note when the job has ended."
    )
    webhook_events: str | None = Field(
        None,
        pattern="^(succeeded|failed|canceled)(,(succeeded|failed|canceled)){0,2}$",
        description="The final states that are told, comma-separated; all if left out.",
    )


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
    reasons: list[str] | None = Field(None, description="Of /readyz: each reason.")


class ResultBody(BaseModel):
    """One file that a job made."""

    url: str = Field(description="Path of the file.")
    content_type: str = Field(description="An image type, or application/x-safetensors.")
    size_bytes: int = Field(description="Length of the file.")
    seed: int | None = Field(description="Gives this image again; null for an upscale.")
    width: int | None = Field(description="Pixels.")
    height: int | None = Field(description="Pixels.")


class JobBody(BaseModel):
    """A job. It never holds the prompt."""

    id: str = Field(description="A UUID in lower case.")
    status: JobState = Field(description="queued and processing go on; succeeded, failed and canceled are final.")
    kind: Literal["generate", "upscale"] = Field(description="The route that made it.")
    bundle: str = Field(description="What runs it.")
    method: Method = Field(description="How the image becomes large; never another than was asked for.")
    decode: DecodeName = Field(description="exact, or how the image differs from that.")
    scale: int | float = Field(description="Enlargement of each side.")
    priority: Priority = Field(description="high is claimed before low.")
    seed: int | None = Field(description="Seed of the first image; null for an upscale.")
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
    events_url: str = Field(description="GET: its progress as server-sent events.")
    cancel_url: str = Field(description="POST: cancel it.")
    error: dict[str, Any] | None = Field(description="A problem, where status is failed.")


class JobsBody(BaseModel):
    """A page of the caller's jobs, newest first."""

    jobs: list[JobBody] = Field(description="Newest first.")
    next_cursor: str | None = Field(description="Send it as cursor for the next page; null on the last one.")


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
    negative_prompt: bool = Field(description="Whether a negative prompt is taken.")
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
    engine: str = Field(description="What runs LUA.")


class Ready(BaseModel):
    """Whether requests should be sent here, and if not, why."""

    ready: bool = Field(description="true: send requests here.")
    reasons: list[str] = Field(description="Why not; empty where ready.")


def to_model_body(bundle: Bundle, settings: Settings) -> ModelBody:
    """What GET /models says of a bundle."""
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
        from_image=bundle.from_image,
        negative_prompt=bundle.takes_negative_prompt,
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
        engine="torch" if bundle.lua is None else settings.engine,
    )


def to_job_body(record: JobRecord, root_path: str = "") -> JobBody:
    """The job body of a record; URLs are paths on this host."""
    job = record.job
    url = f"{root_path}/jobs/{job.id}"
    results = [
        ResultBody(
            url=f"{url}/result?index={index}",
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
        seed=job.params.seed if isinstance(job.params, GenerateParams) else None,
        created_at=to_rfc3339(job.created_at_s),
        started_at=None if record.started_at_s is None else to_rfc3339(record.started_at_s),
        finished_at=None if record.finished_at_s is None else to_rfc3339(record.finished_at_s),
        queue_position=record.queue_position,
        estimated_start_s=record.estimated_start_s,
        cancel_requested=record.cancel_requested,
        stages=stages_s(record),
        warnings=list(dict.fromkeys((*job.warnings, *record.warnings))),
        results=results,
        result_url=results[0].url if results else None,
        status_url=url,
        events_url=f"{url}/events",
        cancel_url=f"{url}/cancel",
        error=problem_body(from_job_error(record.error), job.id) if record.error is not None else None,
    )


def to_rfc3339(time_s: float) -> str:
    """A Unix time as RFC 3339 in UTC with milliseconds."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def stages_s(record: JobRecord) -> dict[str, float]:
    """Seconds of each stage in order, the wait in the queue first."""
    if record.started_at_s is None or "queue" in record.stages:
        return dict(record.stages)
    return {"queue": max(0.0, record.started_at_s - record.job.created_at_s), **record.stages}
