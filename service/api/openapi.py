"""The OpenAPI document's parts that FastAPI does not know by itself: files, raw bodies, every error, examples.

What a page of it says in general is here, as are its examples; what a field means stands with the field.
"""

import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from giantleap.models.image_formats import ImageFormat
from giantleap.service import errors
from giantleap.service.api.compat.errors import front_error
from giantleap.service.api.dependencies import AppState
from giantleap.service.api.problems import PROBLEM_TYPE, problem_body
from giantleap.service.api.schemas import Problem, to_job_body, to_model_body
from giantleap.service.auth import OPEN_PATHS
from giantleap.service.errors import InvalidFields
from giantleap.service.jobs.job import GenerateParams, Job, JobRecord, JobState, Priority, ResultFile
from giantleap.service.jobs.media_types import NPY_TYPE, OCTETS_TYPE, SAFETENSORS_TYPE
from giantleap.service.jobs.requests import GenerateRequest

Responses = dict[int | str, dict[str, Any]]

IMAGE_FORMATS: dict[str, ImageFormat] = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}
IMAGE_TYPES = tuple(IMAGE_FORMATS)
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_WHOLE_NUMBER = {"schema": {"type": "integer"}, "description": "Seconds after which to try again."}
_TEXT = {"type": "string"}

_INTRODUCTION = """
A POST makes a job and waits for it. `Accept` chooses between the file and the job as JSON; `Prefer: respond-async`
answers at once with `Location`. Sizes are pixels of the final image unless a name says `base`, durations seconds, times
RFC 3339 in UTC. Where the service has API keys, send one as `Authorization: Bearer KEY` or `X-API-Key`.

Every error is a problem document (RFC 9457); decide by its `code`, which never changes. Paths below `/v1`, `/v2` and
`/remote_vae` speak the protocols of other services, errors included.
"""
_TAGS = {
    "create": "Make a job: draw a prompt, or enlarge a latent or an image.",
    "jobs": "Follow a job, fetch its files, cancel it.",
    "service": "Bundles, probes and metrics.",
    "OpenAI": "Images as the `openai` client asks for them.",
    "KServe v2": "Latents by the Open Inference Protocol, as `tritonclient` speaks it.",
    "remote VAE": "Decode and encode as `diffusers.utils.remote_utils` asks for it.",
}
_JOB_HEADERS = {
    "X-Job-Id": {"schema": _TEXT, "description": "The job."},
    "X-Method": {"schema": _TEXT, "description": "How the image became large."},
    "X-Decode": {"schema": _TEXT, "description": "exact, or how the image differs from that."},
    "X-Seed": {"schema": {"type": "integer"}, "description": "Seed of the first image; not of an upscale."},
    "X-Warnings": {"schema": _TEXT, "description": "JSON list, where there are any: unknown words of the prompt."},
}
_TIMES = {"schema": _TEXT, "description": "Milliseconds of each stage: queue;dur=1.7, generate;dur=350.8, ..."}
_PROMPT = "a red sphere on a green floor under a blue sky"
_REQUESTS: dict[str, dict[str, Any]] = {
    "smallest": {"prompt": _PROMPT},
    "four times as large": {"prompt": _PROMPT, "scale": 4, "seed": 7},
    "a size of its own": {"prompt": _PROMPT, "scale": 2, "width": 384, "height": 256, "output_format": "webp"},
    "two drawings, no hurry": {"prompt": _PROMPT, "num_images": 2, "priority": "low", "method": "bicubic"},
}
_EXAMPLES: tuple[errors.GiantleapError, ...] = (
    errors.MalformedRequest("the body is not valid JSON, from character 1 on"),
    errors.Unauthorized("the API key is not known"),
    errors.Forbidden("this needs a key with the scope generate"),
    errors.NotFound("no such job: it never was, or its time to live has passed"),
    errors.NotAcceptable("Accept allows none of what can be answered here: application/json, image/png"),
    errors.Conflict("the job is processing; wait until it has succeeded"),
    errors.PayloadTooLarge("the body is larger than the 67108864 bytes that are allowed"),
    errors.UnsupportedMediaType("content type 'text/plain'; send application/json"),
    InvalidFields(("scale", "is 3; bundle pocket has 1, 2, 4 by method lua")),
    errors.DoesNotFit("the job needs 9000000000 bytes", needed_bytes=9_000_000_000, device_bytes=8_000_000_000),
    errors.QueueFull("256 jobs are queued or running, as many as are allowed"),
    errors.RateLimited("this key may send 60 requests a minute; wait as Retry-After says"),
    errors.TooManyJobs("this key has 8 jobs queued or running, as many as it may"),
    errors.HeadersTooLarge("101 headers, with the address 4000 bytes; 100 headers of 32768 bytes are allowed"),
    errors.GiantleapError("an unexpected error; the log has it under this instance"),
    errors.JobFailed("the image has values that are not finite"),
    errors.EngineFault("out of memory with one image"),
    errors.NotReady("Redis cannot be reached"),
    errors.StorageFull("the body does not fit the store; try again later"),
    errors.DeadlinePassed("the job did not finish within 300 s; it goes on at status_url"),
)


def describe_responses(good: Responses, *statuses: int) -> Responses:
    """The responses of a route: its good ones, and a problem for each other status that it may answer."""
    content = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    described = dict(good)
    for status in (*statuses, 500):
        described[status] = {"description": HTTPStatus(status).phrase, "content": dict(content)}
        if status in (429, 503):
            described[status]["headers"] = {"Retry-After": _WHOLE_NUMBER}
    return described


def file_content(*media_types: str) -> dict[str, Any]:
    """The `content` of an answer that may be one of these files."""
    return dict.fromkeys(media_types, _BINARY)


def upload_request_body() -> dict[str, Any]:
    """The body of /upscale, which FastAPI does not parse: a latent or an image, also as the one file of a form."""
    content = file_content(SAFETENSORS_TYPE, NPY_TYPE, *IMAGE_TYPES, OCTETS_TYPE)
    form = {"type": "object", "properties": {"image": _BINARY["schema"]}, "required": ["image"]}
    return {"requestBody": {"required": True, "content": content | {"multipart/form-data": {"schema": form}}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the app: every operation with all its errors, and examples that fit their schemas."""
    document = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=_INTRODUCTION.strip(),
        routes=app.routes,
        tags=[{"name": name, "description": text} for name, text in _TAGS.items()],
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(problem.pop("$defs", {}))
    schemas["Problem"] = problem
    schemes = document["components"].setdefault("securitySchemes", {})
    schemes["bearer"] = {"type": "http", "scheme": "bearer", "description": "An API key, where the service has keys."}
    schemes["header"] = {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."}
    # FastAPI announces its own error form wherever there is a parameter; that form is never sent.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    forms = _error_forms(document["paths"])
    for path, method, operation in _operations(document["paths"]):
        operation["responses"] = {
            status: answer
            for status, answer in operation["responses"].items()
            if "HTTPValidationError" not in str(answer)
        }
        _name(path, method, operation)
        _describe_errors(path, operation, forms.get(path.split("/")[1], _PROBLEM))
        if operation["tags"] == ["create"]:
            _describe_job_headers(operation["responses"])
    _add_examples(document, app.state.serving)
    return document


_PROBLEM = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}


def _operations(paths: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in paths.items():
        for method, operation in operations.items():
            yield path, method, operation


def _error_forms(paths: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The `content` of an error by the first part of the path: that of the 500 that a route there describes."""
    return {
        path.split("/")[1]: operation["responses"]["500"]["content"]
        for path, _, operation in _operations(paths)
        if "500" in operation["responses"]
    }


def _name(path: str, method: str, operation: dict[str, Any]) -> None:
    """A summary, which is the first clause of the description, and a short name for generated clients.

    The name is that of the function; before it stands the protocol of a front, after it the method of a second route.
    """
    operation["summary"] = re.split(r"[:;.](?=\s|$)", operation["description"])[0]
    function = operation["operationId"].removesuffix(f"{re.sub(r'[^a-zA-Z0-9]', '_', path)}_{method}")
    (tag,) = operation["tags"]
    front = "" if front_error(path, problem_body(_EXAMPLES[0], "")) is None else tag.lower().replace(" ", "_") + "_"
    again = "_by_post" if path.endswith("/cancel") else ""
    operation["operationId"] = front + function + again


def _describe_errors(path: str, operation: dict[str, Any], form: dict[str, Any]) -> None:
    """Adds what any route may answer, and to each error its codes and an example in the form of its front."""
    answers = operation["responses"]
    shared: tuple[str, ...] = ("431", "500")
    if path not in OPEN_PATHS:
        operation["security"] = [{"bearer": []}, {"header": []}, {}]
        shared = ("401", "403", *shared)
    for status in shared:
        answers.setdefault(status, {"description": "", "content": form})
    for status in sorted(status for status in answers if int(status) >= 400):
        answer = answers.pop(status)
        known = [error for error in _EXAMPLES if error.status == int(status)]
        codes = ", ".join(f"`{error.code}`" for error in known)
        body = problem_body(known[0], "89d50fe02b0b44fc8282a31e3a2b9c4c")
        shown = front_error(path, body) or body
        content = {kind: {**described, "example": shown} for kind, described in answer["content"].items()}
        answers[status] = {**answer, "description": f"{HTTPStatus(int(status)).phrase}: {codes}", "content": content}


def _describe_job_headers(answers: dict[str, Any]) -> None:
    answers["200"]["description"] = "The file where Accept names an image type, else the job, which has ended."
    answers["200"]["headers"] = {**_JOB_HEADERS, "Server-Timing": _TIMES}
    followed = {"schema": _TEXT, "description": "Path of the job."}
    answers["202"]["headers"] = {"Location": followed, **_JOB_HEADERS}


def _example_job() -> JobRecord:
    params = GenerateParams(_PROMPT, "", 2, 256, 256, 12, 3.0, 7, 1, "png")
    job = Job(
        "9ffc72bd-eedb-4a4b-8709-584d01415be4",
        "pocket",
        priority=Priority.HIGH,
        created_at_s=1_795_284_206.202,
        params=params,
    )
    stages = {"queue": 0.007, "generate": 0.31, "upscale": 0.007, "decode": 0.077, "encode": 0.007}
    files = (ResultFile("image/png", 60_214, 7, 256, 256),)
    begun_s, ended_s = job.created_at_s + 0.008, job.created_at_s + 0.42
    return JobRecord(
        job, JobState.SUCCEEDED, deliveries=1, started_at_s=begun_s, finished_at_s=ended_s, stages=stages, results=files
    )


def _add_examples(document: dict[str, Any], serving: AppState) -> None:
    """Requests to start from, a job that has ended, and the bundle as it is served here."""
    document["components"]["schemas"]["JobBody"]["examples"] = [to_job_body(_example_job()).model_dump(mode="json")]
    requests = {name: {"summary": name, "value": request} for name, request in _REQUESTS.items()}
    for path, method, operation in _operations(document["paths"]):
        for described in operation.get("requestBody", {}).get("content", {}).values():
            if described["schema"].get("$ref", "").endswith("/" + GenerateRequest.__name__):
                described["examples"] = requests
        if (path, method) == ("/models", "get"):
            first = next(iter(serving.bundles.values()))
            body = to_model_body(first.bundle, serving.settings).model_dump(mode="json")
            operation["responses"]["200"]["content"]["application/json"]["example"] = [body]
