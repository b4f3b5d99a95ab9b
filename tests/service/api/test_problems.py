"""Every error leaves the service as one problem document, with a request id and without anything of the inside."""

import json
import logging
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry
from pydantic import BaseModel

from giantleap.service.api.middleware.request_context import RequestContextMiddleware, read_request_id
from giantleap.service.api.problems import from_job_error, handle_errors
from giantleap.service.api.route_table import RouteTable
from giantleap.service.errors import Conflict, EngineFault, GiantleapError, InvalidFields, NotReady, QueueFull
from giantleap.service.jobs.job import JobError
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.telemetry.tracing import Tracing

SECRET = "a prompt that nobody else may read"


class Body(BaseModel):
    number: int


def build_app(metrics: Metrics) -> FastAPI:
    app = FastAPI()
    app.add_middleware(RequestContextMiddleware, max_body_bytes=1000, metrics=metrics, tracing=Tracing())
    app.state.route_table = cache(lambda: RouteTable.from_document(app.openapi()))
    handle_errors(app)
    errors: dict[str, Exception] = {
        "conflict": Conflict("running"),
        "full": QueueFull("full", retry_after_s=17),
        "plain-full": QueueFull("full"),
        "away": NotReady("Redis"),
        "fields": InvalidFields(*(("width", "is 3"), ("steps", "is 0"))),
        "bug": RuntimeError(SECRET),
    }

    @app.get("/raise/{name}")
    async def raise_it(name: str) -> None:
        raise errors[name]

    @app.post("/body")
    async def read_body(body: Body) -> int:
        return body.number

    @app.post("/stream")
    async def read_stream(request: Request) -> int:
        return len(await request.body())

    @app.get("/broken-stream")
    async def broken_stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first"
            raise RuntimeError(SECRET)

        return StreamingResponse(parts())

    return app


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture
def client(metrics: Metrics) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(build_app(metrics), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://giantleap")


def problem_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "code", "instance"} <= set(body)
    assert body["status"] == status and body["code"] == code and body["type"].endswith(code)
    assert body["instance"] == response.headers["x-request-id"]
    return body


async def test_own_errors_carry_their_status_and_code(client: httpx.AsyncClient) -> None:
    body = problem_of(await client.get("/raise/conflict"), 409, "conflict")
    assert body["detail"] == "running" and body["retryable"] is False


@pytest.mark.parametrize(
    ("name", "status", "code", "retry_after"),
    [
        ("full", 429, "queue_full", "17"),
        ("plain-full", 429, "queue_full", "5"),
        ("away", 503, "not_ready", "5"),
    ],
)
async def test_what_may_be_repeated_says_when(
    client: httpx.AsyncClient, name: str, status: int, code: str, retry_after: str
) -> None:
    response = await client.get(f"/raise/{name}")
    body = problem_of(response, status, code)
    assert response.headers["retry-after"] == retry_after and body["retryable"] is True
    assert SECRET not in response.text


async def test_field_errors_are_listed(client: httpx.AsyncClient) -> None:
    body = problem_of(await client.get("/raise/fields"), 422, "invalid_request")
    assert body["errors"] == [{"field": "width", "reason": "is 3"}, {"field": "steps", "reason": "is 0"}]


async def test_refused_values_are_not_repeated(client: httpx.AsyncClient) -> None:
    response = await client.post("/body", json={"number": SECRET})
    body = problem_of(response, 422, "invalid_request")
    assert [error["field"] for error in body["errors"]] == ["number"]
    assert SECRET not in response.text


@pytest.mark.parametrize("sent", [b"{", b"", b"[1", b'{"number": ' + b"9" * 900, b"\xff\xfe", b"[" * 999])
async def test_bodies_that_are_no_json_are_the_clients_fault(client: httpx.AsyncClient, sent: bytes) -> None:
    response = await client.post("/body", content=sent, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"


async def test_unknown_routes_and_methods_are_problems(client: httpx.AsyncClient) -> None:
    problem_of(await client.get("/nowhere"), 404, "not_found")
    response = await client.get("/body")
    problem_of(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


async def test_unexpected_errors_show_nothing_of_the_inside(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "giantleap.service.api.problems"):
        response = await client.get("/raise/bug", headers={"X-Request-Id": "find-me"})
    problem_of(response, 500, "internal_error")
    assert SECRET not in response.text and "RuntimeError" not in response.text
    (record,) = caplog.records
    assert "find-me" in record.getMessage() and "RuntimeError" in record.getMessage()
    assert SECRET not in record.getMessage() and not record.exc_info
    assert any("raise_it" in frame for frame in record.frames)  # type: ignore[attr-defined]


async def test_declared_length_over_the_limit_is_refused_before_a_byte_is_read(metrics: Metrics) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/stream",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-length", b"1001")],
    }
    await build_app(metrics)(scope, receive, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["code"] == "payload_too_large"


@pytest.mark.parametrize("path", ["/stream", "/body"])
async def test_body_without_a_length_is_stopped_at_the_limit(client: httpx.AsyncClient, path: str) -> None:
    sent_parts = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent_parts
        for _ in range(1000):
            sent_parts += 1
            yield b" " * 100

    response = await client.post(path, content=endless(), headers={"content-type": "application/json"})
    problem_of(response, 413, "payload_too_large")
    assert sent_parts <= 12


async def test_body_at_the_limit_is_read(client: httpx.AsyncClient) -> None:
    assert (await client.post("/stream", content=b" " * 1000)).json() == 1000


async def test_request_id_is_echoed_where_it_is_plain_and_made_where_not(client: httpx.AsyncClient) -> None:
    assert (await client.get("/nowhere", headers={"X-Request-Id": "a-1.B_2"})).headers["x-request-id"] == "a-1.B_2"
    for bad in ("x" * 65, "a b", "a\tb", "é", "", "<script>"):
        assert read_request_id(bad) != bad and len(read_request_id(bad)) == 32
    assert read_request_id(None) != read_request_id(None)


async def test_stream_that_breaks_is_cut_and_not_made_to_look_whole(metrics: Metrics) -> None:
    transport = httpx.ASGITransport(build_app(metrics))
    async with httpx.AsyncClient(transport=transport, base_url="http://giantleap") as client:
        with pytest.raises(RuntimeError):
            await client.get("/broken-stream")


async def test_requests_are_counted_by_route_template(client: httpx.AsyncClient, metrics: Metrics) -> None:
    for path in ("/raise/full", "/raise/conflict", "/nowhere", "/else/where"):
        await client.get(path)
    await client.request("BREW", "/nowhere")
    text = metrics.render(None).decode()
    assert 'giantleap_http_requests_total{code="429",method="GET",route="/raise/{name}"} 1.0' in text
    assert 'giantleap_http_requests_total{code="404",method="GET",route="none"} 2.0' in text
    assert 'giantleap_http_requests_total{code="404",method="other",route="none"} 1.0' in text
    assert 'giantleap_rejections_total{reason="queue_full"} 1.0' in text
    assert "where" not in text


def test_a_stored_error_comes_back_as_it_was() -> None:
    error = from_job_error(JobError("engine_fault", "out of memory", retryable=True))
    assert isinstance(error, EngineFault) and error.detail == "out of memory"
    unknown = from_job_error(JobError("strange", "details"))
    assert unknown.code == "job_failed" and "strange" in unknown.detail
    assert isinstance(unknown, GiantleapError)
