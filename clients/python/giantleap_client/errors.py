"""The errors that a caller sees, by the `code` of the service's problem documents. None holds a key or a prompt."""

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

_INVALID_STATUSES = frozenset({400, 406, 413, 415, 422, 431})
_JOB_CODES = frozenset({"job_failed", "engine_fault", "filter_failed", "blocked_by_filter"})


class GiantleapError(Exception):
    """Base of every error of the client.

    Attributes:
        code: The problem's code, such as `queue_full`; without a problem document `http_<status>`. The client's own
            codes: `timeout`, `unreachable`, `unexpected_response`, `canceled`.
        status: HTTP status of the response; None without one.
        job_id: The job that the error is about.
        request_id: The service's log has the request under this id.
        retry_after_s: How long the service asks to wait.
        fields: (field, reason) of each value that is not valid.
    """

    def __init__(
        self,
        detail: str,
        code: str,
        *,
        status: int | None = None,
        job_id: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
        fields: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.status = status
        self.job_id = job_id
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.fields = fields

    def __str__(self) -> str:
        ids = [f"{name} {value}" for name, value in (("job", self.job_id), ("request", self.request_id)) if value]
        return f"{self.code}: {self.detail}" + (f" ({', '.join(ids)})" if ids else "")


class InvalidRequest(GiantleapError):
    """The service refuses the request as it is: change it."""


class RateLimited(GiantleapError):
    """The queue or the key is at a limit: send the request later."""


class JobFailed(GiantleapError):
    """The job ended without a result: it failed, or it was canceled."""


class Timeout(GiantleapError):
    """The caller's time is up. A job with a deadline ends by it; another goes on."""


def to_error(status: int, headers: Mapping[str, str], body: bytes, job_id: str | None = None) -> GiantleapError:
    """The error of a response.

    Args:
        status: HTTP status.
        headers: With names in lower case.
        body: A problem document, or what a proxy sends instead.
        job_id: The job that the request was about.
    """
    retry_after_s = read_retry_after(headers.get("retry-after"), datetime.now(UTC))
    problem = _read_problem(body)
    if problem is None:
        detail = f"the response has status {status} and is not from the service; check the URL and the proxies"
        request_id = headers.get("x-request-id")
        return GiantleapError(
            detail, f"http_{status}", status=status, job_id=job_id, request_id=request_id, retry_after_s=retry_after_s
        )
    return from_problem(problem | {"status": status}, problem.get("job_id") or job_id, retry_after_s)


def from_problem(
    problem: Mapping[str, Any], job_id: str | None, retry_after_s: float | None = None, *, ended: bool = False
) -> GiantleapError:
    """The error of a problem document.

    Args:
        problem: The document.
        job_id: The job that it is about.
        retry_after_s: How long the service asks to wait.
        ended: Whether it is why a job ended.
    """
    code, status = str(problem["code"]), int(problem["status"])
    fields = tuple((str(each["field"]), str(each["reason"])) for each in problem.get("errors") or ())
    return _kind_of(code, status, ended)(
        str(problem["detail"]),
        code,
        status=status,
        job_id=job_id,
        request_id=problem.get("instance"),
        retry_after_s=retry_after_s,
        fields=fields,
    )


def _kind_of(code: str, status: int, ended: bool) -> type[GiantleapError]:
    if code == "deadline_passed":
        return Timeout
    if ended or code in _JOB_CODES:
        return JobFailed
    if status == 429:
        return RateLimited
    return InvalidRequest if status in _INVALID_STATUSES else GiantleapError


def _read_problem(body: bytes) -> dict[str, Any] | None:
    try:
        problem = json.loads(body)
    except ValueError:
        return None
    return problem if isinstance(problem, dict) and {"code", "detail"} <= problem.keys() else None


def read_retry_after(header: str | None, now: datetime) -> float | None:
    """Seconds to wait by a Retry-After header: a number, or an HTTP date. None where it has neither."""
    if header is None:
        return None
    try:
        seconds_s = float(header)
    except ValueError:
        try:
            until = parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds_s = (until if until.tzinfo else until.replace(tzinfo=UTC)).timestamp() - now.timestamp()
    return max(0.0, seconds_s) if math.isfinite(seconds_s) else None
