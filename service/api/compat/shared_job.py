"""What the compatible fronts share: a request of another protocol becomes the same job, waited for in the same way.

A front (`front_openai`, `front_kserve`, `front_remote_vae`) reads its protocol, plans with
`giantleap.service.jobs.planning`, runs the job here and writes the answer in its own form. Its clients know nothing of
jobs: one that got no result cannot come back for it, so its job is canceled, unless an Idempotency-Key lets it find the
job again.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, ParamSpec, TypeVar

import numpy as np
from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from giantleap.service.api.dependencies import AppState, AppStateDep
from giantleap.service.api.openapi import Responses
from giantleap.service.api.responses import failed_response, job_headers, job_problem, warnings_header
from giantleap.service.api.routes.create import read_submit_options, wait_for_job
from giantleap.service.api.submission import admit
from giantleap.service.errors import (
    DeadlinePassed,
    GiantleapError,
    InvalidFields,
    NotFound,
    NotReady,
    field_errors,
)
from giantleap.service.jobqueue.producer import SMALL_BODY_BYTES
from giantleap.service.jobs.bundles import ServedBundle
from giantleap.service.jobs.job import Job, JobParams, JobRecord, JobState, Priority
from giantleap.service.jobs.latents import Floats, read_latent
from giantleap.service.jobs.media_types import SAFETENSORS_TYPE
from giantleap.service.jobs.planning import total_latent_px
from giantleap.service.telemetry.tracing import current_traceparent

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_DIMS = 5

Form = TypeVar("Form", bound=BaseModel)
Answer = TypeVar("Answer")
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True, slots=True)
class CompatOptions:
    """What a client of any front may say of its job in headers: the key to find it by, and its deadline."""

    key: str | None = None
    cancel_after_s: float | None = None


async def read_compat_options(
    serving: AppStateDep,
    idempotency_key: Annotated[
        str | None, Header(description="Posting again with the same key finds the first job.")
    ] = None,
    cancel_after: Annotated[
        str | None, Header(description="Seconds after which the job fails unless it has ended.")
    ] = None,
) -> CompatOptions:
    """Idempotency-Key and Cancel-After, checked as those of /generate.

    Raises:
        MalformedRequest: one of them cannot be read.
        NotReady: this process is stopping.
    """
    asked = await read_submit_options(serving, idempotency_key=idempotency_key, cancel_after=cancel_after)
    return CompatOptions(asked.idempotency_key, asked.cancel_after_s)


TermsDep = Annotated[CompatOptions, Depends(read_compat_options)]


def find_bundle(serving: AppState, name: str) -> ServedBundle:
    """The bundle that a path names.

    Raises:
        NotFound: there is none of that name.
    """
    if name not in serving.bundles:
        raise NotFound(f"no model of that name is served here; there are {', '.join(serving.bundles)}")
    return serving.bundles[name]


def validate_as(form: type[Form], values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> Form:
    """The values as one of our own requests.

    Args:
        names: What the front calls a field, where that differs.

    Raises:
        InvalidFields: some are not valid; the fields are named as the front calls them.
    """
    try:
        return form.model_validate(values)
    except ValidationError as error:
        raise InvalidFields(*to_fields(error, names)) from error


def to_fields(error: ValidationError, names: Mapping[str, str] | None = None) -> tuple[tuple[str, str], ...]:
    """pydantic's errors as field and reason, without the values."""
    return field_errors(error.errors(include_url=False, include_input=False), names)


async def run_in_thread_if_large(
    size_bytes: int,
    plan: Callable[Arguments, Answer],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> Answer:
    """What `plan` makes of a body of this size: a large one in a thread, since other requests would wait for it."""
    if size_bytes <= SMALL_BODY_BYTES:
        return plan(*args, **kwargs)
    return await asyncio.to_thread(plan, *args, **kwargs)


def new_job(
    served: ServedBundle,
    params: JobParams,
    cancel_after_s: float | None,
    priority: Priority = Priority.HIGH,
    warnings: Sequence[str] = (),
) -> Job:
    """A job of now, with an id of its own."""
    return Job(
        str(uuid.uuid4()),
        served.bundle.name,
        priority=priority,
        created_at_s=time.time(),
        params=params,
        warnings=tuple(warnings),
        traceparent=current_traceparent(),
        latent_px=total_latent_px(params, served.bundle),
        cancel_after_s=cancel_after_s,
    )


async def run_job(
    request: Request, serving: AppState, job: Job, blob: bytes | None, key: str | None
) -> JobRecord | Response:
    """Enqueue and wait: the record of a job that succeeded, or the answer that says why it did not.

    Raises:
        GiantleapError: the queue did not take it (`giantleap.service.api.submission.admit`).
        ClientDisconnect: the client went away.

    **Effects** cancels a job whose client gets no result and has no key to find it by.
    """
    enqueued = await admit(request, serving, job, blob, key)
    return await finish_job(request, serving, enqueued.job_id, key, job if enqueued.created else None)


async def finish_job(
    request: Request, serving: AppState, job_id: str, key: str | None, created: Job | None = None
) -> JobRecord | Response:
    """As `run_job`, of a job that was enqueued; `created` as for `JobProducer.wait`."""
    longest_s = serving.settings.wait_timeout_s
    try:
        record = await wait_for_job(request, serving, job_id, longest_s, created)
    except ClientDisconnect:
        await abandon_job(serving, job_id, key)
        raise
    if record.state is JobState.SUCCEEDED:
        return record
    if record.state.final:
        return failed_response(request, record)
    await abandon_job(serving, job_id, key)
    error: GiantleapError = DeadlinePassed(f"the job did not finish within {longest_s:.0f} s")
    if serving.stopping.is_set():
        error = NotReady("this process is stopping; send the request again", retry_after_s=1)
    return job_problem(request, record, error)


async def abandon_job(serving: AppState, job_id: str, key: str | None) -> None:
    """Cancel the job of a client that will get no result, unless its key lets it come back."""
    if key is None:
        await serving.producer.cancel(job_id)


async def read_results(serving: AppState, record: JobRecord) -> list[bytes]:
    """Every file that the job made.

    Raises:
        NotFound: one was dropped to make room.
    """
    read = (serving.producer.read_result(record.job.id, index) for index in range(len(record.results)))
    found = await asyncio.gather(*read)
    contents = [content for content in found if content is not None]
    if len(contents) != len(found):
        raise NotFound("the result was dropped to make room before it was read; send the request again")
    return contents


def stack_latents(results: Sequence[bytes]) -> Floats:
    """The latents of a job, one file each, as one batch.

    Shape: [C, h, w] each -> [B, C, h, w]; of a video of one frame [C, 1, h, w] -> [B, C, 1, h, w].
    """
    return np.stack([read_latent(file, SAFETENSORS_TYPE) for file in results])


def response_headers(record: JobRecord) -> dict[str, str]:
    """The headers of a front's good answer: those of every answer about a job, and the warnings."""
    headers = job_headers(record)
    warnings = warnings_header((*record.job.warnings, *record.warnings))
    return headers if warnings is None else headers | {"X-Warnings": warnings}


def describe_errors(form: type[BaseModel], *statuses: int, good: Mapping[str, Any] | None = None) -> Responses:
    """The OpenAPI description of a front's errors, all of one form, beside its good answer where that needs words."""
    described: Responses = {} if good is None else {200: dict(good)}
    for status in (*statuses, 500):
        described[status] = {"model": form, "description": HTTPStatus(status).phrase}
        if status in (429, 503):
            described[status]["headers"] = {
                "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds after which to try again."}
            }
    return described
