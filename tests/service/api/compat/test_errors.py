"""Each front gives an error in its own shape, and the OpenAPI document describes the fronts and stays whole."""

import json
from typing import Any

import pytest

from giantleap.service.api.problems import compat_error, problem_body
from giantleap.service.errors import InvalidFields

PROBLEM = problem_body(InvalidFields(*(("n", "is 0"), ("size", "is odd"))), "r-1")
ROUTES = {
    "/v1/images/generations": "OpenAIError",
    "/v1/images/{job_id}/content": "OpenAIError",
    "/v1/models/{model}": "OpenAIError",
    "/v2/models/{model}/infer": "KServeError",
    "/v2/models/{model}/ready": "KServeError",
    "/v2/health/ready": "KServeError",
    "/remote_vae/{bundle}/decode": "RemoteVaeError",
    "/remote_vae/{bundle}/encode": "RemoteVaeError",
}
MAKE_JOBS = ("/v1/images/generations", "/v2/models/{model}/infer", "/remote_vae/{bundle}/decode")


@pytest.mark.parametrize("path", ["/generate", "/jobs/1", "/v10/models", "/v2x", "/remote_vae_x", "/", "", "/x/v1/y"])
def test_other_paths_keep_the_problem_document(path: str) -> None:
    assert compat_error(path, PROBLEM) is None


def test_each_front_has_its_own_shape() -> None:
    message = "n: is 0; size: is odd"
    error = {"message": message, "type": "invalid_request_error", "param": "n", "code": "invalid_request"}
    assert compat_error("/v1/images/generations", PROBLEM) == {"error": error}
    assert compat_error("/v2", PROBLEM) == compat_error("/v2/models/m/infer", PROBLEM) == {"error": message}
    assert compat_error("/remote_vae/m/decode", PROBLEM) == {"error": message, "code": "invalid_request"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_openai_names_the_kind_of_an_error(status: int, kind: str) -> None:
    shaped = compat_error("/v1/x", {"status": status, "detail": "d", "code": "c"})
    assert shaped == {"error": {"message": "d", "type": kind, "param": None, "code": "c"}}


def test_openapi_describes_the_fronts_with_their_errors(document: dict[str, Any]) -> None:
    for path, form in ROUTES.items():
        (operation,) = document["paths"][path].values()
        errors = {status: response for status, response in operation["responses"].items() if int(status) >= 400}
        assert "500" in errors
        for response in errors.values():
            assert list(response["content"]) == ["application/json"]
            assert response["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{form}"}
    for path in MAKE_JOBS:
        responses = document["paths"][path]["post"]["responses"]
        assert {"200", "400", "413", "415", "422", "429", "503", "504"} <= set(responses)
        assert "Retry-After" in responses["429"]["headers"] and "Retry-After" in responses["503"]["headers"]
        assert document["paths"][path]["post"]["requestBody"]["required"] is True


def test_openapi_is_whole(document: dict[str, Any]) -> None:
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    for operation in operations:
        assert operation["responses"] and all("description" in response for response in operation["responses"].values())
    for path, methods in document["paths"].items():
        named = {part[1:-1] for part in path.split("/") if part.startswith("{")}
        for operation in methods.values():
            described = {each["name"] for each in operation.get("parameters", []) if each["in"] == "path"}
            assert described == named, path
    references = {part.split('"')[0] for part in json.dumps(document).split('"$ref": "')[1:]}
    for reference in references:
        schema: Any = document
        for part in reference.removeprefix("#/").split("/"):
            assert part in schema, reference
            schema = schema[part]
