"""A request for a new job holds a permit until the queue has answered it, and releases it however it ends."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from giantleap.service.api.server import server_config
from giantleap.service.errors import QueueFull
from giantleap.service.jobqueue.admission.gate import Permit
from giantleap.service.settings import read_settings
from tests.service.compat_fakes import build_app
from tests.service.fake_producer import FakeProducer, OpenGate, stay_queued
from tests.service.live_server import connect, read_response, serve
from tests.waiting import wait_until

HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 15\r\n"
BODY = b'{"prompt": "a"}'
FULL = QueueFull("6 jobs are in the queue, 6 are allowed", retry_after_s=7)


class UnsureGate(OpenGate):
    """The gate of a queue of which nothing is known until `answer`; then it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.unsure = False
        self.waits: list[asyncio.Future[Permit | QueueFull]] = []

    def must_wait(self) -> bool:
        return self.unsure

    def wait(self) -> asyncio.Future[Permit | QueueFull]:
        self.waits.append(asyncio.get_running_loop().create_future())
        return self.waits[-1]

    def answer(self, refusal: QueueFull | None = None) -> None:
        """From any thread: everybody who waits passes, or is refused."""
        self.unsure = False
        waits, self.waits = self.waits, []
        for wait in waits:
            wait.get_loop().call_soon_threadsafe(self._answer, wait, refusal)

    def _answer(self, wait: asyncio.Future[Permit | QueueFull], refusal: QueueFull | None) -> None:
        if not wait.done():
            answer = refusal or self.try_admit()
            assert answer is not None
            wait.set_result(answer)


@pytest.fixture
def gate() -> UnsureGate:
    return UnsureGate()


@pytest.fixture
def producer(gate: UnsureGate) -> FakeProducer:
    return FakeProducer(gate=gate)


@pytest.fixture
def url(producer: FakeProducer, bundle_dirs: tuple[Path, ...]) -> Iterator[str]:
    with serve(server_config(build_app(producer, bundle_dirs), read_settings(bundle=bundle_dirs))) as url:
        yield url


def all_released(gate: UnsureGate) -> Callable[[], bool]:
    return lambda: gate.permits == 0 and gate.taken > 0


@contextmanager
def waiting_request(url: str, gate: UnsureGate, content: bytes) -> Iterator[socket.socket]:
    """A connection of which the request, so far `HEAD` and the content, waits for its decision."""
    gate.unsure = True
    with connect(url) as client:
        client.sendall(HEAD + content)
        wait_until(lambda: len(gate.waits) == 1, "the request waits")
        yield client


def post(url: str, content: bytes, **headers: str) -> httpx.Response:
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{url}/generate", content=content, headers=sent, timeout=60)


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (BODY, {}, 200),
        (BODY, {"Sec_Fetch_Site": "none"}, 200),
        (b"{", {}, 400),
        (b'{"prompt": "a", "width": 3}', {}, 422),
        (BODY, {"Content_Type": "text/plain"}, 415),
        (BODY, {"Prefer": "wait=x"}, 400),
    ],
    ids=["a job", "taken by the middleware", "no JSON", "no such size", "no such type", "a bad header"],
)
def test_a_permit_is_released(url: str, gate: UnsureGate, content: bytes, headers: dict[str, str], status: int) -> None:
    assert post(url, content, **headers).status_code == status
    wait_until(all_released(gate), "the permit is released")
    assert gate.taken == 1


def test_a_permit_is_released_when_the_queue_has_the_job(url: str, gate: UnsureGate, producer: FakeProducer) -> None:
    producer.end = stay_queued
    with connect(url) as client:
        client.sendall(HEAD + b"\r\n" + BODY)
        wait_until(lambda: producer.waits == 1, "the request waits for its job")
        assert gate.taken == 1 and gate.permits == 0


def test_a_permit_is_released_when_the_client_disconnects_within_its_body(url: str, gate: UnsureGate) -> None:
    with connect(url) as client:
        client.sendall(HEAD + b"\r\n" + BODY[:4])
        wait_until(lambda: gate.permits == 1, "the request has a permit")
    wait_until(all_released(gate), "the permit is released")
    assert gate.taken == 1


def test_a_request_waits_unread_until_it_may_pass(url: str, gate: UnsureGate, producer: FakeProducer) -> None:
    with waiting_request(url, gate, b"\r\n" + BODY[:4]) as client:
        client.sendall(BODY[4:])
        assert not producer.jobs
        gate.answer()
        assert read_response(client).startswith(b"HTTP/1.1 200 ")
        client.sendall(HEAD + b"\r\n" + BODY)
        assert read_response(client).startswith(b"HTTP/1.1 200 ")
    wait_until(all_released(gate), "both permits are released")
    assert len(producer.jobs) == 2


def test_a_request_that_waited_is_refused_when_the_queue_is_full(url: str, gate: UnsureGate) -> None:
    with waiting_request(url, gate, b"\r\n" + BODY) as client:
        gate.answer(FULL)
        response = read_response(client)
        assert response.startswith(b"HTTP/1.1 429 ") and b"\r\nretry-after: 7\r\n" in response
        client.sendall(HEAD + b"\r\n" + BODY)
        assert read_response(client).startswith(b"HTTP/1.1 200 ")
    assert gate.taken == 1


@pytest.mark.parametrize("more", [b"Idempotency-Key: k\r\n\r\n" + BODY, b"X-A: "], ids=["not new", "incomplete"])
def test_a_permit_that_the_early_refusal_cannot_use_is_released(
    url: str, gate: UnsureGate, producer: FakeProducer, more: bytes
) -> None:
    with waiting_request(url, gate, more) as client:
        gate.answer()
        wait_until(all_released(gate), "the permit is released")
        if more.endswith(b": "):
            client.sendall(b"b\r\n\r\n" + BODY)
        assert read_response(client).startswith(b"HTTP/1.1 200 ")
    assert len(producer.jobs) == 1


def test_a_client_that_disconnects_while_waiting_leaves_no_permit(url: str, gate: UnsureGate) -> None:
    with waiting_request(url, gate, b"\r\n" + BODY):
        pass
    gate.answer()
    wait_until(all_released(gate), "the permit is released")
    assert gate.taken == 1 and gate.permits == 0


def test_reading_does_not_wait(url: str, gate: UnsureGate) -> None:
    gate.unsure = True
    assert httpx.get(f"{url}/livez", timeout=60).status_code == 200
    assert httpx.post(f"{url}/jobs/none/cancel", timeout=60).status_code in (404, 422)
    assert not gate.waits


def test_what_waits_is_answered_when_the_server_stops(bundle_dirs: tuple[Path, ...], gate: UnsureGate) -> None:
    gate.unsure = True
    config = server_config(build_app(FakeProducer(gate=gate), bundle_dirs), read_settings(bundle=bundle_dirs))
    with serve(config) as url:
        client = connect(url)
        client.sendall(HEAD + b"\r\n" + BODY)
        wait_until(lambda: len(gate.waits) == 1, "the request waits")
        gate.unsure = False
    with client:
        assert client.recv(65536).startswith(b"HTTP/1.1 ")
