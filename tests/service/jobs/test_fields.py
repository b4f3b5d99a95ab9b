"""Fields of requests: whole numbers as JSON Schema has them, names of formats, patterns with their own reason."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from giantleap.service.api.compat.kserve import InferRequest
from giantleap.service.api.compat.openai import ImagesRequest
from giantleap.service.errors import field_errors
from giantleap.service.jobs.requests import GenerateRequest, UpscaleQuery

KSERVE: dict[str, Any] = {"inputs": [{"name": "latent", "datatype": "FP32", "shape": [1, 16, 4, 4]}]}


def integers_of(schema: dict[str, Any]) -> list[str]:
    """The properties of a schema that may be integers."""
    return [name for name, field in schema.get("properties", {}).items() if '"integer"' in json.dumps(field)]


CASES: list[tuple[type[BaseModel], dict[str, Any], tuple[str, ...]]] = [
    (GenerateRequest, {"prompt": "a"}, ("width", "height", "steps", "seed", "num_images", "previews", "quality")),
    (ImagesRequest, {"prompt": "a"}, ("n", "partial_images", "num_inference_steps", "seed")),
]
FIELDS = [(model, base, name) for model, base, names in CASES for name in names]


@pytest.mark.parametrize(("model", "base", "name"), FIELDS)
def test_a_whole_number_may_have_a_point(model: type[BaseModel], base: dict[str, Any], name: str) -> None:
    for text in ("2.0", "2", "2e0", "0.2e1"):
        request = model.model_validate_json(json.dumps(base)[:-1] + f', "{name}": {text}}}')
        assert getattr(request, name) == 2 and type(getattr(request, name)) is int
    for text in ("2.5", '"2"', "true", "[2]", "1e400"):
        with pytest.raises(ValidationError):
            model.model_validate_json(json.dumps(base)[:-1] + f', "{name}": {text}}}')


def test_the_cases_are_all_integers_of_the_requests() -> None:
    for model, _, names in CASES:
        assert set(integers_of(model.model_json_schema())) - {"output_compression"} == set(names)


@pytest.mark.parametrize("place", ["width", "height", "priority", "timeout"])
def test_a_whole_number_of_kserve_may_have_a_point(place: str) -> None:
    def read(text: str) -> InferRequest:
        body = json.dumps(KSERVE)[:-1] + f', "parameters": {{"{place}": {text}}}}}'
        return InferRequest.model_validate_json(body)

    assert getattr(read("2.0").parameters, place) == 2
    for text in ("1.5", '"1"', "true"):
        with pytest.raises(ValidationError):
            read(text)


def test_shapes_of_kserve_may_have_points() -> None:
    body = json.dumps(KSERVE).replace("16", "16.0")
    assert InferRequest.model_validate_json(body).inputs[0].shape == [1, 16, 4, 4]
    for text in ("16.5", "true", '"16"'):
        with pytest.raises(ValidationError):
            InferRequest.model_validate_json(json.dumps(KSERVE).replace("16", text))


def test_a_query_is_text_in_which_a_whole_number_may_have_a_point() -> None:
    assert UpscaleQuery.model_validate({"width": "256.0"}).width == 256
    with pytest.raises(ValidationError):
        UpscaleQuery.model_validate({"width": "256.5"})


def test_jpg_is_jpeg_and_other_names_are_refused() -> None:
    for model, base in ((GenerateRequest, {"prompt": "a"}), (ImagesRequest, {"prompt": "a"}), (UpscaleQuery, {})):
        read = TypeAdapter(model)
        assert read.validate_python(base | {"output_format": "jpg"}).output_format == "jpeg"  # type: ignore[attr-defined]
        with pytest.raises(ValidationError):
            read.validate_python(base | {"output_format": "bmp"})


@pytest.mark.parametrize(
    ("model", "values", "reason"),
    [
        (GenerateRequest, {"prompt": " \n"}, "is empty; describe the image"),
        (ImagesRequest, {"prompt": "a", "size": "256"}, "must be WIDTHxHEIGHT in pixels"),
        (ImagesRequest, {"prompt": "a", "size": "256x256\n"}, "must be WIDTHxHEIGHT in pixels"),
        (UpscaleQuery, {"webhook_events": "ended"}, "must be one or more of succeeded, failed, canceled"),
    ],
)
def test_a_pattern_has_a_reason_of_its_own(model: type[BaseModel], values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    ((_, found),) = field_errors(caught.value.errors())
    assert found.startswith(reason)
    assert "pattern" in json.dumps(model.model_json_schema())


def test_a_webhook_may_be_a_url_alone() -> None:
    webhook = GenerateRequest.model_validate({"prompt": "a", "webhook": "https://hooks.example.org/x"}).webhook
    assert webhook is not None and webhook.url == "https://hooks.example.org/x" and len(webhook.events) == 3
    with pytest.raises(ValidationError):
        GenerateRequest.model_validate({"prompt": "a", "webhook": ""})


def test_null_is_as_if_the_field_were_left_out() -> None:
    for model, base in ((GenerateRequest, {"prompt": "a"}), (ImagesRequest, {"prompt": "a"}), (InferRequest, KSERVE)):
        optional = [name for name, field in model.model_fields.items() if not field.is_required()]
        plain = model.model_validate(base)
        assert model.model_validate(base | dict.fromkeys(optional)) == plain and len(optional) >= 3
        for name in set(model.model_fields) - set(optional):
            with pytest.raises(ValidationError):
                model.model_validate(base | {name: None})
    with pytest.raises(ValidationError):
        GenerateRequest.model_validate({"prompt": "a", "unknown": None})
