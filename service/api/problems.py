"""Turns every error of a request into a response: an RFC 9457 problem document, or the form of a compatible protocol.

`handle_errors` is installed by `giantleap.service.api.app`; the error tree is `giantleap.service.errors`. No response
holds the value that was refused, a stack trace or the text of an unexpected error.
"""

import json
import logging
import math
import traceback
from collections.abc import Mapping
from http import HTTPMethod, HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from giantleap.service import errors
from giantleap.service.api.paths import KSERVE_PATH, OPENAI_PATH, REMOTE_VAE_PATH, route_path
from giantleap.service.errors import GiantleapError, InvalidFields
from giantleap.service.jobs.job import JobError
from giantleap.service.jobs.media_types import JSON_TYPE

log = logging.getLogger(__name__)

PROBLEM_TYPE = "application/problem+json"
CLIENT_GONE = 499
_RETRY_LATER_S = 5
_JOB_ERRORS: dict[str, type[GiantleapError]] = {
    kind.code: kind
    for kind in (
        *(errors.MalformedRequest, errors.NotFound, errors.NotAcceptable, errors.Conflict, errors.PayloadTooLarge),
        *(errors.UnsupportedMediaType, errors.InvalidRequest, errors.DoesNotFit, errors.QueueFull),
        *(errors.StorageFull, errors.NotReady, errors.DeadlinePassed, errors.JobFailed, errors.EngineFault),
        *(errors.BlockedByFilter, errors.FilterFault),
        *(errors.BundleNotLoaded, errors.StoreUnavailable),
    )
}


def problem_body(error: GiantleapError, request_id: str, **members: Any) -> dict[str, Any]:
    """The problem document of an error; `members` are extensions, left out where None."""
    if isinstance(error, InvalidFields):
        members["errors"] = [{"field": name, "reason": reason} for name, reason in error.fields]
    if isinstance(error, errors.DoesNotFit):
        size = error.largest_px
        largest = None if size is None else {"width": size[0], "height": size[1]}
        members |= {"needed_bytes": error.needed_bytes, "device_bytes": error.device_bytes, "largest": largest}
    if isinstance(error, errors.WorkLimited):
        members |= {"needed_megapixel_steps": error.needed, "megapixel_steps_per_minute": error.per_minute}
    return {
        "type": f"urn:giantleap:problem:{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        "instance": request_id,
        "retryable": error.retryable,
    } | {name: value for name, value in members.items() if value is not None}


def compat_error(path: str, problem: Mapping[str, Any]) -> dict[str, Any] | None:
    """An error in the form of the compatible protocol of a path; None on other paths.

    Args:
        path: Path of the request, without a root path.
        problem: Result of `problem_body`.
    """
    prefix = "/" + path[1:].partition("/")[0]
    if prefix == OPENAI_PATH:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        fault = "server_error" if problem["status"] >= 500 else "invalid_request_error"
        fields = problem.get("errors") or [{"field": None}]
        error = {"message": problem["detail"], "type": kinds.get(problem["status"], fault)}
        return {"error": error | {"param": fields[0]["field"], "code": problem["code"]}}
    if prefix == KSERVE_PATH:
        return {"error": problem["detail"]}
    if prefix == REMOTE_VAE_PATH:
        return {"error": problem["detail"], "code": problem["code"]}
    return None


def problem_response(
    error: GiantleapError, request: Request, headers: Mapping[str, str] | None = None, **members: Any
) -> Response:
    """The response to a request that met `error`; 429 and 503 always carry Retry-After.

    Sets `request.state.problem_code`, which the metrics of the request count.
    """
    request.state.problem_code = error.reason or error.code
    all_headers = dict(headers or {})
    if error.status in (429, 503):
        all_headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or _RETRY_LATER_S)))
    body = problem_body(error, request.state.request_id, **members)
    compatible = compat_error(route_path(request.scope), body)
    if compatible is not None:
        return Response(json.dumps(compatible), error.status, all_headers, JSON_TYPE)
    return Response(json.dumps(body), error.status, all_headers, PROBLEM_TYPE)


def from_job_error(error: JobError) -> GiantleapError:
    """The error of a failed job, as it was before it was stored; an unknown code becomes `job_failed`."""
    if error.code in _JOB_ERRORS:
        return _JOB_ERRORS[error.code](error.detail)
    return errors.JobFailed(f"{error.code}: {error.detail}")


def handle_errors(app: FastAPI) -> None:
    """Install the handlers on an app."""
    app.add_exception_handler(GiantleapError, _handle_own)
    app.add_exception_handler(RequestValidationError, _handle_validation)
    app.add_exception_handler(HTTPException, _handle_http)
    app.add_exception_handler(ClientDisconnect, _handle_disconnect)


def unexpected(error: Exception, request: Request) -> Response:
    """The 500 response to a fault of the service.

    Logs the type of the error and where it was raised, but not its text, which may quote the request.
    """
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    log.error(
        "request %s met an unexpected %s", request.state.request_id, type(error).__name__, extra={"frames": frames}
    )
    return problem_response(GiantleapError("an unexpected error; the log has it under this instance"), request)


async def _handle_own(request: Request, error: Exception) -> Response:
    assert isinstance(error, GiantleapError)
    return problem_response(error, request)


async def _handle_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem_response(errors.validation_problem(error.errors()), request)


async def _handle_http(request: Request, error: Exception) -> Response:
    """Errors of the framework: an unknown path, a method that is not allowed, a body that could not be read."""
    assert isinstance(error, HTTPException)
    # FastAPI wraps what interrupted the reading of a body, such as our own limit, in a 400.
    if isinstance(error.__cause__, GiantleapError):
        return problem_response(error.__cause__, request)
    if isinstance(error.__cause__, ClientDisconnect):
        return Response(status_code=CLIENT_GONE)
    if error.status_code == HTTPStatus.BAD_REQUEST:
        return problem_response(errors.MalformedRequest("the body is not JSON in UTF-8"), request)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return problem_response(errors.NotFound("unknown path; /docs lists those that exist"), request)
    status = HTTPStatus(error.status_code)
    problem = GiantleapError(f"{request.method} is not answered here: {status.value} {status.phrase}")
    problem.status, problem.title, problem.code = status.value, status.phrase, status.name.lower()
    headers = {"Allow": ", ".join(_methods(request))} if status is HTTPStatus.METHOD_NOT_ALLOWED else error.headers
    return problem_response(problem, request, headers)


def _methods(request: Request) -> list[str]:
    """The methods of a path (RFC 9110, 15.5.6); the framework names those of its first route only."""
    scopes = [{**request.scope, "method": str(method)} for method in HTTPMethod]
    routes = request.app.routes
    methods = {scope["method"] for scope in scopes if any(r.matches(scope)[0] is Match.FULL for r in routes)}
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


async def _handle_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)
