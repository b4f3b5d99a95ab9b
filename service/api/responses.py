"""The answers that are about a job: its JSON body, a file that it made, or the problem that it ended with."""

import json

from fastapi import Request, Response

from giantleap.service.api.problems import from_job_error, problem_response
from giantleap.service.api.schemas import to_job_body
from giantleap.service.errors import Conflict, GiantleapError, JobFailed
from giantleap.service.jobs.job import GenerateParams, JobRecord, JobState
from giantleap.service.jobs.media_types import JSON_TYPE

# Proxies refuse headers of some kilobytes.
_WARNINGS_HEADER_BYTES = 2048


def job_url(request: Request, job_id: str) -> str:
    """The path of a job on this host."""
    return f"{request.scope.get('root_path', '')}/jobs/{job_id}"


def job_answer(
    request: Request, record: JobRecord, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """The job as JSON."""
    body = to_job_body(record, request.scope.get("root_path", ""))
    return Response(body.model_dump_json(), status, job_headers(record) | (headers or {}), JSON_TYPE)


def file_response(record: JobRecord, content: bytes, index: int, headers: dict[str, str] | None = None) -> Response:
    """The bytes of one result."""
    result = record.results[index]
    sent = job_headers(record) | (headers or {})
    if result.seed is not None:
        sent["X-Seed"] = str(result.seed)
    warnings = warnings_header((*record.job.warnings, *record.warnings))
    if warnings is not None:
        sent["X-Warnings"] = warnings
    return Response(content, 200, sent, result.content_type)


def failed_response(request: Request, record: JobRecord) -> Response:
    """The problem of a job that failed or was canceled."""
    if record.state is JobState.CANCELED:
        error: GiantleapError = Conflict("the job was canceled; post it again to run it")
    else:
        error = JobFailed("the job failed") if record.error is None else from_job_error(record.error)
    return job_problem(request, record, error)


def job_problem(request: Request, record: JobRecord, error: GiantleapError) -> Response:
    """A problem that names the job it is about, so that the client can find it again."""
    job_id = record.job.id
    return problem_response(error, request, job_headers(record), job_id=job_id, status_url=job_url(request, job_id))


def job_headers(record: JobRecord) -> dict[str, str]:
    """The headers that every answer about a job carries."""
    params = record.job.params
    headers = {"X-Job-Id": record.job.id, "X-Method": params.method, "X-Decode": params.decode}
    if isinstance(params, GenerateParams):
        headers["X-Seed"] = str(params.seed)
    timing = ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in record.stages_s.items())
    if timing:
        headers["Server-Timing"] = timing
    return headers


def warnings_header(warnings: tuple[str, ...]) -> str | None:
    """Warnings as a JSON list in ASCII, as many as fit a header; None where there is none."""
    kept = list(dict.fromkeys(warnings))
    while kept and len(text := json.dumps(kept)) > _WARNINGS_HEADER_BYTES:
        kept.pop()
    return text if kept else None
