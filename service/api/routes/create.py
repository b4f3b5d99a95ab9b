"""Routes that make a job: POST /generate, POST /upscale, and PUT /jobs/{job_id} for both under an id of the client.

Read, plan, enqueue, wait, respond: the checks are in `giantleap.service.jobs.planning`, the queue and the wait in
`giantleap.service.api.submission`.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from giantleap.models.pixels.image_formats import CONTENT_TYPES, ImageFormat
from giantleap.service.api.dependencies import JOB_ID, AppState, JobId, links_of, state_of
from giantleap.service.api.negotiation import choose_media_type
from giantleap.service.api.openapi import (
    GENERATE_CONTENT,
    IMAGE_TYPES,
    SUBMIT_PARAMETERS,
    UPSCALE_PARAMETERS,
    describe_responses,
    file_content,
    upload_request_body,
)
from giantleap.service.api.responses import file_response, job_response
from giantleap.service.api.schemas import JobBody
from giantleap.service.api.submission import (
    SubmitOptions,
    check_webhook,
    get_job,
    new_job,
    read_submit_options,
    require_media_type,
    require_success,
    run_in_thread_if_large,
    submit_job,
    wait_for_job,
)
from giantleap.service.api.uploads import read_upload
from giantleap.service.errors import InvalidFields, MalformedRequest, validation_problem
from giantleap.service.jobs.edits.inputs import to_input
from giantleap.service.jobs.images import is_image
from giantleap.service.jobs.job import Job, JobRecord, JobState
from giantleap.service.jobs.media_types import JSON_TYPE, SAFETENSORS_TYPE, read_media_type
from giantleap.service.jobs.planning import warn_of_words
from giantleap.service.jobs.requests import GenerateRequest, UpscaleQuery

router = APIRouter(tags=["create"])

_PROBLEMS = (400, 406, 409, 413, 415, 422, 429, 503, 504)
_ACCEPTED = {"model": JobBody, "description": "Queued; follow the job at Location."}
_VARY = {"Vary": "Accept, Prefer"}


def _responses(*file_types: str) -> dict[int | str, dict[str, Any]]:
    return describe_responses({200: {"content": file_content(*file_types)}, 202: _ACCEPTED}, *_PROBLEMS)


@router.post(
    "/generate",
    response_model=JobBody,
    responses=_responses(*IMAGE_TYPES),
    openapi_extra={"parameters": SUBMIT_PARAMETERS, "requestBody": {"required": True, "content": GENERATE_CONTENT}},
)
async def post_generate(request: Request) -> Response:
    """Generate an image from a prompt: generate a latent, upscale it, decode it once."""
    return await _generate(request, read_submit_options(request))


async def _generate(request: Request, options: SubmitOptions) -> Response:
    require_media_type(request, JSON_TYPE)
    try:
        body = GenerateRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise validation_problem(error.errors(include_url=False, include_input=False)) from error
    state = state_of(request)
    served = state.select_bundle(body.bundle)
    response_type, output_format = _choose_format(options.accept, body.output_format)
    if response_type != JSON_TYPE and body.num_images != 1:
        raise InvalidFields(("num_images", f"is {body.num_images}, but a file holds one image; accept JSON instead"))
    params = state.plan_generate(body, served, options.choose_seed(body.seed), output_format)
    blob = None
    if params.from_image:
        blob = await asyncio.to_thread(to_input, body, params, state.settings.max_image_px)
    webhook = None if body.webhook is None else body.webhook.to_webhook()
    if webhook is not None:
        await check_webhook(webhook, state.settings)
    warnings = warn_of_words(served, params)
    job = new_job(served, params, options, priority=body.priority, webhook=webhook, warnings=warnings)
    return await _respond(request, state, job, blob, options, response_type)


@router.post(
    "/upscale",
    response_model=JobBody,
    responses=_responses(*IMAGE_TYPES, SAFETENSORS_TYPE),
    openapi_extra={"parameters": UPSCALE_PARAMETERS + SUBMIT_PARAMETERS} | upload_request_body(),
)
async def post_upscale(request: Request) -> Response:
    """Upscale a latent (safetensors or .npy) or an image; return the decoded image or the larger latent."""
    return await _upscale(request, read_submit_options(request))


async def _upscale(request: Request, options: SubmitOptions) -> Response:
    state = state_of(request)
    values = _upscale_values(request)
    query = _to_query(values)  # refused before the body is read
    body, content_type, fields = await read_upload(request, len(UpscaleQuery.model_fields))
    if fields:
        query = _with_fields(values, fields)
    served = state.select_bundle(query.bundle)
    response_type, output_format = _choose_format(options.accept, query.output_format, query.output)
    plan = partial(state.prepare_upscale, query, body, content_type, served, output_format)
    seed = options.choose_seed(query.seed)
    if is_image(body, content_type):  # a small file may hold many pixels
        params, blob = await asyncio.to_thread(plan, seed)
    else:
        params, blob = await run_in_thread_if_large(len(body), plan, seed)
    if response_type != JSON_TYPE and params.batch_items != 1:
        raise InvalidFields(("body", f"holds {params.batch_items} latents, but a file holds one; accept JSON instead"))
    webhook = query.to_webhook()
    if webhook is not None:
        await check_webhook(webhook, state.settings)
    warnings = warn_of_words(served, params)
    job = new_job(served, params, options, priority=query.priority, webhook=webhook, warnings=warnings)
    return await _respond(request, state, job, blob, options, response_type)


def _put_extra() -> dict[str, object]:
    described = upload_request_body()
    described["requestBody"]["content"] |= GENERATE_CONTENT
    return {"parameters": UPSCALE_PARAMETERS + SUBMIT_PARAMETERS} | described


@router.put(
    "/jobs/{job_id}",
    response_model=JobBody,
    responses=_responses(*IMAGE_TYPES, SAFETENSORS_TYPE),
    openapi_extra=_put_extra(),
)
async def put_job(request: Request, job_id: JobId) -> Response:
    """Create a job under a UUID of your own: JSON as in /generate, a latent or an image as in /upscale."""
    if not JOB_ID.fullmatch(job_id):
        raise InvalidFields(("job_id", "is not a UUID in lower case, such as uuidgen makes"))
    options = replace(read_submit_options(request), job_id=job_id)
    if options.idempotency_key is not None:
        raise MalformedRequest("Idempotency-Key is not taken with PUT; the id in the path has the same effect")
    if read_media_type(request.headers.get("content-type")) != JSON_TYPE:
        return await _upscale(request, options)
    if names := sorted(_upscale_values(request)):
        raise InvalidFields(*((name, "is in the query; with a JSON body it belongs in the body") for name in names))
    return await _generate(request, options)


def _upscale_values(request: Request) -> dict[str, str]:
    """The options of /upscale in the query."""
    return {name: value for name, value in request.query_params.items() if name in UpscaleQuery.model_fields}


def _to_query(values: Mapping[str, str]) -> UpscaleQuery:
    """The options of /upscale from their texts.

    Raises:
        InvalidFields: A value is not valid.
    """
    try:
        return UpscaleQuery.model_validate(values)
    except ValidationError as error:
        raise validation_problem(error.errors(include_url=False, include_input=False)) from error


def _with_fields(values: Mapping[str, str], fields: Mapping[str, str]) -> UpscaleQuery:
    """The options of the query and of a form together.

    Raises:
        InvalidFields: A field is unknown, not valid, or in the query too.
    """
    faults = [
        (name[:64], "is in the query too; send it once" if name in values else "is not a known field")
        for name in fields
        if name in values or name not in UpscaleQuery.model_fields
    ]
    if faults:
        raise InvalidFields(*faults)
    return _to_query({**values, **fields})


def _choose_format(
    accept: str | None, output_format: ImageFormat | None, output: str = "image"
) -> tuple[str, ImageFormat]:
    """The media type of the response, and the format of the image file where there is one."""
    if output == "latent":
        if output_format is not None:
            raise InvalidFields(("output_format", "applies to images; leave it out with output=latent"))
        return choose_media_type(accept, (SAFETENSORS_TYPE,)), "png"
    if output_format is not None:
        return choose_media_type(accept, (CONTENT_TYPES[output_format],)), output_format
    response_type = choose_media_type(accept, IMAGE_TYPES)
    return response_type, next((name for name, kind in CONTENT_TYPES.items() if kind == response_type), "png")


async def _respond(
    request: Request, state: AppState, job: Job, blob: bytes | None, options: SubmitOptions, response_type: str
) -> Response:
    """Enqueue a job, wait as long as the client wants, and respond with what there is then."""
    enqueued = await submit_job(request, state, job, blob, options)
    wait_s = options.preference.wait_s
    if wait_s == 0 and enqueued.created:
        position, start_s = enqueued.queue_position, enqueued.estimated_start_s
        accepted = job if enqueued.created_at_s is None else replace(job, created_at_s=enqueued.created_at_s)
        record = JobRecord(accepted, JobState.QUEUED, queue_position=position, estimated_start_s=start_s)
        return _accepted(request, record, options)
    if wait_s == 0:
        return _accepted(request, await get_job(state, enqueued.job_id), options)
    record = await wait_for_job(request, state, enqueued.job_id, options, created=job if enqueued.created else None)
    if wait_s is not None and not record.state.final and not state.stopping.is_set():
        return _accepted(request, record, options)
    require_success(state, record, options)
    headers = _applied(options) | _VARY
    if response_type == JSON_TYPE:
        return job_response(request, record, headers=headers)
    return await file_response(state, record, 0, headers)


def _accepted(request: Request, record: JobRecord, options: SubmitOptions) -> Response:
    headers = {"Location": links_of(request).job(record.job.id)} | _VARY | _applied(options)
    return job_response(request, record, 202, headers)


def _applied(options: SubmitOptions) -> dict[str, str]:
    applied = options.preference.applied
    return {} if applied is None else {"Preference-Applied": applied}
