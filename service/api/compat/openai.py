"""The OpenAI form of image generation, over the same jobs: generations, their files by URL, and the list of models.

Fields of ours stand beside those of OpenAI (`scale`, `seed`, ...). A field that could not be honored is refused, except
`user`, which changes nothing there either. `docs/compatibility.md` says which is which.
"""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from giantleap.models.bundle.descriptor import Method
from giantleap.models.image_formats import ImageFormat
from giantleap.service.api.compat.errors import OPENAI_PATH
from giantleap.service.api.compat.shared_job import (
    CompatOptions,
    TermsDep,
    abandon_job,
    describe_errors,
    find_bundle,
    finish_job,
    new_job,
    read_results,
    response_headers,
    run_job,
    validate_as,
)
from giantleap.service.api.dependencies import AppState, AppStateDep
from giantleap.service.api.openapi import IMAGE_TYPES, file_content
from giantleap.service.api.problems import problem_response
from giantleap.service.api.routes.create import random_seed, require_json
from giantleap.service.api.routes.jobs import RecordDep, get_result
from giantleap.service.api.sse import EVENT_STREAM_TYPE, HEARTBEAT_S
from giantleap.service.api.submission import admit
from giantleap.service.errors import GiantleapError, InvalidFields
from giantleap.service.jobs.bundles import select_bundle
from giantleap.service.jobs.job import GenerateParams, Job, JobRecord
from giantleap.service.jobs.media_types import JSON_TYPE
from giantleap.service.jobs.planning import plan_generate, warn_of_words
from giantleap.service.jobs.requests import GenerateRequest, Scale

router = APIRouter(prefix=OPENAI_PATH, tags=["OpenAI"])

# What a field of GenerateRequest is called here.
_NAMES = {
    "bundle": "model",
    "num_images": "n",
    "width": "size",
    "height": "size",
    "steps": "num_inference_steps",
}


class ImagesRequest(BaseModel):
    """A prompt to draw, in OpenAI's words; the last six fields are ours."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(description="What to draw.")
    model: str | None = Field(default=None, max_length=128, description="A bundle; the first one if left out.")
    n: int | None = Field(default=None, description="Images of this request; 1 if left out.")
    size: Annotated[str, StringConstraints(pattern=r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$")] | None = Field(
        default=None, description="WIDTHxHEIGHT of the final image, pixels; auto: the bundle's."
    )
    response_format: Literal["b64_json", "url"] | None = Field(default=None, description="b64_json if left out.")
    output_format: ImageFormat | None = Field(default=None, description="png if left out.")
    quality: Literal["auto", "standard"] | None = Field(default=None, description="The bundle's steps.")
    background: Literal["auto", "opaque"] | None = Field(default=None, description="Images are opaque.")
    stream: bool | None = Field(default=None, description="Answer as events.")
    partial_images: int | None = Field(
        default=None, ge=0, le=3, description="At most so many are sent before the image; this service sends none."
    )
    user: str | None = Field(default=None, max_length=512, description="Ignored.")
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    scale: Scale | None = Field(default=None, description="Enlargement of the base latent.")
    method: Method | None = None


class OpenAIErrorFields(BaseModel):
    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None
    code: str = Field(examples=["queue_full"])


class OpenAIError(BaseModel):
    error: OpenAIErrorFields


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = Field(default=None, description="Readable until the job's time to live has passed.")
    seed: int | None = None


class ImagesAnswer(BaseModel):
    created: int = Field(description="Unix time, seconds.")
    data: list[ImageData]
    size: str = Field(examples=["1024x1024"])
    output_format: ImageFormat
    background: Literal["opaque"] = "opaque"


class OpenAIModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(default=0, description="Not known: 0.")
    owned_by: str = "giantleap"


class OpenAIModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]


@router.get("/models")
async def list_models(serving: AppStateDep) -> OpenAIModels:
    """The bundles that requests may name, the default first."""
    return OpenAIModels(data=[OpenAIModel(id=name) for name in serving.bundles])


@router.get("/models/{model}", responses=describe_errors(OpenAIError, 404))
async def get_model(model: str, serving: AppStateDep) -> OpenAIModel:
    """One bundle."""
    return OpenAIModel(id=find_bundle(serving, model).bundle.name)


@router.post(
    "/images/generations",
    response_model=ImagesAnswer,
    responses=describe_errors(
        OpenAIError,
        *(400, 404, 409, 413, 415, 422, 429, 503, 504),
        good={"content": {EVENT_STREAM_TYPE: {"schema": {"type": "string"}}}},
    ),
    dependencies=[Depends(require_json)],
)
async def post_generation(request: Request, body: ImagesRequest, serving: AppStateDep, terms: TermsDep) -> Response:
    """Draw a prompt; the images come as base64 text, by URL, or as an event."""
    job, key = plan_job(body, serving, terms), terms.key
    if body.stream:
        enqueued = await admit(request, serving, job, None, key)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Job-Id": enqueued.job_id}
        events = stream_generation(request, serving, enqueued.job_id, key)
        return StreamingResponse(events, 200, headers, EVENT_STREAM_TYPE)
    ended = await run_job(request, serving, job, None, key)
    if isinstance(ended, Response):
        return ended
    if body.response_format == "url":
        urls = f"{request.base_url}{OPENAI_PATH[1:]}/images/{ended.job.id}/content?index="
        data = [ImageData(url=f"{urls}{index}", seed=file.seed) for index, file in enumerate(ended.results)]
    else:
        data = await asyncio.to_thread(to_data, ended, await read_results(serving, ended))
    answer = ImagesAnswer(created=created_s(ended), data=data, **describe_images(ended))
    return Response(answer.model_dump_json(exclude_none=True), 200, response_headers(ended), JSON_TYPE)


@router.get(
    "/images/{job_id}/content",
    response_class=Response,
    responses=describe_errors(OpenAIError, 404, 409, 422, 503, good={"content": file_content(*IMAGE_TYPES)}),
)
async def get_content(
    request: Request,
    record: RecordDep,
    serving: AppStateDep,
    index: Annotated[int, Query(ge=0, le=9999, description="Which image, from 0.")] = 0,
) -> Response:
    """The file of an image that was answered by URL."""
    return await get_result(request, record, serving, index)


def plan_job(body: ImagesRequest, serving: AppState, terms: CompatOptions) -> Job:
    """The request as a job.

    Raises:
        InvalidFields: a value is not valid or beyond a limit; fields have the names of this front.
        DoesNotFit: no device can hold one image.
    """
    if body.stream and body.response_format == "url":
        raise InvalidFields(("response_format", "is url; events carry b64_json"))
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
        "negative_prompt": body.negative_prompt,
        "steps": body.num_inference_steps,
        "guidance_scale": body.guidance_scale,
        "seed": body.seed,
        "scale": body.scale,
        "method": body.method,
    }
    asked = validate_as(GenerateRequest, values, _NAMES)
    seed = random_seed(terms.key) if asked.seed is None else asked.seed
    try:
        served = select_bundle(serving.bundles, asked.bundle)
        bundle = served.bundle
        places = serving.places(bundle.name)
        params = plan_generate(asked, bundle, serving.settings, seed, asked.output_format or "png", places)
    except InvalidFields as error:
        raise InvalidFields(*tuple((_NAMES.get(name, name), reason) for name, reason in error.fields)) from error
    return new_job(served, params, terms.cancel_after_s, warnings=warn_of_words(served, params))


async def stream_generation(
    request: Request, serving: AppState, job_id: str, key: str | None, heartbeat_s: float = HEARTBEAT_S
) -> AsyncGenerator[str]:
    """One event `image_generation.completed` for each image, or one `error`; comments while there is nothing to say.

    No partial image is sent: a latent between two steps is not decoded, and anything else would be made up.

    **Effects** as `run_job`, also when the client stops reading.
    """
    ending = asyncio.ensure_future(finish_job(request, serving, job_id, key))
    try:
        while not ending.done():
            await asyncio.wait({ending}, timeout=heartbeat_s)
            if not ending.done():
                yield ": waiting\n\n"
        for name, data in await _to_events(request, serving, ending):
            yield f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"
    finally:
        # The server cancels this generator when the client goes away; the job must still hear of it.
        with anyio.CancelScope(shield=True), suppress(asyncio.CancelledError, ClientDisconnect, GiantleapError):
            if not ending.done():
                ending.cancel()
                await abandon_job(serving, job_id, key)
            await ending


async def _to_events(
    request: Request, serving: AppState, ending: "asyncio.Future[JobRecord | Response]"
) -> list[tuple[str, dict[str, Any]]]:
    try:
        ended = ending.result()
        if not isinstance(ended, Response):
            images = await asyncio.to_thread(to_data, ended, await read_results(serving, ended))
            name, shared = "image_generation.completed", describe_images(ended)
            shared |= {"type": name, "created_at": created_s(ended), "background": "opaque", "quality": "auto"}
            return [(name, shared | image.model_dump(exclude_none=True)) for image in images]
    except ClientDisconnect:
        return []
    except GiantleapError as error:  # too late for a status
        ended = problem_response(error, request)
    return [("error", json.loads(bytes(ended.body)))]


def to_data(record: JobRecord, files: list[bytes]) -> list[ImageData]:
    """Each image as base64 text."""
    pairs = zip(files, record.results, strict=True)
    return [ImageData(b64_json=base64.b64encode(file).decode(), seed=result.seed) for file, result in pairs]


def describe_images(record: JobRecord) -> dict[str, Any]:
    """Size and format of the images of a job."""
    params = record.job.params
    assert isinstance(params, GenerateParams), "this front makes no other job"
    return {"size": f"{params.width_px}x{params.height_px}", "output_format": params.output_format}


def created_s(record: JobRecord) -> int:
    """When the images were made: Unix time, whole seconds."""
    return int(record.job.created_at_s if record.finished_at_s is None else record.finished_at_s)
