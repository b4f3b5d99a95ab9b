"""Routes of a job that exists: its state, its results, its progress, its cancellation."""

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from starlette.responses import StreamingResponse

from giantleap.service.api.dependencies import AppStateDep
from giantleap.service.api.openapi import IMAGE_TYPES, describe_responses, file_content
from giantleap.service.api.responses import failed_response, file_response, job_answer, job_problem
from giantleap.service.api.schemas import JobBody, JobsBody, to_job_body
from giantleap.service.api.sse import EVENT_STREAM_TYPE, read_last_event_id, stream_events
from giantleap.service.api.submission import caller_of
from giantleap.service.auth import Caller
from giantleap.service.errors import Conflict, NotFound
from giantleap.service.jobqueue.producer import CURSOR_PATTERN, MAX_PER_PAGE
from giantleap.service.jobs.job import JobRecord, JobState
from giantleap.service.jobs.media_types import SAFETENSORS_TYPE

router = APIRouter(tags=["jobs"])

JOB_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
EVENTS = {
    "schema": {"type": "string"},
    "example": 'id: 1795284206210-0\nevent: step\ndata: {"step":1,"steps":12}\n\n'
    'id: 1795284206623-0\nevent: done\ndata: {"state":"succeeded"}\n\n',
}
_UNKNOWN = "no such job: it never was, or its time to live has passed"


JobId = Annotated[str, Path(description="The job's id, a UUID in lower case.")]


async def get_record(job_id: JobId, serving: AppStateDep, caller: Annotated[Caller, Depends(caller_of)]) -> JobRecord:
    """The job that the path names.

    Raises:
        NotFound: there is none, the id is no UUID, or the job is another key's.
    """
    record = await serving.producer.get(job_id) if JOB_ID.fullmatch(job_id) else None
    if record is None or not caller.sees(record.job.owner):
        raise NotFound(_UNKNOWN)
    return record


@router.get("/jobs", response_model=JobsBody, responses=describe_responses({}, 422, 503))
async def list_jobs(
    request: Request,
    serving: AppStateDep,
    caller: Annotated[Caller, Depends(caller_of)],
    status: Annotated[JobState | None, Query(description="Only jobs of this state.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PER_PAGE, description="Most jobs of one page.")] = 20,
    cursor: Annotated[str | None, Query(pattern=CURSOR_PATTERN, description="next_cursor of the page before.")] = None,
) -> JobsBody:
    """The caller's own jobs, newest first, as long as their records live."""
    page = await serving.producer.list_jobs(caller.name, status, limit, cursor)
    root_path = request.scope.get("root_path", "")
    return JobsBody(jobs=[to_job_body(record, root_path) for record in page.records], next_cursor=page.next_cursor)


RecordDep = Annotated[JobRecord, Depends(get_record)]


@router.get("/jobs/{job_id}", response_model=JobBody, responses=describe_responses({}, 404, 503))
async def get_job(request: Request, record: RecordDep) -> Response:
    """The job's state."""
    return job_answer(request, record)


@router.get(
    "/jobs/{job_id}/result",
    response_class=Response,
    responses=describe_responses({200: {"content": file_content(*IMAGE_TYPES, SAFETENSORS_TYPE)}}, 404, 409, 422, 503),
)
async def get_result(
    request: Request,
    record: RecordDep,
    serving: AppStateDep,
    index: Annotated[int, Query(ge=0, le=9999, description="Which result, from 0.")] = 0,
) -> Response:
    """The bytes of one result. 409 before the job has succeeded; the job's own problem where it failed."""
    if record.state in (JobState.FAILED, JobState.CANCELED):
        return failed_response(request, record)
    if not record.state.final:
        return job_problem(request, record, Conflict(f"the job is {record.state}; wait until it has succeeded"))
    if index >= len(record.results):
        raise NotFound(f"the job has {len(record.results)} results, counted from 0; there is no {index}")
    content = await serving.producer.read_result(record.job.id, index)
    if content is None:
        raise NotFound("the result was dropped to make room, or its time to live has passed; post the job again")
    return file_response(record, content, index)


@router.get(
    "/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses=describe_responses({200: {"content": {EVENT_STREAM_TYPE: EVENTS}}}, 400, 404, 503),
)
async def get_events(
    record: RecordDep,
    serving: AppStateDep,
    last_event_id: Annotated[str | None, Header(description="Resume after this event.")] = None,
) -> Response:
    """Progress as server-sent events: queued, started, step, stage, retrying, done; the stream ends after done."""
    events = serving.producer.events(record.job.id, read_last_event_id(last_event_id))
    return StreamingResponse(
        stream_events(events, serving.stopping),
        media_type=EVENT_STREAM_TYPE,
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Job-Id": record.job.id},
    )


@router.delete("/jobs/{job_id}", response_model=JobBody, responses=describe_responses({}, 404, 409, 503))
@router.post("/jobs/{job_id}/cancel", response_model=JobBody, responses=describe_responses({}, 404, 409, 503))
async def cancel_job(request: Request, record: RecordDep, serving: AppStateDep) -> Response:
    """Cancel the job: at once where it waits, after the current step where it runs. Safe to repeat."""
    canceled = await serving.producer.cancel(record.job.id)
    if canceled is None:
        raise NotFound(_UNKNOWN)
    if canceled.state in (JobState.SUCCEEDED, JobState.FAILED):
        return job_problem(request, canceled, Conflict(f"the job has already {canceled.state}; nothing to cancel"))
    return job_answer(request, canceled)
