"""Routes that make a job: POST /generate and POST /upscale. Read, plan, enqueue, wait, answer.

Nothing is enqueued before everything about the request was checked. The checks are in `giantleap.service.jobs.planning`
and `giantleap.service.jobs.latents`, the queue is `giantleap.service.jobqueue.producer`;
`giantleap.service.api.routes.put` makes the same jobs under ids of clients.
"""

import asyncio
import hashlib
import re
import secrets
import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from giantleap.models.image_formats import ImageFormat
from giantleap.service.api.dependencies import AppState, AppStateDep
from giantleap.service.api.negotiation import Preference, choose_answer, read_cancel_after, read_preference
from giantleap.service.api.openapi import (
    IMAGE_FORMATS,
    IMAGE_TYPES,
    describe_responses,
    file_content,
    upload_request_body,
)
from giantleap.service.api.responses import failed_response, file_response, job_answer, job_problem, job_url
from giantleap.service.api.schemas import JobBody
from giantleap.service.api.submission import admit
from giantleap.service.errors import (
    DeadlinePassed,
    GiantleapError,
    InvalidFields,
    MalformedRequest,
    NotFound,
    NotReady,
    UnsupportedMediaType,
)
from giantleap.service.jobqueue.client import cancel_tasks
from giantleap.service.jobqueue.producer import SMALL_BODY_BYTES
from giantleap.service.jobs.bundles import ServedBundle, select_bundle
from giantleap.service.jobs.images import fit_image, is_image, read_base64
from giantleap.service.jobs.job import (
    FINAL_STATES,
    GenerateParams,
    Job,
    JobParams,
    JobRecord,
    JobState,
    Priority,
    Webhook,
)
from giantleap.service.jobs.media_types import JSON_TYPE, SAFETENSORS_TYPE
from giantleap.service.jobs.planning import plan_generate, prepare_upscale, total_latent_px, warn_of_words
from giantleap.service.jobs.requests import GenerateRequest, UpscaleQuery
from giantleap.service.settings import Settings
from giantleap.service.telemetry.tracing import current_traceparent
from giantleap.service.webhooks.targets import TargetRefused, find_addresses, read_target

router = APIRouter(tags=["create"])

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
# Drawn seeds stay exact in clients whose numbers are doubles.
_DRAWN_SEED_LIMIT = 2**53
_STOP_SEEN_S = 0.5


@dataclass(frozen=True, slots=True)
class SubmitOptions:
    """How a client wants its answer: the headers that all routes share, whether it cancels by leaving, its job id."""

    accept: str | None
    preference: Preference
    idempotency_key: str | None
    cancel_on_disconnect: bool
    cancel_after_s: float | None = None
    job_id: str | None = None


async def read_submit_options(
    serving: AppStateDep,
    accept: Annotated[str | None, Header(description="An image type for the file itself, else JSON.")] = None,
    prefer: Annotated[str | None, Header(description="respond-async, or wait=N seconds.")] = None,
    idempotency_key: Annotated[
        str | None, Header(description="Posting again with the same key finds the first job.")
    ] = None,
    cancel_on_disconnect: Annotated[
        bool, Query(description="Cancel the job when the client goes away while it waits.")
    ] = False,
    cancel_after: Annotated[
        str | None, Header(description="Seconds after which the job fails unless it has ended.")
    ] = None,
) -> SubmitOptions:
    """Read the shared headers.

    Raises:
        MalformedRequest: one of them cannot be read.
        NotReady: this process is stopping.
    """
    if serving.stopping.is_set():
        raise NotReady("this process is stopping; try again", retry_after_s=1)
    if idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise MalformedRequest("Idempotency-Key must be 1 to 255 printable ASCII characters without spaces")
    preference = read_preference(prefer, serving.settings.wait_timeout_s)
    return SubmitOptions(accept, preference, idempotency_key, cancel_on_disconnect, read_cancel_after(cancel_after))


SubmitOptionsDep = Annotated[SubmitOptions, Depends(read_submit_options)]


async def require_json(request: Request) -> None:
    """Raises:
    UnsupportedMediaType: the body is declared as something else than JSON.
    """
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared != JSON_TYPE:
        raise UnsupportedMediaType(f"content type {declared[:80]!r}; send {JSON_TYPE}")


PROBLEMS = (400, 406, 409, 413, 415, 422, 429, 503, 504)
ACCEPTED = {"model": JobBody, "description": "Queued; Location is where to follow it."}


@router.post(
    "/generate",
    response_model=JobBody,
    responses=describe_responses({200: {"content": file_content(*IMAGE_TYPES)}, 202: ACCEPTED}, *PROBLEMS),
    dependencies=[Depends(require_json)],
)
async def post_generate(
    request: Request, body: GenerateRequest, asked: SubmitOptionsDep, serving: AppStateDep
) -> Response:
    """Draw a prompt: generate a small latent, enlarge it, decode it once."""
    served = select_bundle(serving.bundles, body.bundle)
    answer_type, output_format = _choose_format(asked.accept, body.output_format)
    if answer_type != JSON_TYPE and body.num_images != 1:
        raise InvalidFields(("num_images", f"is {body.num_images}; an answer that is a file holds one image"))
    seed = body.seed if body.seed is not None else random_seed(asked.idempotency_key or asked.job_id)
    params = plan_generate(
        body, served.bundle, serving.settings, seed, output_format, serving.places(served.bundle.name)
    )
    start = None
    if body.init_image is not None:
        start = await asyncio.to_thread(_prepare_start, body.init_image, params, serving.settings)
    webhook = None if body.webhook is None else Webhook(body.webhook.url, body.webhook.events)
    await require_webhook(webhook, serving.settings)
    job = _new_job(asked, served, body.priority, params, webhook, warn_of_words(served, params))
    return await _run(request, serving, job, start, asked, answer_type)


def _prepare_start(text: str, params: GenerateParams, settings: Settings) -> bytes:
    """The job's input blob: the image to start from, at the base size."""
    try:
        return fit_image(read_base64(text), settings.max_image_px, *params.base_size_px)
    except GiantleapError as error:
        raise InvalidFields(("init_image", error.detail)) from error


@router.post(
    "/upscale",
    response_model=JobBody,
    responses=describe_responses(
        {200: {"content": file_content(*IMAGE_TYPES, SAFETENSORS_TYPE)}, 202: ACCEPTED}, *PROBLEMS
    ),
    openapi_extra=upload_request_body(),
)
async def post_upscale(
    request: Request, query: Annotated[UpscaleQuery, Query()], asked: SubmitOptionsDep, serving: AppStateDep
) -> Response:
    """Enlarge a latent (safetensors or .npy) or an image; decode it once, or answer the larger latent."""
    served = select_bundle(serving.bundles, query.bundle)
    answer_type, output_format = _choose_format(asked.accept, query.output_format, query.output)
    body, content_type = await _read_upload(request)
    places = serving.places(served.bundle.name)
    given = (query, body, content_type, served.bundle, serving.settings, output_format, places)
    # A large latent is prepared beside the event loop, which it would hold up for about 2 ms per MiB.
    small = len(body) <= SMALL_BODY_BYTES and not is_image(body, content_type)
    params, blob = prepare_upscale(*given) if small else await asyncio.to_thread(prepare_upscale, *given)
    if answer_type != JSON_TYPE and params.batch_items != 1:
        raise InvalidFields(("body", f"holds {params.batch_items} latents; an answer that is a file holds one"))
    webhook = None
    if query.webhook_url is not None:
        names = FINAL_STATES if query.webhook_events is None else query.webhook_events.split(",")
        webhook = Webhook(query.webhook_url, tuple(state for state in FINAL_STATES if state in names))
    await require_webhook(webhook, serving.settings)
    job = _new_job(asked, served, query.priority, params, webhook)
    return await _run(request, serving, job, blob, asked, answer_type)


async def _read_upload(request: Request) -> tuple[bytes, str | None]:
    """The body and its type; of a multipart form, those of its one file, whatever its field is called.

    Raises:
        MalformedRequest: the form is broken, or does not hold exactly one file and nothing else.
    """
    content_type = request.headers.get("content-type")
    if (content_type or "").partition(";")[0].strip().lower() != "multipart/form-data":
        return await request.body(), content_type
    try:
        async with request.form(max_files=1, max_fields=0) as form:
            files = [value for value in form.values() if isinstance(value, UploadFile)]
            if len(files) != 1:
                raise MalformedRequest(f"the form holds {len(files)} files; send one, and options in the query")
            return await files[0].read(), files[0].content_type
    except HTTPException as error:
        raise MalformedRequest("the form cannot be read; send one file, and options in the query") from error


def random_seed(idempotency_key: str | None) -> int:
    """A random seed; under an idempotency key one that a repeat of the request draws again."""
    if idempotency_key is None:
        return secrets.randbelow(_DRAWN_SEED_LIMIT)
    return int.from_bytes(hashlib.sha256(idempotency_key.encode()).digest()[:8]) % _DRAWN_SEED_LIMIT


def _choose_format(
    accept: str | None, output_format: ImageFormat | None, output: str = "image"
) -> tuple[str, ImageFormat]:
    """The type of the answer, and the format of the image file where there is one."""
    if output == "latent":
        if output_format is not None:
            raise InvalidFields(("output_format", "is of images; leave it out with output=latent"))
        return choose_answer(accept, (SAFETENSORS_TYPE,)), "png"
    offers = IMAGE_TYPES if output_format is None else (f"image/{output_format}",)
    answer_type = choose_answer(accept, offers)
    return answer_type, IMAGE_FORMATS.get(answer_type) or output_format or "png"


async def require_webhook(webhook: Webhook | None, settings: Settings) -> None:
    """Resolves the target of a webhook, where one is asked for.

    Raises:
        InvalidFields: webhooks are off, or nothing is sent to such a target.
    """
    if webhook is None:
        return
    if settings.webhook_secret is None:
        raise InvalidFields(("webhook", "cannot be sent: the service has no GIANTLEAP_WEBHOOK_SECRET to sign it"))
    try:
        target = read_target(webhook.url)
        allowed = settings.webhook_hosts
        await find_addresses(target.host, target.port, settings.webhook_allow_private, hosts=allowed)
    except TargetRefused as error:
        raise InvalidFields(("webhook", f"the url {error}")) from error


def _new_job(
    asked: SubmitOptions,
    served: ServedBundle,
    priority: str,
    params: JobParams,
    webhook: Webhook | None,
    warnings: tuple[str, ...] = (),
) -> Job:
    return Job(
        asked.job_id or str(uuid.uuid4()),
        served.bundle.name,
        priority=Priority(priority),
        created_at_s=time.time(),
        params=params,
        warnings=warnings,
        traceparent=current_traceparent(),
        latent_px=total_latent_px(params, served.bundle),
        cancel_after_s=asked.cancel_after_s,
        webhook=webhook,
    )


async def _run(
    request: Request, serving: AppState, job: Job, blob: bytes | None, asked: SubmitOptions, answer_type: str
) -> Response:
    """Enqueue, wait as long as was asked for, and answer with what there is then."""
    enqueued = await admit(request, serving, job, blob, asked.idempotency_key)
    if asked.preference.wait_s == 0:
        position, start_s = enqueued.queue_position, enqueued.estimated_start_s
        queued = JobRecord(job, JobState.QUEUED, queue_position=position, estimated_start_s=start_s)
        record = queued if enqueued.created else await _get(serving, enqueued.job_id)
        return _accepted(request, record, asked)
    timeout_s = serving.settings.wait_timeout_s if asked.preference.wait_s is None else asked.preference.wait_s
    try:
        created = job if enqueued.created and job.cancel_after_s is None else None
        record = await wait_for_job(request, serving, enqueued.job_id, timeout_s, created)
    except ClientDisconnect:
        if asked.cancel_on_disconnect:
            await serving.producer.cancel(enqueued.job_id)
        raise
    if not record.state.final:
        return _unfinished(request, serving, record, asked, timeout_s)
    if record.state is not JobState.SUCCEEDED:
        return failed_response(request, record)
    headers = _applied(asked) | {"Vary": "Accept, Prefer"}
    if answer_type == JSON_TYPE:
        return job_answer(request, record, headers=headers)
    content = await serving.producer.read_result(record.job.id, 0)
    if content is None:
        raise NotFound("the result was dropped to make room before it was read; post the job again")
    return file_response(record, content, 0, headers)


async def _get(serving: AppState, job_id: str) -> JobRecord:
    record = await serving.producer.get(job_id)
    if record is None:
        raise NotFound("the job of this Idempotency-Key has expired; use a new key")
    return record


async def wait_for_job(
    request: Request, serving: AppState, job_id: str, timeout_s: float, created: Job | None = None
) -> JobRecord:
    """The job's record once it is final, the time is up, or this process stops (seen within `_STOP_SEEN_S`).

    Effects: leaves no task behind, however it ends.

    Args:
        created: As for `JobProducer.wait`.

    Raises:
        ClientDisconnect: the client went away; the job goes on.
    """
    waiting = asyncio.create_task(serving.producer.wait(job_id, timeout_s, created))
    # The body has been read: all that can still come from the client is that it goes away.
    leaving = asyncio.create_task(_wait_for_disconnect(request))
    tasks = (waiting, leaving)
    try:
        ended: set[asyncio.Task[Any]] = set()
        while not ended and not serving.stopping.is_set():
            ended, _ = await asyncio.wait(tasks, timeout=_STOP_SEEN_S, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if leaving.done():
            raise ClientDisconnect
        return await _get(serving, job_id)
    finally:
        await cancel_tasks(tasks)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _accepted(request: Request, record: JobRecord, asked: SubmitOptions) -> Response:
    headers = {"Location": job_url(request, record.job.id), "Vary": "Accept, Prefer"} | _applied(asked)
    return job_answer(request, record, 202, headers)


def _applied(asked: SubmitOptions) -> dict[str, str]:
    applied = asked.preference.applied
    return {} if applied is None else {"Preference-Applied": applied}


def _unfinished(
    request: Request, serving: AppState, record: JobRecord, asked: SubmitOptions, waited_s: float
) -> Response:
    """The answer when the wait ended before the job did; the job goes on."""
    if serving.stopping.is_set():
        return job_problem(request, record, NotReady("this process is stopping; the job goes on", retry_after_s=1))
    if asked.preference.wait_s is not None:
        return _accepted(request, record, asked)
    return job_problem(
        request, record, DeadlinePassed(f"the job did not finish within {waited_s:.0f} s; it goes on at status_url")
    )
