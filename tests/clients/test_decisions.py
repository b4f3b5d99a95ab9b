"""What the client decides without a service: retries, errors, events, bodies, addresses and keys."""

import base64
import json
import re
import typing
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from giantleap.service.jobs.requests import GenerateRequest, UpscaleQuery
from giantleap_client import AsyncClient, Client, GiantleapError, InvalidRequest, JobFailed, RateLimited, Timeout
from giantleap_client.calls import cancel_call, events_call, generate_request, put_call, upscale_request
from giantleap_client.errors import from_problem, read_retry_after, to_error
from giantleap_client.events import Event, EventParser
from giantleap_client.flows import Deadline
from giantleap_client.options import GenerateOptions, UpscaleOptions
from giantleap_client.payloads import Result, to_body
from giantleap_client.retries import MAX_ATTEMPTS, Cut, choose_delay_s

JOB = "0b9c3a52-7a1e-4d4c-9b36-0f3a4a0f9a11"
KEY = "gl_a-secret-key"


def problem(status: int, code: str, **members: Any) -> GiantleapError:
    headers = {"retry-after": members.pop("after")} if "after" in members else {}
    body = {"status": status, "code": code, "detail": "what was wrong", "instance": "r-1"} | members
    return to_error(status, headers, json.dumps(body).encode(), JOB)


@pytest.mark.parametrize(
    ("fault", "attempt", "delays_s"),
    [
        (Cut("ReadError"), 0, (0.125, 0.25)),
        (Cut("ConnectError"), 3, (1.0, 2.0)),
        (Cut("ConnectError"), 8, (4.0, 8.0)),
        (Cut("ConnectError"), MAX_ATTEMPTS - 1, None),
        (problem(429, "queue_full", after="7"), 0, (7.0, 7.25)),
        (problem(503, "not_ready", after="1"), 500, (1.0, 1.25)),
        (problem(503, "storage_full"), 0, (0.125, 0.25)),
        (to_error(502, {}, b"<html>"), 1, (0.25, 0.5)),
        (to_error(504, {"retry-after": "2"}, b""), 1, (2.0, 2.25)),
        (to_error(500, {}, b""), 0, None),
        (problem(500, "engine_fault"), 0, None),
        (problem(504, "deadline_passed"), 0, None),
        (problem(422, "over_budget"), 0, None),
        (problem(401, "unauthorized"), 0, None),
        (to_error(301, {}, b""), 0, None),
    ],
)
def test_only_what_may_go_better_is_repeated(
    fault: Cut | GiantleapError, attempt: int, delays_s: tuple[float, float] | None
) -> None:
    assert [choose_delay_s(fault, attempt, dice) for dice in (0.0, 1.0)] == list(delays_s or (None, None))


@pytest.mark.parametrize(
    ("header", "seconds_s"),
    [
        ("7", 7.0),
        ("-1", 0.0),
        ("Mon, 30 Nov 2026 12:00:30 GMT", 30.0),
        ("Mon, 30 Nov 2026 11:00:00 GMT", 0.0),
        ("soon", None),
        ("nan", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds_s: float | None) -> None:
    assert read_retry_after(header, datetime(2026, 11, 30, 12, tzinfo=UTC)) == seconds_s


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (422, "invalid_request", InvalidRequest),
        (413, "payload_too_large", InvalidRequest),
        (422, "over_budget", InvalidRequest),
        (422, "blocked_by_filter", JobFailed),
        (429, "work_limited", RateLimited),
        (500, "engine_fault", JobFailed),
        (504, "deadline_passed", Timeout),
        (401, "unauthorized", GiantleapError),
        (404, "not_found", GiantleapError),
    ],
)
def test_an_error_has_the_type_of_its_code(status: int, code: str, kind: type[GiantleapError]) -> None:
    error = problem(status, code, errors=[{"field": "scale", "reason": "is 3"}])
    assert type(error) is kind
    assert (error.code, error.status, error.job_id, error.request_id) == (code, status, JOB, "r-1")
    assert error.fields == (("scale", "is 3"),)
    assert code in str(error) and JOB in str(error) and "r-1" in str(error)


def test_every_error_that_ended_a_job_is_a_failed_job() -> None:
    stored = {"code": "not_ready", "status": 503, "detail": "no device"}
    assert type(from_problem(stored, JOB, ended=True)) is JobFailed


@pytest.mark.parametrize("size_bytes", [1, 7, 1000])
def test_events_are_read_from_pieces_of_any_size(size_bytes: int) -> None:
    text = (
        b'retry: 2000\n\nid: 1-0\nevent: step\ndata: {"step":1}\n\n: heartbeat\n\n'
        b'id: 2-0\r\nevent: done\r\ndata: {"state":"succeeded"}\r\n\r\nid: 3-0\nevent: st'
    )
    parser = EventParser()
    pieces = [text[start : start + size_bytes] for start in range(0, len(text), size_bytes)]
    events = [event for piece in pieces for event in parser.feed(piece)]
    assert events == [Event("step", {"step": 1}, "1-0"), Event("done", {"state": "succeeded"}, "2-0")]


def test_the_options_are_the_fields_of_the_service() -> None:
    assert {"prompt", *GenerateOptions.__annotations__} == set(GenerateRequest.model_fields)
    assert set(UpscaleOptions.__annotations__) == set(UpscaleQuery.model_fields)
    assert typing.get_type_hints(UpscaleOptions)["output"] == typing.Literal["image", "latent"]


def test_a_put_names_wait_and_deadline_in_whole_seconds() -> None:
    request = generate_request("a", scale=2)
    assert json.loads(request.content) == {"prompt": "a", "scale": 2}
    headers = put_call(request, JOB, wait_s=20.9, cancel_after_s=30.2).headers
    assert (headers["Prefer"], headers["Cancel-After"]) == ("wait=20", "31")
    assert put_call(request, JOB, wait_s=0.5).headers["Prefer"] == "respond-async"
    assert "Cancel-After" not in put_call(request, JOB).headers
    assert put_call(request, JOB, cancel_after_s=1e9).headers["Cancel-After"] == "604800"
    assert events_call(JOB, "5-0").headers == {"Last-Event-ID": "5-0"} and not events_call(JOB, "").headers
    assert (cancel_call(JOB).method, cancel_call(JOB).path) == ("POST", f"jobs/{JOB}/cancel")


def test_a_prompt_is_sent_in_a_form_and_never_shown() -> None:
    request = upscale_request(b"\xff\xd8\xff", prompt="a secret idea", refine_steps=4, scaled=True)
    assert request.content_type.startswith("multipart/form-data") and not request.params
    assert b"a secret idea" in request.content and b"\r\ntrue\r\n" in request.content
    assert "secret" not in repr(request) and "secret" not in repr(put_call(request, JOB))
    assert "secret" not in repr(generate_request("a secret idea"))


def test_bodies_say_what_they_hold() -> None:
    latent = np.zeros((4, 2, 2))
    assert to_body(latent.astype(np.float16))[1] == "application/x-npy"
    assert to_body(latent) == to_body(latent.astype(np.float32))
    assert to_body(torch.zeros(4, 2, 2, dtype=torch.bfloat16))[1] == "application/x-safetensors"
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    image = to_body(Image.fromarray(pixels))
    assert image[1] == "image/png" and image == to_body(pixels)
    assert image == to_body(torch.from_numpy(pixels).permute(2, 0, 1))
    for source, what in (
        (np.zeros((4, 2, 2), int), "int64"),
        (torch.zeros(4, dtype=torch.int8), "int8"),
        (Image.new("CMYK", (2, 2)), "CMYK"),
        (7, "builtins.int"),
    ):
        with pytest.raises(TypeError, match=what):
            to_body(source)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="init_image is a latent"):
        generate_request("a", init_image=latent)
    body = json.loads(generate_request("a", mask=pixels[..., 0], images=[pixels, pixels]).content)
    assert body["images"] == [base64.b64encode(image[0]).decode()] * 2 and body["mask"].startswith("iVBORw0KGgo")


def test_an_image_is_sent_upright_as_its_file_is_read() -> None:
    image = Image.new("RGB", (4, 2))
    image.getexif()[0x0112] = 6
    content, _ = to_body(image)
    assert Result((content,), {"results": [{"content_type": "image/png"}]}).image().size == (2, 4)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_no_key_and_no_password_is_ever_shown(kind: type[Client] | type[AsyncClient]) -> None:
    assert KEY not in repr(kind("http://127.0.0.1:9", KEY)) + str(vars(kind("http://127.0.0.1:9", KEY)))
    for url, key in (
        ("http://127.0.0.1:9", f"{KEY}\n"),
        ("http://127.0.0.1:9", f"{KEY} é"),
        ("http://me:word@127.0.0.1:9", KEY),
        ("127.0.0.1:9", KEY),
        ("http://", KEY),
        ("http://127.0.0.1:none", KEY),
        ("http://127.0.0.1:99999", KEY),
        ("http://[::1", KEY),
        ("http://two..dots", KEY),
        (f"http://{'a' * 64}.org", KEY),
    ):
        with pytest.raises(ValueError, match=re.compile("api_key|url")) as refused:
            kind(url, key)
        assert KEY not in str(refused.value) and "word@" not in str(refused.value)


@pytest.mark.parametrize("job_id", ["", "7", "../models", JOB.upper(), f"{JOB}/cancel", f"{JOB}\n"])
def test_only_a_uuid_names_a_job(job_id: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="not a UUID"):
            kind("http://127.0.0.1:9").job(job_id)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_wait_without_an_end_is_refused(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="finite number of seconds"):
        Deadline.after(timeout_s)


def test_a_service_that_is_away_is_unreachable_or_too_late() -> None:
    with Client("http://127.0.0.1:9", KEY, timeout_s=0.5) as client, pytest.raises(Timeout) as missed:
        client.submit(generate_request("a secret idea"), job_id=JOB)
    assert (missed.value.code, missed.value.job_id) == ("timeout", JOB)
    assert KEY not in repr(missed.value) and "secret" not in str(missed.value)
