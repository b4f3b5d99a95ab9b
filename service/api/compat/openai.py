"""OpenAI image generation over the same jobs: generations, their files by URL, and the list of models.

Own fields are added to those of OpenAI (`scale`, `seed`, ...). Of fields that cannot be honored only the default is
taken, which changes nothing; the names of a user have no effect there either. `docs/compatibility.md` lists all.
"""

import asyncio
import base64
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from giantleap.models.bundle.descriptor import Method
from giantleap.models.pixels.image_formats import Compression, ImageFormat
from giantleap.service.api.compat.shared import find_bundle, validate_as
from giantleap.service.api.dependencies import AppState, AppStateDep, RecordDep, links_of
from giantleap.service.api.openapi import IMAGE_TYPES, REDIRECT, describe_responses, file_content
from giantleap.service.api.paths import OPENAI_PATH
from giantleap.service.api.problems import compat_error, problem_body
from giantleap.service.api.responses import JobProblem, read_results, result_headers, result_response
from giantleap.service.api.sse import EVENT_STREAM_HEADERS, EVENT_STREAM_TYPE, HEARTBEAT_S, to_block
from giantleap.service.api.submission import (
    CompatOptionsDep,
    SubmitOptions,
    new_job,
    require_json,
    require_success,
    run_job,
    submit_job,
    wait_for_job,
)
from giantleap.service.errors import GiantleapError, InvalidFields
from giantleap.service.jobqueue.client import cancel_tasks
from giantleap.service.jobs.fields import FormatName, Integer, JsonRequest, Pattern
from giantleap.service.jobs.job import GenerateParams, Job, JobRecord
from giantleap.service.jobs.media_types import JSON_TYPE
from giantleap.service.jobs.planning import warn_of_words
from giantleap.service.jobs.requests import (
    LORAS_FIELD,
    CompressionField,
    GenerateRequest,
    Loras,
    RefineRequest,
    Scale,
)

router = APIRouter(prefix=OPENAI_PATH, tags=["OpenAI"])

EventKind = Literal["image_generation", "image_edit"]

# Names of the fields of GenerateRequest in OpenAI's requests.
_NAMES = {
    "bundle": "model",
    "num_images": "n",
    "width": "size",
    "height": "size",
    "steps": "num_inference_steps",
    "previews": "partial_images",
    "quality": "output_compression",
    "init_image": "image",
    "images": "image",
}


_SIZE = Pattern(
    r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", "must be WIDTHxHEIGHT in pixels, for example 1024x1024, or auto"
)


class ImagesRequest(JsonRequest):
    """A request to generate, with OpenAI's field names; the last nine fields are extensions."""

    prompt: str = Field(description="Prompt.")
    model: str | None = Field(default=None, max_length=128, description="Name of a bundle; default: the first one.")
    n: Integer | None = Field(default=None, description="Number of images; default: 1.")
    size: Annotated[str, _SIZE] | None = Field(
        default=None, description="WIDTHxHEIGHT of the final image, pixels; auto: the bundle's."
    )
    response_format: Literal["b64_json", "url"] | None = Field(default=None, description="Default: both.")
    output_format: FormatName | None = Field(default=None, description="Default: png.")
    quality: Literal["auto", "standard"] | None = Field(default=None, description="Accepted; changes nothing.")
    background: Literal["auto", "opaque"] | None = Field(default=None, description="Accepted; images are opaque.")
    stream: bool | None = Field(default=None, description="Send the response as server-sent events.")
    partial_images: Integer | None = Field(
        default=None, ge=0, le=3, description="Maximum number of previews (small JPEGs) per image, sent with `stream`."
    )
    output_compression: Integer | None = Field(
        default=None, ge=0, le=100, description="Quality of JPEG and WebP; default: 95. PNG: only 100."
    )
    moderation: Literal["auto", "low"] | None = Field(default=None, description="Accepted; prompts are not moderated.")
    style: Literal["vivid"] | None = Field(default=None, description="Accepted; changes nothing.")
    user: str | None = Field(default=None, max_length=512, description="Ignored.")
    safety_identifier: str | None = Field(default=None, max_length=512, description="Ignored.")
    negative_prompt: str | None = None
    num_inference_steps: Integer | None = None
    guidance_scale: float | None = None
    seed: Integer | None = None
    scale: Scale | None = Field(default=None, description="Scale factor.")
    method: Method | None = None
    refine: RefineRequest | None = Field(default=None, description="Refine pass; default: none.")
    loras: Loras = LORAS_FIELD
    compression: Compression | None = CompressionField


class OpenAIErrorFields(BaseModel):
    """Details of an error."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None
    code: str = Field(examples=["queue_full"])


class OpenAIError(BaseModel):
    """An error."""

    error: OpenAIErrorFields


class ImageData(BaseModel):
    """One image."""

    b64_json: str | None = None
    url: str | None = Field(default=None, description="Valid until the job's time to live has passed.")
    seed: int | None = None


class ImagesResponse(BaseModel):
    """The images of a request."""

    created: int = Field(description="Unix time, seconds.")
    data: list[ImageData]
    size: str = Field(examples=["1024x1024"])
    output_format: ImageFormat
    background: Literal["opaque"] = "opaque"


class OpenAIModel(BaseModel):
    """A bundle as a model."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(default=0, description="Always 0: not known.")
    owned_by: str = "giantleap"


class OpenAIModels(BaseModel):
    """All bundles."""

    object: Literal["list"] = "list"
    data: list[OpenAIModel]


@router.get("/models")
async def list_models(state: AppStateDep) -> OpenAIModels:
    """List bundles, the default first, and their aliases."""
    return OpenAIModels(data=[OpenAIModel(id=name) for name in (*state.bundles, *state.settings.model_aliases)])


@router.get("/models/{model}", responses=describe_responses({}, 404, model=OpenAIError))
async def get_model(model: str, state: AppStateDep) -> OpenAIModel:
    """One bundle or alias."""
    find_bundle(state, model)
    return OpenAIModel(id=model)


@router.post(
    "/images/generations",
    response_model=ImagesResponse,
    responses=describe_responses(
        {200: {"content": {EVENT_STREAM_TYPE: {"schema": {"type": "string"}}}}},
        *(400, 404, 409, 413, 415, 422, 429, 503, 504),
        model=OpenAIError,
    ),
    dependencies=[Depends(require_json)],
)
async def post_generation(
    request: Request, body: ImagesRequest, state: AppStateDep, options: CompatOptionsDep
) -> Response:
    """Generate images from a prompt; returned as base64, by URL, or as events."""
    job, _ = plan_job(body, state, options)
    return await respond(request, state, body, job, None, options)


async def respond(
    request: Request,
    state: AppState,
    body: ImagesRequest,
    job: Job,
    blob: bytes | None,
    options: SubmitOptions,
    kind: EventKind = "image_generation",
) -> Response:
    """Run a job and answer its images, as events of a kind where the client streams."""
    if body.stream:
        enqueued = await submit_job(request, state, job, blob, options)
        headers = EVENT_STREAM_HEADERS | {"X-Job-Id": enqueued.job_id}
        events = stream_generation(request, state, replace(job, id=enqueued.job_id), options, kind=kind)
        return StreamingResponse(events, 200, headers, EVENT_STREAM_TYPE)
    record = await run_job(request, state, job, blob, options)
    files = [] if body.response_format == "url" else await read_results(state, record)
    data = await asyncio.to_thread(to_data, record, files)
    if body.response_format != "b64_json":  # clients of some libraries read the url without requesting it
        host, links = request.base_url.replace(path=""), links_of(request)
        urls = [f"{host}{links.image(record.job.id, index)}" for index in range(len(data))]
        data = [image.model_copy(update={"url": url}) for image, url in zip(data, urls, strict=True)]
    content = ImagesResponse(created=created_s(record), data=data, **describe_images(record))
    return Response(content.model_dump_json(exclude_none=True), 200, result_headers(record), JSON_TYPE)


@router.get(
    "/images/{job_id}/content",
    response_class=Response,
    responses=describe_responses(
        {200: {"content": file_content(*IMAGE_TYPES)}, 307: REDIRECT}, 404, 409, 422, 503, model=OpenAIError
    ),
)
async def get_content(
    request: Request,
    record: RecordDep,
    state: AppStateDep,
    index: Annotated[int, Query(ge=0, le=9999, description="Which image, from 0.")] = 0,
) -> Response:
    """Download an image that was returned by URL."""
    return await result_response(request, state, record, index)


def plan_job(
    body: ImagesRequest, state: AppState, options: SubmitOptions, further: Mapping[str, object] | None = None
) -> tuple[Job, GenerateRequest]:
    """The request as a job, and as one of /generate, with `further` fields of that.

    Raises:
        InvalidFields: A value is not valid or over a limit; fields have OpenAI's names.
        DoesNotFit: No device can hold one image.
    """
    if body.stream and body.response_format == "url":
        raise InvalidFields(("response_format", "is url, but events carry b64_json; leave one of them out"))
    if body.partial_images is not None and not body.stream:
        raise InvalidFields(("partial_images", "needs stream=true"))
    width, height = (None, None) if body.size in (None, "auto") else map(int, str(body.size).split("x"))
    values = {
        "prompt": body.prompt,
        "bundle": body.model,
        "num_images": 1 if body.n is None else body.n,
        "width": width,
        "height": height,
        "output_format": body.output_format,
        "compression": body.compression,
        "quality": _to_quality(body),
        "negative_prompt": body.negative_prompt,
        "steps": body.num_inference_steps,
        "guidance_scale": body.guidance_scale,
        "seed": body.seed,
        "scale": body.scale,
        "method": body.method,
        "refine": body.refine,
        "loras": body.loras,
        "previews": body.partial_images or 0,
    } | dict(further or {})
    request = validate_as(GenerateRequest, values, _NAMES)
    try:
        served = state.select_bundle(request.bundle)
        seed = options.choose_seed(request.seed)
        params = state.plan_generate(request, served, seed, request.output_format or "png")
    except InvalidFields as error:
        raise InvalidFields(*((_NAMES.get(name, name), reason) for name, reason in error.fields)) from error
    return new_job(served, params, options, warnings=warn_of_words(served, params)), request


def _to_quality(body: ImagesRequest) -> int | None:
    """The quality that output_compression means; its default 100 says nothing of a PNG."""
    percent = body.output_compression
    return None if percent is None or (percent == 100 and body.output_format in (None, "png")) else max(1, percent)


async def stream_generation(
    request: Request,
    state: AppState,
    job: Job,
    options: SubmitOptions,
    heartbeat_s: float = HEARTBEAT_S,
    kind: EventKind = "image_generation",
) -> AsyncGenerator[str]:
    """One event for each image, or one `error`; comments while there is nothing to send.

    Before them come the previews that the job asks for. When the client stops reading, the job is canceled as the
    options say.
    """
    waiting = asyncio.ensure_future(wait_for_job(request, state, job.id, options))
    partials = _read_partials(state, job, kind)
    pending = asyncio.ensure_future(anext(partials, None))
    try:
        while tasks := [task for task in (waiting, pending) if not task.done()]:
            await asyncio.wait(tasks, timeout=heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
            if pending.done() and (partial := pending.result()) is not None:
                yield to_block(*partial)
                pending = asyncio.ensure_future(anext(partials, None))
            elif not waiting.done():
                yield ": waiting\n\n"
            elif waiting.exception() is not None or not waiting.result().state.final:
                break
        for name, data in await _to_events(request, state, waiting, options, f"{kind}.completed"):
            yield to_block(name, data)
    finally:
        # The server cancels this generator when the client disconnects; the job must be canceled all the same.
        with anyio.CancelScope(shield=True), suppress(asyncio.CancelledError, ClientDisconnect, GiantleapError):
            await cancel_tasks((pending,))
            await partials.aclose()
            if not waiting.done():
                waiting.cancel()
                if options.cancel_on_disconnect:
                    await state.producer.cancel(job.id)
            await waiting


async def _read_partials(state: AppState, job: Job, kind: EventKind) -> AsyncGenerator[tuple[str, dict[str, Any]]]:
    """The previews of a job as events `partial_image` of a kind; those of an image are counted from 0."""
    assert isinstance(job.params, GenerateParams), "this protocol makes no other job"
    if not job.params.previews:
        return
    name, counts = f"{kind}.partial_image", dict.fromkeys(range(job.params.num_images), 0)
    shared = {"type": name, "size": f"{job.params.width_px}x{job.params.height_px}", "output_format": "jpeg"}
    shared |= {"background": "opaque", "quality": "auto"}
    with suppress(GiantleapError):  # the waiting caller says what is wrong
        async for event in state.producer.events(job.id):
            if event.name == "preview":
                index = event.data["index"]
                data = {"b64_json": event.data["image"], "partial_image_index": counts[index], "image_index": index}
                yield name, shared | {"created_at": int(job.created_at_s)} | data
                counts[index] += 1


async def _to_events(
    request: Request, state: AppState, waiting: "asyncio.Future[JobRecord]", options: SubmitOptions, name: str
) -> list[tuple[str, dict[str, Any]]]:
    try:
        record = require_success(state, waiting.result(), options)
        images = await asyncio.to_thread(to_data, record, await read_results(state, record))
    except ClientDisconnect:
        return []
    except (GiantleapError, JobProblem) as problem:  # too late for a status
        error = problem.error if isinstance(problem, JobProblem) else problem
        body = problem_body(error, request.state.request_id)
        return [("error", compat_error(OPENAI_PATH, body) or body)]
    shared = describe_images(record) | {
        "type": name,
        "created_at": created_s(record),
        "background": "opaque",
        "quality": "auto",
    }
    return [(name, shared | image.model_dump(exclude_none=True)) for image in images]


def to_data(record: JobRecord, files: list[bytes]) -> list[ImageData]:
    """Each image with its seed and, where there are files, as base64 text."""
    texts = [base64.b64encode(file).decode() for file in files]
    return [ImageData(b64_json=text, seed=result.seed) for text, result in zip_longest(texts, record.results) if result]


def describe_images(record: JobRecord) -> dict[str, Any]:
    """Size and format of the images of a job."""
    params = record.job.params
    assert isinstance(params, GenerateParams), "this protocol makes no other job"
    return {"size": f"{params.width_px}x{params.height_px}", "output_format": params.output_format}


def created_s(record: JobRecord) -> int:
    """When the images were made: Unix time, whole seconds."""
    return int(record.job.created_at_s if record.finished_at_s is None else record.finished_at_s)
