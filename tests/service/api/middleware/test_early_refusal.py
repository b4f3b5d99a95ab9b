"""While the queue is full a new job is refused from the head of its request, as the middlewares would refuse it."""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from giantleap.service.api.middleware import early_refusal
from giantleap.service.api.server import server_config
from giantleap.service.auth import new_key
from giantleap.service.errors import QueueFull
from giantleap.service.jobqueue.admission.gate import Permit
from giantleap.service.settings import read_settings
from tests.service.compat_fakes import build_app
from tests.service.fake_producer import FakeProducer, OpenGate
from tests.service.live_server import serve
from tests.waiting import wait_until

JSON = {"Content-Type": "application/json"}
PATHS = ("/generate", "/upscale?scale=2", "/v1/images/generations", "/v2/models/tiny/infer", "/remote_vae/sd/decode")
JOB_ID = "11111111-2222-4333-8444-555555555555"


class FullGate(OpenGate):
    """The gate of a full queue; counts what the middlewares ask, which is what was not refused earlier."""

    def __init__(self) -> None:
        super().__init__()
        self.refusal = QueueFull("6 jobs are in the queue, 6 are allowed", retry_after_s=7)
        self.admissions = 0

    def try_admit(self) -> Permit | QueueFull | None:
        return self.refusal

    async def admit(self) -> Permit | QueueFull:
        self.admissions += 1
        return self.refusal


@pytest.fixture
def gate() -> FullGate:
    return FullGate()


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """Keys by scope; the file is `tmp_path / "keys.toml"`."""
    made, lines = {}, []
    for scope in ("generate", "upscale"):
        made[scope], digest = new_key()
        lines.append(f'[[key]]\nname = "{scope}"\nsha256 = "{digest}"\nscopes = ["{scope}", "metrics"]\n')
    (tmp_path / "keys.toml").touch(mode=0o600)
    (tmp_path / "keys.toml").write_text("".join(lines))
    return made


@pytest.fixture
def url(request: pytest.FixtureRequest, gate: FullGate, bundle_dirs: tuple[Path, ...], tmp_path: Path) -> Iterator[str]:
    changes: dict[str, object] = dict(getattr(request, "param", {}))
    if "keys" in request.fixturenames:
        changes["api_keys_file"] = tmp_path / "keys.toml"
    app = build_app(FakeProducer(gate=gate), bundle_dirs, **changes)
    with serve(server_config(app, read_settings(bundle=bundle_dirs))) as url:
        yield url


def post(url: str, path: str, headers: dict[str, str]) -> httpx.Response:
    return httpx.post(url + path, content=b'{"prompt": "a"}', headers=JSON | headers, timeout=60)


@pytest.mark.parametrize("url", [{}, {"root_path": "/gl"}], indirect=True, ids=["at the root", "below a path"])
@pytest.mark.parametrize("path", PATHS)
def test_an_early_refusal_is_the_response_of_the_middlewares(url: str, gate: FullGate, path: str) -> None:
    early = post(url, path, {"X-Request-Id": "mine"})
    assert gate.admissions == 0
    late = post(url, path, {"X-Request-Id": "mine", "Sec-Fetch-Site": "none"})
    assert gate.admissions == 1
    assert (early.status_code, early.content) == (429, late.content)
    assert early.headers["Retry-After"] == "7" and early.headers["X-Request-Id"] == "mine"
    assert {name: value for name, value in early.headers.items() if name != "date"} == {
        name: value for name, value in late.headers.items() if name != "date"
    }


def test_every_refusal_has_an_id_of_its_own(url: str) -> None:
    first, second = (post(url, "/generate", {}) for _ in range(2))
    for response in (first, second):
        assert response.json()["instance"] == response.headers["X-Request-Id"]
        assert int(response.headers["Content-Length"]) == len(response.content)
    assert first.headers["X-Request-Id"] != second.headers["X-Request-Id"]


def read_responses(client: socket.socket, ends_with: bytes) -> bytes:
    received = b""
    while not received.endswith(ends_with):
        part = client.recv(65536)
        assert part, received
        received += part
    return received


def test_the_body_is_not_waited_for_and_the_connection_stays_in_use(url: str, gate: FullGate) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(head)
        assert read_responses(client, b"}").startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
        client.sendall(b'{"prompt": "a"}' + head + b'{"prompt": "a"}' + head)
        both = read_responses(client, b"}")
        while both.count(b"HTTP/1.1 429 ") < 2 or not both.endswith(b"}"):
            both += read_responses(client, b"}")
        client.sendall(b'{"prompt": "a"}GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n')
        answer = b""
        while part := client.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"HTTP/1.1 ") == 1
    assert gate.admissions == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"X-API-Key": "gl_unknown"}, 401),
        ({"X-API-Key": "upscale"}, 403),
        ({"X-API-Key": "generate"}, 429),
        ({"Authorization": "Bearer generate"}, 429),
    ],
)
def test_the_key_is_checked_first(
    keys: dict[str, str], url: str, gate: FullGate, headers: dict[str, str], status: int
) -> None:
    sent = {name: value.replace(scope, key) for name, value in headers.items() for scope, key in keys.items()
            if scope in value or value == "gl_unknown"}  # fmt: skip
    response = post(url, "/generate", sent)
    assert response.status_code == status and gate.admissions == 0
    assert ("WWW-Authenticate" in response.headers) == (status in (401, 403))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "https://other.example"}, 403),
        ({"Content-Encoding": "gzip"}, 415),
        ({f"X-{number}": "1" for number in range(101)}, 431),
        ({"X-Long": "1" * (32 << 10)}, 431),
    ],
)
def test_what_is_wrong_in_another_way_is_refused_for_that(url: str, headers: dict[str, str], status: int) -> None:
    assert post(url, "/generate", headers).status_code == status


def test_a_job_that_may_be_there_already_is_looked_up(url: str, gate: FullGate) -> None:
    assert post(url, "/generate", {"Idempotency-Key": "mine"}).status_code == 200
    put = httpx.put(f"{url}/jobs/{JOB_ID}", content=b'{"prompt": "a"}', headers=JSON, timeout=60)
    assert put.status_code == 200 and put.json()["id"] == JOB_ID
    assert httpx.get(f"{url}/jobs/{JOB_ID}", timeout=60).status_code == 200
    assert gate.admissions == 0


@pytest.mark.parametrize(("size_bytes", "status"), [(200_000, 429), (2 << 20, 413)])
def test_a_long_body_is_refused_on_a_connection_that_closes(url: str, size_bytes: int, status: int) -> None:
    response = httpx.post(f"{url}/upscale", content=bytes(size_bytes), timeout=60)
    assert response.status_code == status and response.headers["Connection"] == "close"


def test_refusals_are_counted_each_and_logged_together(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(early_refusal, "_LOG_EVERY_S", 0.5)
    with caplog.at_level(logging.INFO, "giantleap.service.api"):
        for path in ("/generate", "/generate", "/v2/models/tiny/infer"):
            assert post(url, path, {}).status_code == 429
        logged: list[dict[str, object]] = []

        def count_logged() -> bool:
            logged[:] = [vars(record)["fields"] for record in caplog.records if "unread" in record.message]
            return sum(int(str(fields["refused"])) for fields in logged) == 3

        wait_until(count_logged, "three refusals in the log")
    assert {fields["route"] for fields in logged} == {"/generate", "/v2/models/{model}/infer"}
    assert not [record for record in caplog.records if record.message == "request ended"]
    metrics = httpx.get(f"{url}/metrics", timeout=60).text
    assert 'giantleap_rejections_total{reason="queue_full"} 3.0' in metrics
    assert 'giantleap_http_requests_total{code="429",method="POST",route="/generate"} 2.0' in metrics


def test_the_document_in_a_compatible_form_holds_no_id(url: str) -> None:
    assert set(json.loads(post(url, "/v2/models/tiny/infer", {}).content)) == {"error"}
