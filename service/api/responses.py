"""Responses about a job: its JSON body, a file that it made, or the problem that it ended with."""

import asyncio
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal

from fastapi import Request, Response

from giantleap.models.pixels.image_formats import CONTENT_TYPES
from giantleap.service.api.dependencies import AppState, links_of
from giantleap.service.api.problems import from_job_error, problem_response
from giantleap.service.api.schemas import to_job_body
from giantleap.service.errors import Conflict, GiantleapError, JobFailed, NotFound
from giantleap.service.jobs.job import JobRecord, JobState
from giantleap.service.jobs.media_types import JSON_TYPE, SAFETENSORS_TYPE

ZIP_TYPE: Final = "application/zip"
_EXTENSIONS: Final = MappingProxyType(
    {kind: name for name, kind in CONTENT_TYPES.items()} | {SAFETENSORS_TYPE: "safetensors"}
)
# Reverse proxies refuse headers of some kilobytes.
_WARNINGS_HEADER_BYTES = 2048
# A client follows the redirect at once; what has begun goes on after that.
_PRESIGNED_S = 300


class JobProblem(Exception):
    """An error about a job that exists. The response names the job, so that the client can find it again."""

    def __init__(self, record: JobRecord, error: GiantleapError) -> None:
        super().__init__(error.detail)
        self.record = record
        self.error = error


async def handle_job_problem(request: Request, problem: Exception) -> Response:
    """The response to a `JobProblem`."""
    assert isinstance(problem, JobProblem)
    job_id = problem.record.job.id
    path = links_of(request).job(job_id)
    headers = job_headers(problem.record) | ({} if problem.record.state.final else {"Location": path})
    return problem_response(problem.error, request, headers, job_id=job_id, status_url=path)


def job_failure(record: JobRecord) -> JobProblem:
    """The problem of a job that failed or was canceled."""
    if record.state is JobState.CANCELED:
        return JobProblem(record, Conflict("the job was canceled; post it again to run it"))
    return JobProblem(record, JobFailed("the job failed") if record.error is None else from_job_error(record.error))


def job_response(
    request: Request, record: JobRecord, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """The job as JSON."""
    body = to_job_body(record, links_of(request))
    return Response(body.model_dump_json(), status, job_headers(record) | dict(headers or {}), JSON_TYPE)


async def file_response(
    state: AppState, record: JobRecord, index: int, headers: Mapping[str, str] | None = None
) -> Response:
    """One result of a job as a file.

    Raises:
        NotFound: The result no longer exists.
    """
    all_headers = _file_headers(state, record, index) | dict(headers or {})
    return Response(await _read_result(state, record, index), 200, all_headers, record.results[index].content_type)


def _file_headers(state: AppState, record: JobRecord, index: int) -> dict[str, str]:
    headers = result_headers(record)
    if (seed := record.results[index].seed) is not None:
        headers["X-Seed"] = str(seed)
    if state.settings.cors_origins or state.signer is not None:  # for <img>, which names no origin
        headers["Cross-Origin-Resource-Policy"] = "cross-origin"
    return headers


async def result_response(
    request: Request, state: AppState, record: JobRecord, index: int, wants_bytes: bool = False
) -> Response:
    """One result of a job that has succeeded: the file, or a redirect where the settings say so.

    Raises:
        JobProblem: The job has not succeeded.
        NotFound: There is no such result, or it no longer exists.
        StoreUnavailable: The result store does not answer.
    """
    _require_succeeded(record)
    if index >= len(record.results):
        raise NotFound(f"the job has {len(record.results)} results, counted from 0; there is no {index}")
    key = record.results[index].key
    if state.presigner is not None and key is not None and not wants_bytes:
        method: Literal["GET", "HEAD"] = "HEAD" if request.scope.get("is_head") else "GET"  # each has its signature
        url = await asyncio.to_thread(state.presigner.sign, key, method, _PRESIGNED_S)
        return Response(status_code=307, headers=_file_headers(state, record, index) | {"Location": url})
    return await file_response(state, record, index)


async def results_response(state: AppState, record: JobRecord) -> Response:
    """All results of a job that has succeeded, as a zip file of the files as they are.

    Raises:
        JobProblem: The job has not succeeded.
        NotFound: One result no longer exists.
    """
    _require_succeeded(record)
    names = [f"{index}.{_EXTENSIONS[file.content_type]}" for index, file in enumerate(record.results)]
    content = await asyncio.to_thread(_to_zip, names, await read_results(state, record))
    headers = {"Content-Disposition": f'attachment; filename="{record.job.id}.zip"'}
    return Response(content, 200, result_headers(record) | headers, ZIP_TYPE)


def _require_succeeded(record: JobRecord) -> None:
    if not record.state.final:
        raise JobProblem(record, Conflict(f"the job is {record.state}; wait until it has succeeded"))
    if record.state is not JobState.SUCCEEDED:
        raise job_failure(record)


def _to_zip(names: Sequence[str], files: Sequence[bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored: the files are compressed already
        for name, content in zip(names, files, strict=True):
            archive.writestr(zipfile.ZipInfo(name), content)  # without a time: the same job, the same bytes
    return buffer.getvalue()


async def read_results(state: AppState, record: JobRecord) -> list[bytes]:
    """Every file that a job made.

    Raises:
        NotFound: One no longer exists.
    """
    return await asyncio.gather(*(_read_result(state, record, index) for index in range(len(record.results))))


async def _read_result(state: AppState, record: JobRecord, index: int) -> bytes:
    content = await state.producer.read_result(record.job.id, index, record.results[index].key)
    if content is None:
        raise NotFound("the result was evicted to make room, or its time to live has passed; post the job again")
    return content


def job_headers(record: JobRecord) -> dict[str, str]:
    """The headers of every response about a job."""
    params = record.job.params
    headers = {"X-Job-Id": record.job.id, "X-Method": params.method, "X-Decode": params.decode}
    if params.seed is not None:
        headers["X-Seed"] = str(params.seed)
    timing = ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in record.stages_s.items())
    if timing:
        headers["Server-Timing"] = timing
    return headers


def result_headers(record: JobRecord) -> dict[str, str]:
    """The headers of a response that carries results: those of the job and, where it has warnings, X-Warnings.

    X-Warnings is a JSON list in ASCII with as many warnings as fit a header.
    """
    warnings = list(record.all_warnings)
    while warnings and len(text := json.dumps(warnings)) > _WARNINGS_HEADER_BYTES:
        warnings.pop()
    return job_headers(record) | ({"X-Warnings": text} if warnings else {})
