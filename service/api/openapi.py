"""The parts of the OpenAPI document that FastAPI cannot derive: files, raw bodies, every error, examples.

Fields are described where they are declared (`giantleap.service.api.schemas`, `giantleap.service.jobs.requests`).
"""

import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from giantleap.models.pixels.image_formats import CONTENT_TYPES
from giantleap.service import errors
from giantleap.service.api.dependencies import UNKNOWN_JOB, AppState
from giantleap.service.api.paths import KSERVE_PATH, OPENAI_PATH, REMOTE_VAE_PATH
from giantleap.service.api.problems import PROBLEM_TYPE, compat_error, problem_body
from giantleap.service.api.schemas import Problem, to_job_body, to_model_body
from giantleap.service.auth import OPEN_PATHS
from giantleap.service.jobs.job import GenerateParams, Job, JobRecord, JobState, Priority, ResultFile
from giantleap.service.jobs.media_types import FORM_TYPE, JSON_TYPE, NPY_TYPE, OCTETS_TYPE, SAFETENSORS_TYPE
from giantleap.service.jobs.requests import GenerateRequest, UpscaleQuery
from giantleap.service.links import Links

Responses = dict[int | str, dict[str, Any]]

IMAGE_TYPES = tuple(CONTENT_TYPES.values())
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_OPTIONAL_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_SUBMIT_HEADERS = {
    "idempotency-key": "Posting again with the same key finds the first job.",
    "cancel-after": "Seconds after which the job fails unless it has ended.",
    "accept": "An image type for the file itself, else JSON.",
    "prefer": "respond-async, or wait=N seconds.",
}
SUBMIT_PARAMETERS: Final[list[dict[str, Any]]] = [
    {
        "name": "cancel_on_disconnect",
        "in": "query",
        "required": False,
        "schema": {"type": "boolean", "default": False, "title": "Cancel On Disconnect"},
        "description": "Cancel the job when the client goes away while it waits.",
    },
    *(
        {"name": name, "in": "header", "required": False, "schema": _OPTIONAL_TEXT, "description": text}
        for name, text in _SUBMIT_HEADERS.items()
    ),
]
"""Of the routes that make a job: what `giantleap.service.api.submission.read_submit_options` reads."""
UPSCALE_PARAMETERS: Final[list[dict[str, Any]]] = [
    {"name": name, "in": "query", "required": False, "schema": schema, "description": schema.get("description", "")}
    for name, schema in UpscaleQuery.model_json_schema()["properties"].items()
]
"""The query of /upscale."""
GENERATE_CONTENT: Final[dict[str, Any]] = {
    JSON_TYPE: {"schema": {"$ref": f"#/components/schemas/{GenerateRequest.__name__}"}}
}
"""The body of /generate."""
_WHOLE_NUMBER = {"schema": {"type": "integer"}, "description": "Seconds to wait before a retry."}
_TEXT = {"type": "string"}

_INTRODUCTION = """
A POST creates a job and waits for its result. `Accept` selects the file or the job as JSON; `Prefer: respond-async`
returns 202 at once, with `Location`. Sizes are pixels of the final image unless a name says `base`, durations seconds,
times RFC 3339 in UTC. If the service has API keys, send one as `Authorization: Bearer KEY` or `X-API-Key`.

Every error is a problem document (RFC 9457) with a stable `code`. Paths below `/v1`, `/v2` and `/remote_vae` follow the
protocols of other services, errors included.
"""
_TAGS = {
    "create": "Create a job: generate from a prompt, or upscale a latent or an image.",
    "jobs": "Follow a job, download its results, cancel or delete it.",
    "operators": "Dead letters: jobs that failed permanently. With API keys: scope admin only.",
    "service": "Bundles, probes and metrics.",
    "OpenAI": "OpenAI's images API, for the `openai` client.",
    "KServe v2": "Upscale latents by the Open Inference Protocol, for `tritonclient`.",
    "remote VAE": "Remote decode and encode, for `diffusers.utils.remote_utils`.",
}
_JOB_HEADERS = {
    "X-Job-Id": {"schema": _TEXT, "description": "Id of the job."},
    "X-Method": {"schema": _TEXT, "description": "Method that upscaled the image."},
    "X-Decode": {"schema": _TEXT, "description": "exact, tiled or tiny."},
    "X-Seed": {"schema": {"type": "integer"}, "description": "Seed of the first image; absent for an upscale."},
    "X-Warnings": {
        "schema": _TEXT,
        "description": "JSON list of warnings, such as unknown words of the prompt; absent if empty.",
    },
}
_TIMES = {
    "schema": _TEXT,
    "description": "Duration of each stage in milliseconds: queue;dur=1.7, generate;dur=350.8, ...",
}
_PROBLEM = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
_JOB_ID = "9ffc72bd-eedb-4a4b-8709-584d01415be4"
_PROMPT = "a red sphere on a green floor under a blue sky"
_REQUESTS: dict[str, dict[str, Any]] = {
    "minimal": {"prompt": _PROMPT},
    "x4 with a seed": {"prompt": _PROMPT, "scale": 4, "seed": 7},
    "a custom size": {"prompt": _PROMPT, "scale": 2, "width": 384, "height": 256, "output_format": "webp"},
    "two images at low priority": {"prompt": _PROMPT, "num_images": 2, "priority": "low", "method": "bicubic"},
}
_EXAMPLES: tuple[errors.GiantleapError, ...] = (
    errors.MalformedRequest("the body is not valid JSON"),
    errors.Unauthorized("the API key is not known"),
    errors.Forbidden("the key lacks the scope generate; use a key that has it"),
    errors.NotFound(UNKNOWN_JOB),
    errors.NotAcceptable("Accept allows none of the available types; they are application/json, image/png"),
    errors.Conflict("the job is processing; wait until it has succeeded"),
    errors.PayloadTooLarge("the body is too large; send at most 67108864 bytes"),
    errors.UnsupportedMediaType("the content type is 'text/plain'; send application/json"),
    errors.InvalidFields(("scale", "is 3; bundle pocket has 1, 2, 4 by method lua")),
    errors.DoesNotFit("the job needs 9000000000 bytes", needed_bytes=9_000_000_000, device_bytes=8_000_000_000),
    errors.BlockedByFilter("filter faces refused the image; change the request, or ask the operator"),
    errors.QueueFull("256 jobs are queued or running, as many as are allowed"),
    errors.RateLimited("this key may send 60 requests a minute; wait for the seconds of Retry-After"),
    errors.TooManyJobs("this key has 8 jobs queued or running, as many as it may"),
    errors.WorkLimited("the job is 5.2 megapixel-steps of work", needed=5.2, per_minute=60),
    errors.OverBudget("the job is 90.0 megapixel-steps of work", needed=90.0, per_minute=60),
    errors.HeadersTooLarge("101 headers, with the address 4000 bytes; send at most 100 headers and 32768 bytes"),
    errors.GiantleapError("an unexpected error; the log has it under this instance"),
    errors.JobFailed("the image has values that are not finite"),
    errors.EngineFault("out of memory with one image"),
    errors.FilterFault("filter faces raised ValueError; the worker's log has more"),
    errors.NotReady("Redis cannot be reached"),
    errors.StorageFull("the body does not fit the store; try again later"),
    errors.StoreUnavailable("the bucket of results cannot be used now (no answer); try again"),
    errors.BundleNotLoaded("bundle sdxl could not be loaded; other bundles are served: try again later"),
    errors.DeadlinePassed("the job did not finish within 300 s and continues; follow it at its status_url"),
)


def describe_responses(good: Responses, *statuses: int, model: type[BaseModel] | None = None) -> Responses:
    """The responses of a route: its good ones, and an error for each other status.

    Args:
        good: Responses that are not errors.
        *statuses: Statuses of errors, in addition to 500.
        model: Form of the errors of a compatible protocol; None: problem documents.
    """
    described = dict(good)
    for status in (*statuses, 500):
        form: dict[str, Any] = {"content": dict(_PROBLEM)} if model is None else {"model": model}
        described[status] = {"description": HTTPStatus(status).phrase, **form}
        if status in (429, 503):
            described[status]["headers"] = {"Retry-After": _WHOLE_NUMBER}
    return described


def file_content(*media_types: str) -> dict[str, Any]:
    """The `content` of a response that may be one of these files."""
    return dict.fromkeys(media_types, _BINARY)


REDIRECT: Final[dict[str, Any]] = {
    "description": "The file is at the presigned URL in Location (`GIANTLEAP_RESULT_URLS=presigned`)."
}


def upload_request_body() -> dict[str, Any]:
    """The body of /upscale, which FastAPI does not parse: a latent or an image, or a form of one and of options."""
    content = file_content(SAFETENSORS_TYPE, NPY_TYPE, *IMAGE_TYPES, OCTETS_TYPE)
    options = UpscaleQuery.model_json_schema()["properties"]
    form = {"type": "object", "properties": options | {"image": _BINARY["schema"]}, "required": ["image"]}
    return {"requestBody": {"required": True, "content": content | {FORM_TYPE: {"schema": form}}}}


def operation_id(route: APIRoute) -> str:
    """A short name for generated clients: that of the function, prefixed with the compatible protocol."""
    compatible = route.path.startswith((OPENAI_PATH, KSERVE_PATH, REMOTE_VAE_PATH))
    return f"{route.tags[0]}_{route.name}".lower().replace(" ", "_") if compatible else route.name


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
    for model in (Problem, GenerateRequest):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    schemes = document["components"].setdefault("securitySchemes", {})
    schemes["bearer"] = {"type": "http", "scheme": "bearer", "description": "An API key, if the service requires one."}
    schemes["header"] = {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."}
    # FastAPI announces its own error form wherever there is a parameter; that form is never sent.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    forms = _error_forms(document["paths"])
    for path, _, operation in _operations(document["paths"]):
        operation["responses"] = {
            status: response
            for status, response in operation["responses"].items()
            if "HTTPValidationError" not in str(response)
        }
        # The first clause of the description.
        operation["summary"] = re.split(r"[:;.](?=\s|$)", operation["description"])[0]
        _describe_errors(path, operation, forms.get(path.split("/")[1], _PROBLEM))
        if operation["tags"] == ["create"]:
            _describe_job_headers(operation["responses"])
    _add_examples(document, app.state.giantleap)
    return document


def _operations(paths: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in paths.items():
        for method, operation in operations.items():
            yield path, method, operation


def _error_forms(paths: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The `content` of errors by the first part of the path, taken from the 500 of a route below it."""
    return {
        path.split("/")[1]: operation["responses"]["500"]["content"]
        for path, _, operation in _operations(paths)
        if "500" in operation["responses"]
    }


def _describe_errors(path: str, operation: dict[str, Any], form: dict[str, Any]) -> None:
    """Add the errors of any route, and to each error its codes and an example in the protocol of the path."""
    responses = operation["responses"]
    shared: tuple[str, ...] = ("422", "431", "500")
    if path not in OPEN_PATHS:
        operation["security"] = [{"bearer": []}, {"header": []}, {}]
        shared = ("401", "403", *shared)
    for status in shared:
        responses.setdefault(status, {"description": "", "content": form})
    for status in sorted(status for status in responses if int(status) >= 400):
        response = responses.pop(status)
        examples = [error for error in _EXAMPLES if error.status == int(status)]
        codes = ", ".join(f"`{error.code}`" for error in examples)
        body = problem_body(examples[0], "89d50fe02b0b44fc8282a31e3a2b9c4c")
        example = compat_error(path, body) or body
        content = {kind: {**described, "example": example} for kind, described in response["content"].items()}
        responses[status] = {
            **response,
            "description": f"{HTTPStatus(int(status)).phrase}: {codes}",
            "content": content,
        }


def _describe_job_headers(responses: dict[str, Any]) -> None:
    responses["200"]["description"] = "The file if Accept names an image type, else the finished job."
    responses["200"]["headers"] = {**_JOB_HEADERS, "Server-Timing": _TIMES}
    location = {"schema": _TEXT, "description": "Path of the job."}
    responses["202"]["headers"] = {"Location": location, **_JOB_HEADERS}


def _example_job() -> JobRecord:
    created_at_s = 1_795_284_206.202
    params = GenerateParams(
        prompt=_PROMPT,
        negative_prompt="",
        scale=2,
        width_px=256,
        height_px=256,
        steps=12,
        guidance_scale=1.5,
        seed=7,
        num_images=1,
        output_format="png",
    )
    return JobRecord(
        Job(_JOB_ID, "pocket", priority=Priority.HIGH, created_at_s=created_at_s, params=params),
        JobState.SUCCEEDED,
        started_at_s=created_at_s + 0.008,
        finished_at_s=created_at_s + 0.42,
        stages={"queue": 0.007, "generate": 0.31, "upscale": 0.007, "decode": 0.077, "encode": 0.007},
        results=(ResultFile("image/png", 60_214, seed=7, width_px=256, height_px=256),),
    )


def _add_examples(document: dict[str, Any], state: AppState) -> None:
    """Requests to start from, a job that has ended, and the bundle as it is served here."""
    document["components"]["schemas"]["JobBody"]["examples"] = [
        to_job_body(_example_job(), Links("", None, 0.0)).model_dump(mode="json")
    ]
    requests = {name: {"summary": name, "value": request} for name, request in _REQUESTS.items()}
    for path, method, operation in _operations(document["paths"]):
        for described in operation.get("requestBody", {}).get("content", {}).values():
            if described["schema"].get("$ref", "").endswith("/" + GenerateRequest.__name__):
                described["examples"] = requests
        if (path, method) == ("/models", "get"):
            first = next(iter(state.bundles.values()))
            body = to_model_body(first, state.settings, loaded=True).model_dump(mode="json")
            operation["responses"]["200"]["content"][JSON_TYPE]["example"] = [body]
