"""Routes of existing jobs: state, results, progress, cancellation, deletion."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.responses import StreamingResponse

from giantleap.service.api.dependencies import UNKNOWN_JOB, AppStateDep, CallerDep, RecordDep, links_of
from giantleap.service.api.negotiation import prefers_bytes
from giantleap.service.api.openapi import IMAGE_TYPES, REDIRECT, describe_responses, file_content
from giantleap.service.api.responses import ZIP_TYPE, JobProblem, job_response, result_response, results_response
from giantleap.service.api.schemas import JobBody, JobsBody, to_job_body
from giantleap.service.api.sse import (
    EVENT_STREAM_HEADERS,
    EVENT_STREAM_TYPE,
    open_events,
    read_last_event_id,
    stream_events,
)
from giantleap.service.errors import Conflict, NotFound
from giantleap.service.jobqueue.producer import CURSOR_PATTERN, MAX_PER_PAGE
from giantleap.service.jobs.job import JobState
from giantleap.service.jobs.media_types import SAFETENSORS_TYPE

router = APIRouter(tags=["jobs"])

_EVENTS = {
    "schema": {"type": "string"},
    "example": 'id: 1795284206210-0\nevent: step\ndata: {"step":1,"steps":12}\n\n'
    'id: 1795284206623-0\nevent: done\ndata: {"state":"succeeded"}\n\n',
}
_NO_EVENTS = {"description": "The job has ended and no event is left: EventSource stops."}


@router.get("/jobs", response_model=JobsBody, responses=describe_responses({}, 422, 503))
async def list_jobs(
    request: Request,
    state: AppStateDep,
    caller: CallerDep,
    status: Annotated[JobState | None, Query(description="Only jobs with this status.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PER_PAGE, description="Maximum number of jobs per page.")] = 20,
    cursor: Annotated[
        str | None, Query(pattern=CURSOR_PATTERN, description="next_cursor of the previous page.")
    ] = None,
) -> JobsBody:
    """List the caller's jobs, newest first, until their records expire."""
    page = await state.producer.list_jobs(caller.name, status, limit, cursor)
    bodies = [to_job_body(record, links_of(request)) for record in page.records]
    return JobsBody(jobs=bodies, next_cursor=page.next_cursor)


@router.get("/jobs/{job_id}", response_model=JobBody, responses=describe_responses({}, 404, 503))
async def get_job(request: Request, record: RecordDep) -> Response:
    """Get a job."""
    return job_response(request, record)


@router.get(
    "/jobs/{job_id}/result",
    response_class=Response,
    responses=describe_responses(
        {200: {"content": file_content(*IMAGE_TYPES, SAFETENSORS_TYPE)}, 307: REDIRECT}, 404, 409, 422, 503
    ),
)
async def get_result(
    request: Request,
    record: RecordDep,
    state: AppStateDep,
    index: Annotated[int, Query(ge=0, le=9999, description="Index of the result, from 0.")] = 0,
    prefer: Annotated[
        str | None, Header(description="return=representation: return the bytes, never a redirect.")
    ] = None,
) -> Response:
    """Download one result. 409 before the job has succeeded; the job's problem if it failed."""
    return await result_response(request, state, record, index, prefers_bytes(prefer))


@router.get(
    "/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses=describe_responses({200: {"content": {EVENT_STREAM_TYPE: _EVENTS}}, 204: _NO_EVENTS}, 400, 404, 503),
)
async def get_events(
    record: RecordDep,
    state: AppStateDep,
    last_event_id: Annotated[str | None, Header(description="Resume after this event.")] = None,
) -> Response:
    """Stream progress as server-sent events: queued, started, step, preview, progress, stage, retrying, done."""
    after = state.producer.events(record.job.id, read_last_event_id(last_event_id))
    events = await open_events(after, record.state.final)
    if events is None:
        return Response(status_code=204)
    headers = EVENT_STREAM_HEADERS | {"X-Job-Id": record.job.id}
    return StreamingResponse(stream_events(events, state.stopping), 200, headers, EVENT_STREAM_TYPE)


@router.get(
    "/jobs/{job_id}/results",
    response_class=Response,
    responses=describe_responses({200: {"content": file_content(ZIP_TYPE)}}, 404, 409, 422, 503),
)
async def get_results(record: RecordDep, state: AppStateDep) -> Response:
    """Download all results as one zip file: 0.png, 1.png, ... The errors are those of a single result."""
    return await results_response(state, record)


@router.delete(
    "/jobs/{job_id}",
    response_model=JobBody,
    responses=describe_responses({204: {"description": "Deleted."}}, 404, 503),
)
async def delete_job(request: Request, record: RecordDep, state: AppStateDep) -> Response:
    """Delete a job: with its results if it has ended (204), else cancel it (200, with its state)."""
    canceled = await state.producer.delete(record.job.id)
    return Response(status_code=204) if canceled is None else job_response(request, canceled)


@router.post("/jobs/{job_id}/cancel", response_model=JobBody, responses=describe_responses({}, 404, 409, 503))
async def cancel_job(request: Request, record: RecordDep, state: AppStateDep) -> Response:
    """Cancel a job: at once if it waits, at the next step or strip if it runs. Safe to repeat."""
    canceled = await state.producer.cancel(record.job.id)
    if canceled is None:
        raise NotFound(UNKNOWN_JOB)
    if canceled.state in (JobState.SUCCEEDED, JobState.FAILED):
        raise JobProblem(canceled, Conflict(f"the job has already {canceled.state}; nothing to cancel"))
    return job_response(request, canceled)
