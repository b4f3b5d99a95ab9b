"""Whose jobs are whose: the one door through which a job enters the queue, and the one check before a job is shown.

Every route that makes a job calls `admit`, every route about one depends on `routes_jobs.get_record`, which asks
`Caller.sees`. A job of another key is 404, exactly as one that never was.
"""

from dataclasses import replace

from fastapi import Request

from giantleap.service.api.dependencies import AppState
from giantleap.service.auth import Caller, Scope, require_scope
from giantleap.service.jobqueue.producer import Enqueued
from giantleap.service.jobs.job import Job

_SCOPES = {"generate": Scope.GENERATE, "upscale": Scope.UPSCALE}


async def caller_of(request: Request) -> Caller:
    """The caller that `giantleap.service.api.middleware.authentication` found for a request. A coroutine: a plain
    function would cost a thread."""
    caller: Caller = request.state.caller
    return caller


async def admit(
    request: Request, serving: AppState, job: Job, blob: bytes | None, idempotency_key: str | None
) -> Enqueued:
    """Puts a job in the queue in the name of the request's caller.

    Raises:
        Forbidden: the caller's key lacks the scope of this kind of job.
        GiantleapError: as `JobProducer.enqueue`.
    """
    caller = await caller_of(request)
    require_scope(caller, _SCOPES[job.params.kind])
    owned = replace(job, owner=caller.name)
    return await serving.producer.enqueue(owned, blob, idempotency_key, caller.max_jobs)
