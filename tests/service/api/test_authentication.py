"""The door: who gets in with which key, whose jobs a caller sees on every route, and what every answer carries."""

import http.client
import json
import re
import socket
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from giantleap.service.api.middleware.authentication import MAX_HEADER_BYTES, MAX_HEADERS
from giantleap.service.auth import OPEN_PATHS, new_key
from giantleap.service.errors import OverBudget, WorkLimited
from giantleap.service.jobs.grid import Charge
from giantleap.service.jobs.job import GenerateParams, JobEvent, JobState
from tests.service.compat_fakes import LATENT, FileProducer, build_app
from tests.service.fake_producer import stay_queued, succeed
from tests.service.jobs.test_images import PNG
from tests.service.live_server import live_server

PROMPT = "a red sphere on a green floor"
SCOPES = {
    "alice": ["generate", "upscale"],
    "bob": ["generate", "upscale"],
    "drawer": ["generate"],
    "enlarger": ["upscale"],
    "root": ["admin"],
    "scraper": ["metrics"],
    "slow": ["generate", "upscale"],
}
SAFETENSORS = {"Content-Type": "application/x-safetensors"}
TENSOR = {"Content-Type": "tensor/binary"}
INFER: dict[str, Any] = {
    "inputs": [{"name": "latent", "shape": list(LATENT.shape), "datatype": "FP32", "data": LATENT.ravel().tolist()}]
}
# One request for work on each front: its scope, its path, and what is sent.
WORK: dict[str, tuple[str, str, dict[str, Any]]] = {
    "generate": ("generate", "/generate", {"json": {"prompt": PROMPT}}),
    "openai": ("generate", "/v1/images/generations", {"json": {"prompt": PROMPT}}),
    "openai stream": ("generate", "/v1/images/generations", {"json": {"prompt": PROMPT, "stream": True}}),
    "openai edit": ("generate", "/v1/images/edits", {"data": {"prompt": PROMPT}, "files": {"image": PNG}}),
    "upscale": ("upscale", "/upscale", {"content": b"not a latent", "headers": SAFETENSORS}),
    "kserve": ("upscale", "/v2/models/paper/infer", {"json": INFER}),
    "remote vae": (
        "upscale",
        "/remote_vae/paper/decode?shape=1&shape=16&shape=4&shape=6&dtype=float32&do_scaling=false&image_format=png",
        {"content": LATENT.tobytes(), "headers": TENSOR},
    ),
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    """Each caller's key, and the file that holds their digests."""
    made, lines = {}, []
    for name, scopes in SCOPES.items():
        made[name], digest = new_key()
        lines.append(f'[[key]]\nname = "{name}"\nsha256 = "{digest}"\nscopes = {json.dumps(scopes)}')
        lines.append("requests_per_minute = 2\nmax_jobs = 1\nmegapixel_steps_per_minute = 50" if name == "slow" else "")
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return made, path


@pytest.fixture
def producer() -> FileProducer:
    return FileProducer()


@pytest.fixture
def app(producer: FileProducer, bundle_dirs: tuple[Path, ...], keys: tuple[dict[str, str], Path]) -> FastAPI:
    return build_app(producer, bundle_dirs, api_keys_file=keys[1])


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        yield client


class Callers:
    """Asks in somebody's name."""

    def __init__(self, client: httpx.AsyncClient, keys: dict[str, str]) -> None:
        self.client, self.keys = client, keys

    async def ask(self, name: str, method: str, path: str, **sent: Any) -> httpx.Response:
        headers = sent.pop("headers", {}) | {"Authorization": f"Bearer {self.keys[name]}"}
        return await self.client.request(method, path, headers=headers, **sent)


@pytest.fixture
def callers(client: httpx.AsyncClient, keys: tuple[dict[str, str], Path]) -> Callers:
    return Callers(client, keys[0])


def assert_refused(response: httpx.Response, path: str, status: int, code: str) -> None:
    """The refusal speaks the protocol of its path."""
    assert response.status_code == status, response.text
    body = response.json()
    if path.startswith("/v1"):
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}[status]
        assert (body["error"]["code"], body["error"]["type"]) == (code, kind)
    elif path.startswith("/v2"):
        assert set(body) == {"error"} and isinstance(body["error"], str)
    elif path.startswith("/remote_vae"):
        assert body["code"] == code
    else:
        assert response.headers["content-type"] == "application/problem+json"
        assert (body["code"], body["status"]) == (code, status)


@pytest.mark.parametrize("work", WORK)
async def test_work_without_a_key_is_refused_in_the_form_of_its_front(
    work: str, client: httpx.AsyncClient, producer: FileProducer
) -> None:
    _, path, sent = WORK[work]
    for headers in ({}, {"Authorization": "Bearer gl_wrong"}, {"Authorization": "Basic YTpi"}, {"X-API-Key": ""}):
        response = await client.post(path, **sent | {"headers": sent.get("headers", {}) | headers})
        assert_refused(response, path, 401, "unauthorized")
        assert response.headers["www-authenticate"].startswith("Bearer")
        assert "gl_wrong" not in response.text
    assert not producer.records


async def test_every_route_but_the_open_ones_asks_for_a_key(app: FastAPI, client: httpx.AsyncClient) -> None:
    paths = app.openapi()["paths"]
    assert len(paths) > 15
    for path, operations in paths.items():
        for method, operation in operations.items():
            requested = path.format(job_id=uuid.uuid4(), model="paper", bundle="paper")
            response = await client.request(method, requested)
            assert (response.status_code == 401) == (path not in OPEN_PATHS), (method, path, response.status_code)
            assert ("security" in operation) == (path not in OPEN_PATHS)
    for path in ("/ui/a/b", "/nothing", "/livez/", "/redoc", "/docs/a/b", "/LIVEZ"):
        assert (await client.get(path)).status_code == 401, path


@pytest.mark.parametrize(
    "path", ["/models", "//livez", "/jobs/../livez", "/livez/../models", "/livez;/models", "/%6codels"]
)
def test_no_spelling_of_a_path_leads_past_the_door(path: str, live: tuple[FileProducer, str, dict[str, str]]) -> None:
    connection = http.client.HTTPConnection(live[1].removeprefix("http://"), timeout=60)  # sends paths as they are
    connection.request("GET", path)
    assert connection.getresponse().status == 401
    connection.close()


@pytest.mark.parametrize("work", WORK)
async def test_work_needs_its_scope(work: str, callers: Callers, producer: FileProducer) -> None:
    scope, path, sent = WORK[work]
    for name, scopes in SCOPES.items():
        if scope in scopes or name == "slow":
            continue
        response = await callers.ask(name, "POST", path, **sent)
        assert_refused(response, path, 403, "forbidden")
        assert 'error="insufficient_scope"' in response.headers["www-authenticate"]
    assert not producer.records
    if work != "upscale":  # what is sent there is no latent
        allowed = {"generate": "drawer", "upscale": "enlarger"}[scope]
        response = await callers.ask(allowed, "POST", path, **sent)
        assert response.status_code == 200, response.text
        assert [job.owner for job in producer.jobs] == [allowed]


async def test_the_kind_of_the_job_decides_where_the_path_does_not(callers: Callers, producer: FileProducer) -> None:
    # As a route would that makes jobs of both kinds: the check before the queue knows the job itself.
    from giantleap.service.api.submission import SubmitOptions, submit_job
    from giantleap.service.auth import Caller, Scope
    from giantleap.service.errors import Forbidden

    await callers.ask("alice", "POST", "/generate", json={"prompt": PROMPT})
    (job,) = producer.jobs
    request: Any = type(
        "Request", (), {"state": type("State", (), {"caller": Caller("x", frozenset({Scope.UPSCALE}))})}
    )
    unused: Any = None
    with pytest.raises(Forbidden):
        await submit_job(request, unused, job, None, SubmitOptions())


@pytest.mark.parametrize("path", ["/metrics", "/workers"])
async def test_metrics_and_workers_need_their_scope(path: str, callers: Callers) -> None:
    assert (await callers.ask("scraper", "GET", path)).status_code == 200
    for name in ("alice", "root"):
        assert_refused(await callers.ask(name, "GET", path), path, 403, "forbidden")


@pytest.mark.parametrize("name", ["X-API-Key", "x-api-key", "Authorization", "authorization"])
async def test_both_headers_carry_a_key(
    name: str, client: httpx.AsyncClient, keys: tuple[dict[str, str], Path]
) -> None:
    key = keys[0]["alice"]
    for value in (key, f"Bearer {key}", f"bearer  {key}"):
        fits = value.lower().startswith("bearer") == (name.lower() == "authorization")
        response = await client.get("/models", headers={name: value})
        assert response.status_code == (200 if fits else 401)


async def test_two_different_keys_are_refused(client: httpx.AsyncClient, keys: tuple[dict[str, str], Path]) -> None:
    alice, bob = keys[0]["alice"], keys[0]["bob"]
    both = {"Authorization": f"Bearer {alice}", "X-API-Key": bob}
    assert (await client.get("/models", headers=both)).status_code == 401
    assert (await client.get("/models", headers=both | {"X-API-Key": alice})).status_code == 200


def job_routes(app: FastAPI) -> list[tuple[str, str]]:
    """Every route about a job that exists, those that are added later too."""
    return [
        (method.upper(), path)
        for path, operations in app.openapi()["paths"].items()
        for method in operations
        if "{job_id}" in path and method != "put" and "dead-letters" not in path  # PUT makes a job; those are admins'
    ]


@pytest.mark.parametrize("queued", [True, False])
async def test_a_job_of_another_key_is_as_unknown_as_one_that_never_was(
    queued: bool, app: FastAPI, callers: Callers, producer: FileProducer
) -> None:
    if queued:
        producer.end = stay_queued
    posted = await callers.ask(
        "alice", "POST", "/generate", json={"prompt": PROMPT}, headers={"Prefer": "respond-async"}
    )
    assert posted.status_code == 202
    job_id = posted.json()["id"]
    producer.event_list = [JobEvent("1-0", "done", {"state": "succeeded"})]
    routes = job_routes(app)
    assert len(routes) >= 6 and ("GET", "/v1/images/{job_id}/content") in routes
    for method, path in routes:
        # A key with every scope but admin, one that only reads metrics; and the answer for a job that never was.
        for name in ("bob", "scraper"):
            theirs = await callers.ask(name, method, path.format(job_id=job_id))
            never = await callers.ask(name, method, path.format(job_id=uuid.uuid4()))
            assert theirs.status_code == never.status_code == 404, (method, path)
            bodies = [_without_ids(response) for response in (theirs, never)]
            assert bodies[0] == bodies[1], (method, path)
    assert producer.records[job_id].state is (JobState.QUEUED if queued else JobState.SUCCEEDED), "nothing was canceled"
    for name in ("root", "alice"):
        for method, path in routes:
            if method != "DELETE":
                response = await callers.ask(name, method, path.format(job_id=job_id))
                assert response.status_code in (200, 409), (name, method, path, response.text)
    assert (await callers.ask("alice", "DELETE", f"/jobs/{job_id}")).status_code == 204


def _without_ids(response: httpx.Response) -> tuple[Any, ...]:
    body = response.json()
    body.pop("instance", None)
    kept = {name: value for name, value in response.headers.items() if name not in ("x-request-id", "traceparent")}
    return body, kept


async def test_an_idempotency_key_does_not_lead_to_another_keys_job(callers: Callers, producer: FileProducer) -> None:
    ids = []
    for name in ("alice", "bob", "alice"):
        sent = {"json": {"prompt": PROMPT, "seed": 1}, "headers": {"Idempotency-Key": "same"}}
        ids.append((await callers.ask(name, "POST", "/generate", **sent)).json()["id"])
    assert ids[0] == ids[2] != ids[1] and len(producer.records) == 2


async def test_without_keys_everybody_may_do_everything(bundle_dirs: tuple[Path, ...], producer: FileProducer) -> None:
    app = build_app(producer, bundle_dirs)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        headers = {"Authorization": "Bearer none"}  # as the openai client sends one in any case
        job_id = (await client.post("/generate", json={"prompt": PROMPT}, headers=headers)).json()["id"]
        assert producer.jobs[0].owner == ""
        for path in (f"/jobs/{job_id}", "/metrics", "/models", f"/v1/images/{job_id}/content"):
            assert (await client.get(path)).status_code == 200


async def test_a_key_that_asks_too_fast_waits(callers: Callers, producer: FileProducer) -> None:
    for _ in range(2):
        assert (await callers.ask("slow", "POST", "/generate", json={"prompt": PROMPT})).status_code == 200
    for _, path, sent in WORK.values():
        response = await callers.ask("slow", "POST", path, **sent)
        assert_refused(response, path, 429, "rate_limited")
        assert response.headers["retry-after"] == "2"
    assert len(producer.records) == 2
    job_id = producer.jobs[0].id
    for method, path in (("GET", f"/jobs/{job_id}"), ("POST", f"/jobs/{job_id}/cancel"), ("GET", "/models")):
        assert (await callers.ask("slow", method, path)).status_code in (200, 409), "reading is free"
    assert (await callers.ask("alice", "POST", "/generate", json={"prompt": PROMPT})).status_code == 200


async def test_bad_requests_count_against_the_rate_too(callers: Callers) -> None:
    for status in (422, 422, 429):
        assert (await callers.ask("slow", "POST", "/generate", json={})).status_code == status


async def test_the_queue_gets_the_keys_own_limits(callers: Callers, producer: FileProducer) -> None:
    for name in ("slow", "alice"):
        await callers.ask(name, "POST", "/generate", json={"prompt": PROMPT})
        await callers.ask(name, "POST", "/v1/images/generations", json={"prompt": PROMPT})
    params = producer.jobs[0].params
    assert isinstance(params, GenerateParams) and (params.method, params.scale) == ("lua", 2)
    final_px = params.width_px * params.height_px
    charge = Charge(final_px + params.steps * final_px // 4, megapixel_steps_per_minute=50)
    assert producer.limits == [(1, charge), (1, charge), (None, None), (None, None)]


REFUSALS = [
    (WorkLimited("5 of 50", needed=5.5, per_minute=50, retry_after_s=7), 429, "7"),
    (OverBudget("90 of 50", needed=90.0, per_minute=50), 422, None),
]


@pytest.mark.parametrize(("refusal", "status", "retry_after"), REFUSALS, ids=["used up", "too large"])
async def test_a_refusal_of_work_names_the_amounts_and_a_wait_only_where_one_helps(
    callers: Callers, producer: FileProducer, refusal: WorkLimited, status: int, retry_after: str | None
) -> None:
    producer.refusal = refusal
    for path in ("/generate", "/v1/images/generations"):
        response = await callers.ask("alice", "POST", path, json={"prompt": PROMPT})
        assert response.status_code == status and response.headers.get("retry-after") == retry_after
        body = response.json()
        assert (body["error"] if path.startswith("/v1") else body)["code"] == refusal.code
    native = (await callers.ask("alice", "POST", "/generate", json={"prompt": PROMPT})).json()
    amounts = native["needed_megapixel_steps"], native["megapixel_steps_per_minute"]
    assert amounts == (refusal.needed, 50) and native["retryable"] == (status == 429)


@pytest.fixture(scope="module")
def live(
    bundle_dirs: tuple[Path, ...], keys: tuple[dict[str, str], Path]
) -> Iterator[tuple[FileProducer, str, dict[str, str]]]:
    producer = FileProducer()
    with live_server(build_app(producer, bundle_dirs, api_keys_file=keys[1])) as url:
        yield producer, url, keys[0]


def test_the_openai_client_draws_with_its_key_and_says_why_not(live: tuple[FileProducer, str, dict[str, str]]) -> None:
    _, url, keys = live

    def client(key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)

    with client(keys["alice"]) as alice:
        response = alice.images.generate(prompt=PROMPT, response_format="url")
        (image,) = response.data or []
        assert [model.id for model in alice.models.list()] == ["paper", "flux"]
    with client("gl_nobody") as nobody, pytest.raises(openai.AuthenticationError) as refused:
        nobody.images.generate(prompt=PROMPT)
    assert refused.value.code == "unauthorized"
    with client(keys["enlarger"]) as enlarger, pytest.raises(openai.PermissionDeniedError) as forbidden:
        enlarger.images.generate(prompt=PROMPT)
    assert forbidden.value.code == "forbidden"
    with client(keys["slow"]) as slow:
        for _ in range(2):
            slow.images.generate(prompt=PROMPT)
        with pytest.raises(openai.RateLimitError) as limited:
            slow.images.generate(prompt=PROMPT)
    assert limited.value.code == "rate_limited" and int(limited.value.response.headers["retry-after"]) >= 1
    # The file by URL needs the key too, and it must be the job's.
    statuses = {
        name: httpx.get(image.url or "", headers={"Authorization": f"Bearer {keys[name]}"}, timeout=60).status_code
        for name in ("alice", "bob", "root")
    }
    assert statuses == {"alice": 200, "bob": 404, "root": 200}
    assert httpx.get(image.url or "", timeout=60).status_code == 401


@pytest.mark.parametrize("head", ["Transfer-Encoding: chunked", "Content-Length: 99999999999"])
@pytest.mark.parametrize("path", ["/upscale", "/nothing"])
def test_a_refused_body_is_not_read_to_its_end(
    head: str, path: str, live: tuple[FileProducer, str, dict[str, str]]
) -> None:
    host, _, port = live[1].removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
        response = b""
        while part := client.recv(65536):  # ends only when the server closes; no byte of the body was sent
            response += part
    assert b"connection: close" in response.lower()
    assert response.startswith((b"HTTP/1.1 401", b"HTTP/1.1 413"))


SAFE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


async def test_every_answer_carries_the_safe_headers(callers: Callers, client: httpx.AsyncClient) -> None:
    job = (await callers.ask("alice", "POST", "/generate", json={"prompt": PROMPT})).json()
    responses = [
        await callers.ask("alice", "GET", path)
        for path in ("/models", job["status_url"], job["result_url"], f"/v1/images/{job['id']}/content", "/nothing")
    ]
    responses += [
        await callers.ask("alice", "POST", "/generate", content=b"{", headers={"Content-Type": "application/json"}),
        await callers.ask("alice", "POST", "/upscale", content=bytes(2 << 20)),
        await callers.ask("scraper", "GET", "/metrics"),
        await callers.ask("alice", "GET", job["events_url"]),
        await client.get("/models"),
        await client.get("/livez"),
        await client.request("BREW", "/generate"),
    ]
    assert {response.status_code for response in responses} == {200, 204, 400, 401, 404, 413}
    for response in responses:
        assert SAFE.items() <= dict(response.headers).items(), response.request.url
        assert len(response.headers.get_list("cache-control")) == 1


async def test_an_unexpected_fault_carries_them_too(client: httpx.AsyncClient, callers: Callers, app: FastAPI) -> None:
    app.state.giantleap = None
    response = await callers.ask("alice", "GET", "/models")
    assert response.status_code == 500 and SAFE.items() <= dict(response.headers).items()


async def test_the_page_of_the_documentation_may_load_what_it_needs(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")
    assert page.status_code == 200 and (await client.get("/openapi.json")).status_code == 200
    allowed = page.headers["content-security-policy"]
    assert "script-src 'self';" in allowed and "connect-src 'self'" in allowed and "http" not in allowed
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(sources) == 4 and all(source.startswith("docs/") for source in sources)
    for source in sources:
        file = await client.get(f"/{source}")
        assert (file.status_code, file.headers["content-security-policy"]) == (200, allowed), source
    assert (await client.get("/docs/nothing.js")).status_code == 404


async def test_too_many_or_too_long_headers_are_refused(callers: Callers) -> None:
    many = {f"X-Extra-{number}": "1" for number in range(MAX_HEADERS)}
    for path in ("/generate", "/v2/models/paper/infer"):
        for headers in (many, {"X-Long": "x" * MAX_HEADER_BYTES}):
            response = await callers.ask("alice", "POST", path, headers=headers, json={"prompt": PROMPT})
            assert response.status_code == 431, response.text
    few = {f"X-Extra-{number}": "1" for number in range(MAX_HEADERS - 20)}
    assert (await callers.ask("alice", "GET", "/models", headers=few)).status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "GZIP"])
async def test_a_compressed_body_is_refused(encoding: str, callers: Callers) -> None:
    sent = {"json": {"prompt": PROMPT}, "headers": {"Content-Encoding": encoding}}
    assert (await callers.ask("alice", "POST", "/generate", **sent)).status_code == 415
    sent["headers"] = {"Content-Encoding": "identity"}
    assert (await callers.ask("alice", "POST", "/generate", **sent)).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_a_page_of_another_site_may_not_act_through_a_visitors_browser(
    site: str, bundle_dirs: tuple[Path, ...], producer: FileProducer
) -> None:
    app = build_app(producer, bundle_dirs, cors_origins="https://app.example.org")
    producer.end = succeed
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        for origin, status in (("https://evil.example", 403), ("null", 403), ("https://app.example.org", 200)):
            headers = {"Sec-Fetch-Site": site, "Origin": origin}
            response = await client.post("/generate", json={"prompt": PROMPT}, headers=headers)
            assert response.status_code == status
            seen = response.headers.get("access-control-allow-origin")
            assert seen == (origin if status == 200 else None)
        requested = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        allowed = await client.options("/generate", headers={"Origin": "https://app.example.org"} | requested)
        assert (
            allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://app.example.org"
        )
        refused = await client.options("/generate", headers={"Origin": "https://evil.example"} | requested)
        assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
        own = await client.post("/generate", json={"prompt": PROMPT}, headers={"Sec-Fetch-Site": "same-origin"})
        assert own.status_code == 200
        job_id = own.json()["id"]
        assert (await client.delete(f"/jobs/{job_id}", headers={"Sec-Fetch-Site": site})).status_code == 403


async def test_over_plain_http_a_page_is_known_by_its_origin(
    bundle_dirs: tuple[Path, ...], producer: FileProducer
) -> None:
    """A browser says `Sec-Fetch-Site` only to https and to loopback; the origin of a post it says everywhere."""
    app = build_app(producer, bundle_dirs, cors_origins="https://app.example.org")
    producer.end = succeed
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap:8000") as client:
        for origin, status in (
            ("http://evil.example", 403),
            ("http://giantleap", 403),
            ("null", 403),
            ("http://giantleap:8000", 200),
            ("https://app.example.org", 200),
        ):
            response = await client.post("/generate", json={"prompt": PROMPT}, headers={"Origin": origin})
            assert response.status_code == status, origin
        assert (await client.get("/models", headers={"Origin": "http://evil.example"})).status_code == 200


async def test_a_page_that_may_call_may_send_every_header_of_a_route(
    bundle_dirs: tuple[Path, ...], producer: FileProducer
) -> None:
    app = build_app(producer, bundle_dirs, cors_origins="https://app.example.org")
    operations = [operation for path in app.openapi()["paths"].values() for operation in path.values()]
    described = [each for operation in operations for each in operation.get("parameters", ()) if each["in"] == "header"]
    requested = sorted({each["name"] for each in described} | {"authorization", "content-type", "x-api-key"})
    assert "cancel-after" in requested
    headers = {"Origin": "https://app.example.org", "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = ",".join(requested)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        assert (await client.options("/generate", headers=headers)).status_code == 200


async def test_no_site_is_allowed_unless_it_is_named(callers: Callers) -> None:
    response = await callers.ask("alice", "GET", "/models", headers={"Origin": "https://app.example.org"})
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", ["*", "https://*", "null", "https://a.example/path", "a.example", "file://"])
def test_an_origin_is_named_in_full(origins: str) -> None:
    from giantleap.service.settings import read_settings

    with pytest.raises(ValueError, match="a scheme, a host"):
        read_settings(cors_origins=origins)
