"""The OpenAPI document's parts that FastAPI does not know by itself: problem documents, files and raw bodies."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.guard import OPEN_PATHS
from service.images_in import INPUT_IMAGE_TYPES
from service.latents_in import NPY_TYPE, OCTETS_TYPE, SAFETENSORS_TYPE
from service.problems import PROBLEM_TYPE
from service.schemas import OutputFormat, Problem

Responses = dict[int | str, dict[str, Any]]

IMAGE_FORMATS: dict[str, OutputFormat] = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}
IMAGE_TYPES = tuple(IMAGE_FORMATS)
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_WHOLE_NUMBER = {"schema": {"type": "integer"}, "description": "Seconds after which to try again."}


def describe_answers(good: Responses, *statuses: int) -> Responses:
    """The responses of a route: its good ones, and a problem for each other status that it may answer."""
    content = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    described = dict(good)
    for status in (*statuses, 500):
        described[status] = {"description": HTTPStatus(status).phrase, "content": content}
        if status in (429, 503):
            described[status]["headers"] = {"Retry-After": _WHOLE_NUMBER}
    return described


def file_content(*media_types: str) -> dict[str, Any]:
    """The `content` of an answer that may be one of these files."""
    return dict.fromkeys(media_types, _BINARY)


def upload_request_body() -> dict[str, Any]:
    """The body of /upscale, which FastAPI does not parse: a latent or an image, also as the one file of a form."""
    content = file_content(SAFETENSORS_TYPE, NPY_TYPE, *INPUT_IMAGE_TYPES, OCTETS_TYPE)
    form = {"type": "object", "properties": {"image": _BINARY["schema"]}, "required": ["image"]}
    return {"requestBody": {"required": True, "content": content | {"multipart/form-data": {"schema": form}}}}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the app, with the schema that the problem responses refer to."""
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(problem.pop("$defs", {}))
    schemas["Problem"] = problem
    schemes = document["components"].setdefault("securitySchemes", {})
    schemes["bearer"] = {"type": "http", "scheme": "bearer", "description": "An API key, where the service has keys."}
    schemes["header"] = {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    _describe_refusals(document["paths"])
    # FastAPI announces its own error form wherever there is a parameter; that form is never sent.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        operation["responses"] = {
            status: answer
            for status, answer in operation["responses"].items()
            if "HTTPValidationError" not in str(answer)
        }
    return document


def _describe_refusals(paths: dict[str, Any]) -> None:
    """Adds to each operation behind a key that it asks for one, and how it refuses, in the form of its front."""
    problem = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    forms = {
        path.split("/")[1]: operation["responses"]["500"]["content"]
        for path, operations in paths.items()
        for operation in operations.values()
        if "500" in operation["responses"]
    }
    for path, operations in paths.items():
        if path in OPEN_PATHS:
            continue
        for operation in operations.values():
            operation["security"] = [{"bearer": []}, {"header": []}, {}]
            for status in (401, 403):
                content = forms.get(path.split("/")[1], problem)
                refusal = {"description": HTTPStatus(status).phrase, "content": content}
                operation["responses"].setdefault(str(status), refusal)
