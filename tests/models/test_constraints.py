"""What a broken constraint says: in the project's words, for each kind that a model has, and never with the value."""

from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from giantleap.models.bundle.descriptor import Descriptor
from giantleap.models.constraints import REASONS, explain
from giantleap.service.api.compat.kserve import InferRequest
from giantleap.service.api.compat.openai import ImagesRequest
from giantleap.service.api.compat.remote_vae import DecodeQuery, EncodeQuery
from giantleap.service.jobs.job import Job
from giantleap.service.jobs.requests import GenerateRequest, UpscaleQuery, WebhookRequest
from giantleap.service.settings import Settings
from giantleap.training.run_config import RunConfig

SECRET = "wombat"
MODELS = (
    *(GenerateRequest, UpscaleQuery, WebhookRequest, ImagesRequest, InferRequest, DecodeQuery, EncodeQuery),
    *(Job, Settings, Descriptor, RunConfig),
)
LIBRARY = ("Input", "should", "String", "Value error", "Field required", "Extra inputs", "Assertion", "pydantic")
WRONG: tuple[Any, ...] = (
    *(None, True, "", " ", SECRET, f"{SECRET}\n", SECRET * 20_000, "\ud800", "256x256\n", b"\xff", b"bytes"),
    *(0, -1, 1.5, 10**30, -(10**30), float("nan"), float("inf"), "1e999", "9" * 5000),
    *([], [SECRET], [[]], [1.5], [None] * 100, {}, {SECRET: SECRET}, {1: 2}, {"url": SECRET, SECRET: 1}, object()),
)


def errors_of(model: Any, value: Any) -> list[Any]:
    try:
        TypeAdapter(model).validate_python(value)
    except ValidationError as error:
        return error.errors()
    except (TypeError, OSError):
        assert model is Settings, "they are keywords, which are text; and a bundle may be a path"
    return []


def names_of(model: Any) -> list[str]:
    return list(model.model_fields if issubclass(model, BaseModel) else model.__dataclass_fields__)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_no_word_of_the_library_and_no_value_is_in_a_reason(model: Any) -> None:
    found = [fault for value in WRONG for fault in errors_of(model, value)]
    for name in (*names_of(model), SECRET):
        found += [fault for value in WRONG for fault in errors_of(model, {name: value})]
    assert len(found) > 100
    for fault in found:
        reason = explain(fault)
        secret = () if fault["loc"] == ("bundle",) else (SECRET,)  # a bundle is named in what does not find it
        assert reason and not any(word in reason for word in (*LIBRARY, *secret)), (fault["type"], reason)
        assert fault["type"] in (*REASONS, "value_error", "assertion_error"), (
            f"{fault['type']} has no reason of its own"
        )


def test_every_reason_fills_its_limits() -> None:
    limits = {"ge": 1.0, "le": 2**63 - 1, "gt": 0.5, "lt": 3, "multiple_of": 8, "min_length": 1, "max_length": 4}
    limits |= {"pattern": "^a$", "expected": "'a' or 'b'", "discriminator": "'kind'", "expected_tags": "'a', 'b'"}  # type: ignore[dict-item]
    texts = {kind: explain({"type": kind, "msg": "Input should", "ctx": limits}) for kind in REASONS}
    assert not any("{" in text or "Input" in text for text in texts.values())
    assert texts["greater_than_equal"] == "must be at least 1" and texts["greater_than"] == "must be above 0.5"
    assert texts["less_than_equal"] == "must be at most 9223372036854775807"
    assert texts["literal_error"] == "must be 'a' or 'b'"


def test_a_kind_without_a_reason_says_no_word_of_the_library() -> None:
    assert explain({"type": "uuid_parsing", "msg": "Input should be a valid UUID"}) == "has a value that is not allowed"
    assert explain({"type": "value_error", "msg": "x", "ctx": {"error": ValueError("must be odd")}}) == "must be odd"
