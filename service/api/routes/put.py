"""PUT /jobs/{job_id}: the same jobs as those of /generate and /upscale, under an id that the client made.

The id is what an Idempotency-Key is to the other two: sent again with the same body it finds the job.
"""

from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError

from giantleap.service.api.dependencies import AppStateDep
from giantleap.service.api.openapi import IMAGE_TYPES, describe_responses, file_content, upload_request_body
from giantleap.service.api.routes.create import ACCEPTED, PROBLEMS, SubmitOptionsDep, post_generate, post_upscale
from giantleap.service.api.routes.jobs import JOB_ID, JobId
from giantleap.service.api.schemas import JobBody
from giantleap.service.errors import InvalidFields, MalformedRequest, validation_problem
from giantleap.service.jobs.media_types import JSON_TYPE, SAFETENSORS_TYPE
from giantleap.service.jobs.requests import GenerateRequest, UpscaleQuery

router = APIRouter(tags=["create"])


def _request_body() -> dict[str, object]:
    """Either body, told apart by its content type."""
    described = upload_request_body()
    described["requestBody"]["content"][JSON_TYPE] = {"schema": {"$ref": "#/components/schemas/GenerateRequest"}}
    return described


@router.put(
    "/jobs/{job_id}",
    response_model=JobBody,
    responses=describe_responses(
        {200: {"content": file_content(*IMAGE_TYPES, SAFETENSORS_TYPE)}, 202: ACCEPTED}, *PROBLEMS
    ),
    openapi_extra=_request_body(),
)
async def put_job(
    request: Request,
    job_id: JobId,
    query: Annotated[UpscaleQuery, Query()],
    asked: SubmitOptionsDep,
    serving: AppStateDep,
) -> Response:
    """Make a job under a UUID of your own: JSON as of /generate, a latent or an image as of /upscale."""
    if not JOB_ID.fullmatch(job_id):
        raise InvalidFields(("job_id", "is no UUID in lower case, such as uuidgen makes"))
    if asked.idempotency_key is not None:
        raise MalformedRequest("Idempotency-Key is for POST; here the id in the path has its part")
    asked = replace(asked, job_id=job_id)
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if declared != JSON_TYPE:
        return await post_upscale(request, query, asked, serving)
    if query.model_fields_set:
        fields = sorted(query.model_fields_set)
        raise InvalidFields(*tuple((name, "stands in the query; with a JSON body it belongs there") for name in fields))
    return await post_generate(request, _read_generate(await request.body()), asked, serving)


def _read_generate(body: bytes) -> GenerateRequest:
    try:
        return GenerateRequest.model_validate_json(body)
    except ValidationError as error:
        raise validation_problem(error.errors(include_url=False, include_input=False)) from error
