"""The error tree of the service: each class has a stable code, an HTTP status and whether a retry may help.

`giantleap.service.api.problems` turns an error into an RFC 9457 problem document, `giantleap.service.worker.loop` into
the failure of a job.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from giantleap.models.constraints import explain

EXIT_FAILURE: Final = 1
"""Exit code of a process that cannot do its work now, as without its Redis: a restart may help."""
EXIT_BAD_CONFIGURATION: Final = 2
"""Exit code of a process whose settings, bundle or engine are wrong: a restart cannot help."""
EXIT_HUNG: Final = 75
"""Exit code of a worker that ended itself because a step hung."""
_MAX_FIELDS = 32
_MAX_FIELD_CHARS = 64
_LOCATIONS = frozenset({"body", "query", "header", "path"})


class GiantleapError(Exception):
    """Base of every error that a client may see.

    `detail` says what was wrong, what was expected and what to do. It never holds a prompt or a secret.
    """

    code: str = "internal_error"
    reason: str | None = None
    """The label of the metrics, if one code has several causes."""
    status: int = 500
    title: str = "Internal error"
    retryable: bool = False

    def __init__(self, detail: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s


class MalformedRequest(GiantleapError):
    """A request that cannot be read: no JSON, no latent, a damaged image, a bad header."""

    code, status, title = "malformed_request", 400, "The request could not be read"


class Unauthorized(GiantleapError):
    """A request without a known API key."""

    code, status, title = "unauthorized", 401, "An API key is required"


class Forbidden(GiantleapError):
    """A request that the key, or the page that it came from, does not allow. `scope` is what the key lacks."""

    code, status, title = "forbidden", 403, "Not allowed"

    def __init__(self, detail: str, *, scope: str | None = None) -> None:
        super().__init__(detail)
        self.scope = scope


class NotFound(GiantleapError):
    """An unknown path, or a job or result that does not exist for the caller."""

    code, status, title = "not_found", 404, "No such resource"


class NotAcceptable(GiantleapError):
    """An Accept header that excludes every available type."""

    code, status, title = "not_acceptable", 406, "No representation that the client accepts"


class Conflict(GiantleapError):
    """A job whose state does not allow the request."""

    code, status, title = "conflict", 409, "The job is in another state"


class PayloadTooLarge(GiantleapError):
    """A body or an image over a limit."""

    code, status, title = "payload_too_large", 413, "The body is too large"


class HeadersTooLarge(GiantleapError):
    """Too many headers, or too many bytes in them."""

    code, status, title = "headers_too_large", 431, "The request's headers are too large"


class UnsupportedMediaType(GiantleapError):
    """A body of a type that is not read."""

    code, status, title = "unsupported_media_type", 415, "The body's type is not supported"


class InvalidRequest(GiantleapError):
    """Values that are out of range."""

    code, status, title = "invalid_request", 422, "The request's values are not valid"


class InvalidFields(InvalidRequest):
    """Values that are not valid: (field, reason) pairs, at most 32 of them."""

    def __init__(self, *fields: tuple[str, str]) -> None:
        reasons = [f"{name}: {reason}" for name, reason in fields[:_MAX_FIELDS]]
        if len(fields) > _MAX_FIELDS:
            reasons.append(f"and {len(fields) - _MAX_FIELDS} more")
        super().__init__("; ".join(reasons))
        self.fields = fields[:_MAX_FIELDS]


class DoesNotFit(GiantleapError):
    """A job that no device can hold, in bytes and with the largest final size that fits, where there is one."""

    code, status, title = "does_not_fit", 422, "The job does not fit the device"

    def __init__(
        self,
        detail: str,
        *,
        needed_bytes: int | None = None,
        device_bytes: int | None = None,
        largest_px: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(detail)
        self.needed_bytes = needed_bytes
        self.device_bytes = device_bytes
        self.largest_px = largest_px


class QueueFull(GiantleapError):
    """The limit of queued jobs or of their latent pixels is reached."""

    code, status, title, retryable = "queue_full", 429, "The queue is full", True


class RateLimited(GiantleapError):
    """The key's limit of requests per minute is reached."""

    code, status, title, retryable = "rate_limited", 429, "The key's rate limit is reached", True


class TooManyJobs(GiantleapError):
    """The key's limit of queued and running jobs is reached."""

    code, status, title, retryable = "too_many_jobs", 429, "The key has too many jobs", True


class WorkLimited(GiantleapError):
    """The key's budget of work per minute is used up. Both amounts in megapixel-steps, as of `OverBudget`."""

    code, status, title, retryable = "work_limited", 429, "The key's work budget is used up", True

    def __init__(self, detail: str, *, needed: float, per_minute: int, retry_after_s: int | None = None) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)
        self.needed = needed
        self.per_minute = per_minute


class OverBudget(WorkLimited):
    """A job that is more work than the key's budget of a whole minute: a retry does not help."""

    code, status, title, retryable = "over_budget", 422, "The job is larger than the key's budget", False


class StorageFull(GiantleapError):
    """The input does not fit the blob budget."""

    code, status, title, retryable = "storage_full", 503, "The blob budget is used up", True


class NotReady(GiantleapError):
    """Redis or the process cannot serve requests for now."""

    code, status, title, retryable = "not_ready", 503, "The service is not ready", True


class StoreUnavailable(GiantleapError):
    """The store of results does not take or return a file for now."""

    code, status, title, retryable = "store_unavailable", 503, "The result store is not available", True


class DeadlinePassed(GiantleapError):
    """A wait, or the deadline of a job, has ended."""

    code, status, title = "deadline_passed", 504, "The job did not finish in time"


class WaitTimeout(DeadlinePassed):
    """The longest wait that the settings allow has ended before the job: the service is too slow, not the client."""

    reason = "wait_timeout"


class JobFailed(GiantleapError):
    """A job that ran and failed permanently; the job record keeps the `code` of the cause."""

    code, status, title = "job_failed", 500, "The job failed"


class BlockedByFilter(GiantleapError):
    """An image that a filter of the settings refused. Nothing of the job is stored but that it failed."""

    code, status, title = "blocked_by_filter", 422, "A filter refused the image"


class FilterFault(GiantleapError):
    """A filter that failed, so that its image is held back."""

    code, status, title = "filter_failed", 500, "A filter failed"


class EngineFault(GiantleapError):
    """A fault of the device or the engine that another attempt may survive (out of memory, a lost device)."""

    code, status, title, retryable = "engine_fault", 500, "The engine failed", True


class BundleNotLoaded(GiantleapError):
    """A bundle that a worker could not load now; it serves its others."""

    code, status, title, retryable = "bundle_not_loaded", 503, "The bundle could not be loaded", True


class BadConfiguration(GiantleapError):
    """The settings name something that cannot run: the process ends, and a restart cannot help."""

    code, title = "bad_configuration", "The configuration cannot be run"


def field_errors(
    errors: Sequence[Mapping[str, Any]], names: Mapping[str, str] | None = None
) -> tuple[tuple[str, str], ...]:
    """The errors of pydantic or FastAPI as (field, reason) pairs, without the values.

    Args:
        errors: Result of the `errors` method of a validation error.
        names: Names of fields that the client calls otherwise.
    """
    fields = []
    for error in errors:
        # Cut, since the name of an unknown field is text of the client.
        parts = [str(part) for part in error["loc"] if part not in _LOCATIONS]
        name = ".".join(parts)[:_MAX_FIELD_CHARS] or "body"
        fields.append(((names or {}).get(name, name), explain(error)))
    return tuple(fields)


def validation_problem(
    errors: Sequence[Mapping[str, Any]], names: Mapping[str, str] | None = None
) -> MalformedRequest | InvalidFields:
    """The error of a request that did not validate; the arguments are those of `field_errors`."""
    if any(error["type"] == "json_invalid" for error in errors):
        return MalformedRequest("the body is not valid JSON")
    return InvalidFields(*field_errors(errors, names))
