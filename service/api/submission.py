"""The one way in which a request becomes a job: read its options, make the job, enqueue it, wait for it, cancel it.

Every route that makes a job, native or compatible, calls `submit_job` or `run_job`. Nothing is enqueued before the
whole request was checked by `giantleap.service.jobs.planning`.
"""

import asyncio
import hashlib
import re
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ParamSpec, TypeVar

from fastapi import Depends, Header, Request
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect

from giantleap.service.api.dependencies import AppState, get_caller, state_of
from giantleap.service.api.negotiation import Preference, read_cancel_after, read_preference
from giantleap.service.api.responses import JobProblem, job_failure
from giantleap.service.auth import Scope, require_scope
from giantleap.service.errors import (
    InvalidFields,
    MalformedRequest,
    NotFound,
    NotReady,
    UnsupportedMediaType,
    WaitTimeout,
)
from giantleap.service.jobqueue.admission.gate import Permit
from giantleap.service.jobqueue.arguments import SMALL_BODY_BYTES
from giantleap.service.jobqueue.client import cancel_tasks
from giantleap.service.jobqueue.producer import Enqueued
from giantleap.service.jobs.bundles import ServedBundle
from giantleap.service.jobs.grid import Charge, count_pixel_steps
from giantleap.service.jobs.job import Job, JobParams, JobRecord, JobState, Priority, Webhook
from giantleap.service.jobs.media_types import JSON_TYPE, read_media_type
from giantleap.service.jobs.planning import total_latent_px
from giantleap.service.settings import Settings
from giantleap.service.telemetry.tracing import current_traceparent
from giantleap.service.webhooks.targets import TargetRefused, find_addresses, read_target

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_RANDOM_SEEDS = 2**53  # random seeds stay exact in clients whose numbers are doubles
_STOP_CHECK_S = 0.5
_FLAG = TypeAdapter(bool)
_SCOPES = {"generate": Scope.GENERATE, "upscale": Scope.UPSCALE}

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitOptions:
    """How a client wants its job to be run and answered, as far as the body does not say.

    Attributes:
        idempotency_key: Key under which a repeat of the request finds the first job.
        cancel_after_s: The job fails unless it has ended so long after it was accepted.
        accept: The Accept header.
        preference: How long the client waits.
        cancel_on_disconnect: Cancel the job when the client disconnects while it waits.
        cancel_on_timeout: Cancel the job when the wait ends before the job does.
        job_id: Id that the client chose for the job.
    """

    idempotency_key: str | None = None
    cancel_after_s: float | None = None
    accept: str | None = None
    preference: Preference = field(default_factory=Preference)
    cancel_on_disconnect: bool = False
    cancel_on_timeout: bool = False
    job_id: str | None = None

    def choose_seed(self, requested: int | None) -> int:
        """The requested seed, else a random one, which is the same for a repeat under the same key or id."""
        if requested is not None:
            return requested
        key = self.idempotency_key or self.job_id
        if key is None:
            return secrets.randbelow(_RANDOM_SEEDS)
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % _RANDOM_SEEDS


async def read_compat_options(
    request: Request,
    idempotency_key: Annotated[
        str | None, Header(description="Posting again with the same key finds the first job.")
    ] = None,
    cancel_after: Annotated[
        str | None, Header(description="Seconds after which the job fails unless it has ended.")
    ] = None,
) -> SubmitOptions:
    """The options of a compatible route. Without a key its client cannot find the job again: then it is canceled.

    Raises:
        MalformedRequest: A header cannot be read.
        NotReady: This process is stopping.
    """
    options = _to_options(state_of(request), idempotency_key, cancel_after)
    unfindable = idempotency_key is None
    return replace(options, cancel_on_disconnect=unfindable, cancel_on_timeout=unfindable)


CompatOptionsDep = Annotated[SubmitOptions, Depends(read_compat_options)]


def read_submit_options(request: Request) -> SubmitOptions:
    """The options of a native route, whose client can find its job again by its id.

    `giantleap.service.api.openapi.SUBMIT_PARAMETERS` describes them. FastAPI spends much time on parameters of its own,
    which compatible routes have.

    Raises:
        MalformedRequest: A header cannot be read.
        InvalidFields: `cancel_on_disconnect` is neither true nor false.
        NotReady: This process is stopping.
    """
    state, headers = state_of(request), request.headers
    try:
        cancel_on_disconnect = _FLAG.validate_python(request.query_params.get("cancel_on_disconnect", False))
    except ValidationError as error:
        raise InvalidFields(("cancel_on_disconnect", "must be true or false")) from error
    return replace(
        _to_options(state, headers.get("idempotency-key"), headers.get("cancel-after")),
        accept=headers.get("accept"),
        preference=read_preference(headers.get("prefer"), state.settings.wait_timeout_s),
        cancel_on_disconnect=cancel_on_disconnect,
    )


def _to_options(state: AppState, idempotency_key: str | None, cancel_after: str | None) -> SubmitOptions:
    if state.stopping.is_set():
        raise NotReady("this process is stopping; try again", retry_after_s=1)
    if idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise MalformedRequest("Idempotency-Key must be 1 to 255 printable ASCII characters without spaces")
    return SubmitOptions(idempotency_key=idempotency_key, cancel_after_s=read_cancel_after(cancel_after))


def require_media_type(request: Request, *allowed: str) -> None:
    """Check the declared type of a body.

    Raises:
        UnsupportedMediaType: It is not one of `allowed`.
    """
    declared = read_media_type(request.headers.get("content-type"))
    if declared not in allowed:
        expected = " or ".join(name for name in allowed if name)
        raise UnsupportedMediaType(f"the content type is {declared[:80]!r}; send {expected}")


async def require_json(request: Request) -> None:
    """Dependency of routes with a JSON body.

    Raises:
        UnsupportedMediaType: The body is declared as something else.
    """
    require_media_type(request, JSON_TYPE)


async def run_in_thread_if_large(
    size_bytes: int, plan: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Call `plan`; for a body over 1 MiB in a thread, since it would block the event loop for about 2 ms per MiB."""
    if size_bytes <= SMALL_BODY_BYTES:
        return plan(*args, **kwargs)
    return await asyncio.to_thread(plan, *args, **kwargs)


async def check_webhook(webhook: Webhook, settings: Settings) -> None:
    """Check that a webhook can be sent, which resolves its host.

    Raises:
        InvalidFields: Webhooks are off, or the target is not allowed.
    """
    if settings.webhook_secret is None:
        raise InvalidFields(("webhook", "cannot be sent: the service has no GIANTLEAP_WEBHOOK_SECRET to sign it"))
    try:
        target = read_target(webhook.url)
        await find_addresses(target.host, target.port, settings.webhook_allow_private, hosts=settings.webhook_hosts)
    except TargetRefused as error:
        raise InvalidFields(("webhook", f"the url {error}")) from error


def new_job(
    served: ServedBundle,
    params: JobParams,
    options: SubmitOptions,
    *,
    priority: str = Priority.HIGH,
    webhook: Webhook | None = None,
    warnings: Sequence[str] = (),
) -> Job:
    """A job that is created now."""
    return Job(
        options.job_id or str(uuid.uuid4()),
        served.bundle.name,
        priority=Priority(priority),
        created_at_s=time.time(),
        params=params,
        warnings=tuple(warnings),
        traceparent=current_traceparent(),
        latent_px=total_latent_px(params, served.bundle),
        cancel_after_s=options.cancel_after_s,
        webhook=webhook,
    )


async def submit_job(
    request: Request, state: AppState, job: Job, blob: bytes | None, options: SubmitOptions
) -> Enqueued:
    """Enqueue a job in the name of the request's caller.

    Raises:
        Forbidden: The caller's key lacks the scope for this kind of job.
        GiantleapError: As `giantleap.service.jobqueue.producer.JobProducer.enqueue`.
    """
    caller = await get_caller(request)
    require_scope(caller, _SCOPES[job.params.kind])
    owned = replace(job, owner=caller.name)
    pixel_steps = count_pixel_steps(job.params, state.bundles[job.bundle].bundle)
    budget = caller.megapixel_steps_per_minute
    charge = None if budget is None else Charge(pixel_steps, budget)
    permit: Permit | None = getattr(request.state, "permit", None)
    try:
        enqueued = await state.producer.enqueue(owned, blob, options.idempotency_key, caller.max_jobs, charge)
    finally:
        if permit is not None:
            permit.release()
    if enqueued.created:
        state.metrics.count_work(job.params.kind, job.bundle, pixel_steps)
    return enqueued


async def run_job(request: Request, state: AppState, job: Job, blob: bytes | None, options: SubmitOptions) -> JobRecord:
    """Enqueue a job and wait until it has succeeded.

    Raises:
        JobProblem: The job failed, was canceled or did not end in time, or this process stops.
        GiantleapError: As `submit_job`.
        ClientDisconnect: The client disconnected.
    """
    enqueued = await submit_job(request, state, job, blob, options)
    record = await wait_for_job(request, state, enqueued.job_id, options, created=job if enqueued.created else None)
    return require_success(state, record, options)


async def wait_for_job(
    request: Request, state: AppState, job_id: str, options: SubmitOptions, *, created: Job | None = None
) -> JobRecord:
    """Wait until a job has ended, the client's time is up, or this process stops.

    Cancels the job where the options say so, and leaves no task behind, however it ends.

    Args:
        request: Request whose client waits.
        state: State of the process.
        job_id: Id of the job.
        options: How long to wait, and when to cancel.
        created: The job, where it has just been enqueued; spares a read of its record.

    Raises:
        ClientDisconnect: The client disconnected.
    """
    if created is not None and created.cancel_after_s is not None:
        created = None  # only the record tells whether its deadline has passed
    waiting = asyncio.create_task(state.producer.wait(job_id, _wait_s(state, options), created))
    # The body has been read: the only message that can still come from the client is its disconnect.
    leaving = asyncio.create_task(_wait_for_disconnect(request))
    try:
        ended: set[asyncio.Task[Any]] = set()
        while not ended and not state.stopping.is_set():
            ended, _ = await asyncio.wait(
                (waiting, leaving), timeout=_STOP_CHECK_S, return_when=asyncio.FIRST_COMPLETED
            )
        if waiting.done():
            record = waiting.result()
        elif leaving.done():
            if options.cancel_on_disconnect:
                await state.producer.cancel(job_id)
            raise ClientDisconnect
        else:
            record = await get_job(state, job_id)
    finally:
        await cancel_tasks((waiting, leaving))
    if options.cancel_on_timeout and not record.state.final:
        await state.producer.cancel(job_id)
    return record


def require_success(state: AppState, record: JobRecord, options: SubmitOptions) -> JobRecord:
    """The record of a job that has succeeded.

    Raises:
        JobProblem: It has not.
    """
    if record.state is JobState.SUCCEEDED:
        return record
    if record.state.final:
        raise job_failure(record)
    outcome = "was canceled" if options.cancel_on_timeout else "continues; follow it at its status_url"
    if state.stopping.is_set():
        raise JobProblem(record, NotReady(f"this process is stopping; the job {outcome}", retry_after_s=1))
    waited_s = _wait_s(state, options)
    raise JobProblem(record, WaitTimeout(f"the job did not finish within {waited_s:.0f} s and {outcome}"))


async def get_job(state: AppState, job_id: str) -> JobRecord:
    """The record of a job that was enqueued under this id, or under an Idempotency-Key.

    Raises:
        NotFound: The record has expired.
    """
    record = await state.producer.get(job_id)
    if record is None:
        raise NotFound("the job of this Idempotency-Key has expired; use a new key")
    return record


def _wait_s(state: AppState, options: SubmitOptions) -> float:
    wait_s = options.preference.wait_s
    return state.settings.wait_timeout_s if wait_s is None else wait_s


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
