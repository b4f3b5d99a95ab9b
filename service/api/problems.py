"""Turns every error of a request into one RFC 9457 problem document, whatever raised it.

`handle_errors` is installed by `giantleap.service.api.app`; the error tree is `giantleap.service.errors`. No document
holds the value that was refused, a stack trace or the text of an unexpected error.
"""

import json
import logging
import math
import traceback
from collections.abc import Mapping
from http import HTTPMethod, HTTPStatus
from typing import Any

import redis.exceptions
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from giantleap.service.api.compat.errors import front_error
from giantleap.service.errors import (
    Conflict,
    DeadlinePassed,
    DoesNotFit,
    EngineFault,
    GiantleapError,
    InvalidFields,
    InvalidRequest,
    JobFailed,
    MalformedRequest,
    NotAcceptable,
    NotFound,
    NotReady,
    PayloadTooLarge,
    QueueFull,
    StorageFull,
    UnsupportedMediaType,
    field_errors,
)
from giantleap.service.jobs.job import JobError

log = logging.getLogger(__name__)

PROBLEM_TYPE = "application/problem+json"
CLIENT_GONE = 499
_RETRY_LATER_S = 5
_BY_CODE: dict[str, type[GiantleapError]] = {
    kind.code: kind
    for kind in (
        MalformedRequest,
        NotFound,
        NotAcceptable,
        Conflict,
        PayloadTooLarge,
        UnsupportedMediaType,
        InvalidRequest,
        DoesNotFit,
        QueueFull,
        StorageFull,
        NotReady,
        DeadlinePassed,
        JobFailed,
        EngineFault,
    )
}
# What Redis itself refuses for now; that it cannot be reached is a NotReady of `giantleap.service.jobqueue.producer`.
_REDIS_REFUSES = (redis.exceptions.OutOfMemoryError, redis.exceptions.ReadOnlyError)


def problem_body(error: GiantleapError, request_id: str, **members: Any) -> dict[str, Any]:
    """The problem document of an error; `members` are extensions, left out where None."""
    if isinstance(error, InvalidFields):
        members["errors"] = [{"field": name, "reason": reason} for name, reason in error.fields]
    if isinstance(error, DoesNotFit):
        size = error.largest_px
        largest = None if size is None else {"width": size[0], "height": size[1]}
        members |= {"needed_bytes": error.needed_bytes, "device_bytes": error.device_bytes, "largest": largest}
    return {
        "type": f"urn:giantleap:problem:{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        "instance": request_id,
        "retryable": error.retryable,
    } | {name: value for name, value in members.items() if value is not None}


def problem_response(
    error: GiantleapError, request: Request, headers: Mapping[str, str] | None = None, **members: Any
) -> Response:
    """The answer to a request that met `error`. 429 and 503 always say when to come back.

    Effects: names the error's code in `request.state`, where the metrics of the request are taken from.
    """
    request.state.problem_code = error.code
    sent = dict(headers or {})
    if error.status in (429, 503):
        sent["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or _RETRY_LATER_S)))
    body = problem_body(error, request.state.request_id, **members)
    front = front_error(request.scope["path"].removeprefix(request.scope.get("root_path", "")), body)
    if front is not None:
        return Response(json.dumps(front), error.status, sent, "application/json")
    return Response(json.dumps(body), error.status, sent, PROBLEM_TYPE)


def from_job_error(error: JobError) -> GiantleapError:
    """The error of a job that failed, as it was before it was stored; an unknown code stays under `job_failed`."""
    if error.code in _BY_CODE:
        return _BY_CODE[error.code](error.detail)
    return JobFailed(f"{error.code}: {error.detail}")


def handle_errors(app: FastAPI) -> None:
    """Install the handlers on an app."""
    app.add_exception_handler(GiantleapError, _own)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    for kind in _REDIS_REFUSES:
        app.add_exception_handler(kind, _redis_refuses)


def unexpected(error: Exception, request: Request) -> Response:
    """The answer to a fault of ours: 500 that says nothing of the inside.

    Effects: logs the error's type and where it was raised, not its text, which may quote the request.
    """
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    log.error(
        "request %s met an unexpected %s", request.state.request_id, type(error).__name__, extra={"frames": frames}
    )
    return problem_response(GiantleapError("an unexpected error; the log has it under this instance"), request)


async def _own(request: Request, error: Exception) -> Response:
    assert isinstance(error, GiantleapError)
    return problem_response(error, request)


async def _validation(request: Request, error: Exception) -> Response:
    """pydantic's list of field errors, without the values that it holds."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(item["type"] == "json_invalid" for item in found):
        at = next(item["loc"][-1] for item in found if item["type"] == "json_invalid")
        return problem_response(MalformedRequest(f"the body is not valid JSON, from character {at} on"), request)
    return problem_response(InvalidFields(*field_errors(found)), request)


def _field(location: tuple[int | str, ...]) -> str:
    """Name of a field: `steps`, not `body.steps`; cut, since an unknown field's name is the client's text."""
    named = [str(part) for part in location if part not in ("body", "query", "header", "path")]
    return ".".join(named)[:64] or "body"


async def _http(request: Request, error: Exception) -> Response:
    """Errors of the framework: no such route, method not allowed, a body that could not be read."""
    assert isinstance(error, HTTPException)
    # FastAPI hides what stopped the reading of a body, such as our own limit, behind a 400.
    if isinstance(error.__cause__, GiantleapError):
        return problem_response(error.__cause__, request)
    if isinstance(error.__cause__, ClientDisconnect):
        return Response(status_code=CLIENT_GONE)
    if error.status_code == HTTPStatus.BAD_REQUEST:
        return problem_response(MalformedRequest("the body could not be read as JSON in UTF-8"), request)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return problem_response(NotFound("nothing is served under this path; /docs lists what is"), request)
    status = HTTPStatus(error.status_code)
    shown = GiantleapError(f"{request.method} is answered with {status.value} {status.phrase} here")
    shown.status, shown.title, shown.code = status.value, status.phrase, status.name.lower()
    headers = {"Allow": ", ".join(_methods(request))} if status is HTTPStatus.METHOD_NOT_ALLOWED else error.headers
    return problem_response(shown, request, headers)


def _methods(request: Request) -> list[str]:
    """What the path can be asked with (RFC 9110, 15.5.6); the framework names the methods of its first route only."""
    asked = ({**request.scope, "method": str(method)} for method in HTTPMethod)
    return sorted(scope["method"] for scope in asked if any(_takes(route, scope) for route in request.app.routes))


def _takes(route: BaseRoute, scope: Scope) -> bool:
    return route.matches(scope)[0] is Match.FULL


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _redis_refuses(request: Request, error: Exception) -> Response:
    log.error("request %s: Redis refuses to write: %s", request.state.request_id, type(error).__name__)
    return problem_response(NotReady("the queue's store takes no writes at the moment; try again"), request)
