"""Routes of the jobs that failed for good, for operators: list, retry, drop. They need a key with the scope admin."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from giantleap.service.api.dependencies import AppStateDep, JobId, links_of
from giantleap.service.api.openapi import describe_responses
from giantleap.service.api.responses import job_response
from giantleap.service.api.schemas import DeadLettersBody, JobBody, to_dead_letter_body
from giantleap.service.jobqueue.producer import MAX_PER_PAGE
from giantleap.service.jobs.job import JobRecord, JobState

router = APIRouter(prefix="/dead-letters", tags=["operators"])


@router.get("", response_model=DeadLettersBody, responses=describe_responses({}, 422, 503))
async def list_dead_letters(
    state: AppStateDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PER_PAGE, description="Most jobs to list.")] = 20,
) -> DeadLettersBody:
    """List jobs that failed permanently, newest first, and whether each can be retried."""
    letters = await state.dead_letters.list(limit)
    return DeadLettersBody(dead_letters=[to_dead_letter_body(letter) for letter in letters])


@router.post(
    "/{job_id}/retry",
    status_code=202,
    response_model=JobBody,
    responses=describe_responses({}, 404, 409, 422, 429, 503),
)
async def retry_dead_letter(request: Request, job_id: JobId, state: AppStateDep) -> Response:
    """Enqueue a dead letter again, as a new job of the same owner, and remove it from the list."""
    retry = await state.dead_letters.retry(job_id)
    record = JobRecord(
        retry.job,
        JobState.QUEUED,
        queue_position=retry.enqueued.queue_position,
        estimated_start_s=retry.enqueued.estimated_start_s,
    )
    return job_response(request, record, 202, {"Location": links_of(request).job(retry.job.id)})


@router.delete("/{job_id}", status_code=204, responses=describe_responses({}, 404, 503))
async def drop_dead_letter(job_id: JobId, state: AppStateDep) -> Response:
    """Remove a dead letter from the list. Its record stays until it expires; DELETE /jobs/{job_id} removes it too."""
    await state.dead_letters.drop(job_id)
    return Response(status_code=204)
