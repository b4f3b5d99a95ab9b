"""The OpenAPI document as a reader of /docs meets it: everything described, every error named, examples that hold."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from giantleap.models.bundle.bundle import read_bundle
from giantleap.service import errors
from giantleap.service.api.openapi import _EXAMPLES, _REQUESTS
from giantleap.service.jobs.planning import plan_generate
from giantleap.service.jobs.requests import GenerateRequest
from giantleap.service.settings import POCKET_BUNDLE, read_settings

API_PAGE = Path(__file__).resolve().parents[3] / "docs" / "api.md"
FRONTS = ("/v1", "/v2", "/remote_vae")
OF_FRONTS = re.compile(r"OpenAI|KServe|RemoteVae|Images|ImageData|Server|Model(Metadata|Ready)|Tensor")


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def _contents(operation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in (operation.get("requestBody", {}), *operation["responses"].values()):
        yield from part.get("content", {}).values()


def test_every_example_fits_its_schema(document: dict[str, Any]) -> None:
    checked = 0
    for path, method, operation in _operations(document):
        for content in _contents(operation):
            shown = [each["value"] for each in content.get("examples", {}).values()]
            shown += [content["example"]] if "example" in content else []
            for example in shown:
                validator = Draft202012Validator({**content["schema"], "components": document["components"]})
                assert not list(validator.iter_errors(example)), (method, path, example)
                checked += 1
    for name, schema in document["components"]["schemas"].items():
        for example in schema.get("examples", []):
            validator = Draft202012Validator({**schema, "components": document["components"]})
            assert not list(validator.iter_errors(example)), name
            checked += 1
    assert checked > 150


@pytest.mark.parametrize("name", _REQUESTS)
def test_the_example_requests_are_taken_by_the_bundle_that_ships(name: str) -> None:
    request = GenerateRequest.model_validate(_REQUESTS[name])
    bundle = read_bundle(POCKET_BUNDLE)
    assert plan_generate(request, bundle, read_settings(), 7, "png").prompt == request.prompt


def test_every_field_and_parameter_of_ours_is_described(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        if not OF_FRONTS.match(name):
            assert name in ("JobState", "Priority") or schema.get("description"), name
            for field, described in schema.get("properties", {}).items():
                assert described.get("description"), (name, field)
    for path, method, operation in _operations(document):
        assert operation["summary"] and operation["description"], (method, path)
        if not path.startswith(FRONTS):
            assert all(parameter.get("description") for parameter in operation.get("parameters", [])), (method, path)
    tags = {tag["name"] for tag in document["tags"]}
    assert tags == {tag for _, _, operation in _operations(document) for tag in operation["tags"]}


def test_names_for_generated_clients_hold_no_path(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in _operations(document)]
    assert len(set(names)) == len(names)
    assert {"post_generate", "post_upscale", "put_job", "cancel_job", "openai_post_generation"} <= set(names)
    assert all(re.fullmatch(r"[a-z_0-9]{4,32}", name) for name in names), names


def test_every_operation_names_the_errors_that_any_request_may_meet(document: dict[str, Any]) -> None:
    for path, method, operation in _operations(document):
        assert {"431", "500"} <= set(operation["responses"]), (method, path)
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                codes = set(re.findall(r"`(\w+)`", response["description"]))
                assert codes == {error.code for error in _EXAMPLES if error.status == int(status)} != set()
                assert all("example" in content for content in response["content"].values())


def _every_error(kind: type[errors.GiantleapError] = errors.GiantleapError) -> Iterator[type[errors.GiantleapError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _every_error(each)


def test_the_errors_are_those_of_the_code_and_of_the_page() -> None:
    shown = {(error.status, error.code) for error in _EXAMPLES}
    of_code = {(kind.status, kind.code) for kind in _every_error() if not issubclass(kind, errors.BadConfiguration)}
    assert shown == of_code
    rows = re.findall(r"^\| (\d{3}) \| (`[a-z_`, ]+`) \|", API_PAGE.read_text(), re.MULTILINE)
    on_page = {(int(status), code) for status, codes in rows for code in re.findall(r"[a-z_]+", codes)}
    assert on_page == shown | {(405, "method_not_allowed")}


def test_answers_of_a_new_job_describe_their_headers(document: dict[str, Any]) -> None:
    for path, method in (("/generate", "post"), ("/upscale", "post"), ("/jobs/{job_id}", "put")):
        responses = document["paths"][path][method]["responses"]
        assert {"X-Job-Id", "X-Seed", "X-Method", "Server-Timing"} <= set(responses["200"]["headers"])
        assert "Location" in responses["202"]["headers"] and "Retry-After" in responses["429"]["headers"]
