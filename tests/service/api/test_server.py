"""What a client may send before its request is understood: so much, and no slower than so."""

import asyncio
import socket
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI, Request

from giantleap.service.api.server import HEAD_TIMEOUT_S, MAX_HEAD_BYTES, BoundedHttp
from tests.service.live_server import connect, live_server, read_response
from tests.waiting import wait_until


class Hasty(BoundedHttp):
    head_timeout_s = 0.2


def echo() -> FastAPI:
    app = FastAPI()

    @app.post("/echo")
    async def post_echo(request: Request) -> dict[str, int]:
        return {"body": len(await request.body()), "headers": len(request.headers)}

    return app


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live_server(echo(), http=BoundedHttp) as url:
        yield url


def read_to_end(client: socket.socket) -> bytes:
    response = b""
    try:
        while part := client.recv(65536):
            response += part
    except ConnectionResetError:  # closed while more was on its way
        pass
    return response


HEAD = b"POST /echo HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"POST /", b"a" * 4096),
        (HEAD + b"X-A: ", b"b" * 4096),
        (HEAD + b"X-", b"c" * 4096),
        (HEAD, b"X-A: b\r\n" * 512),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;x=", b"y" * 4096),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nz\r\n0\r\nX-A: ", b"b" * 4096),
    ],
    ids=["address", "value", "name", "many headers", "chunk extension", "trailer"],
)
def test_a_head_without_an_end_closes_the_connection(start: bytes, piece: bytes, url: str) -> None:
    with connect(url) as client:
        sent = 0
        try:
            client.sendall(start)
            while sent < 64 << 20:
                client.sendall(piece)
                sent += len(piece)
        except (ConnectionResetError, BrokenPipeError):
            pass
        response = read_to_end(client)
    assert sent < 64 << 20, "it was taken in for ever"
    assert response.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400")) or response == b""


def test_a_head_that_is_whole_and_over_the_limit_is_431(url: str) -> None:
    with connect(url) as client:
        client.sendall(HEAD + b"X-A: " + b"b" * 4 * MAX_HEAD_BYTES + b"\r\n\r\n")
        assert read_to_end(client).startswith(b"HTTP/1.1 431")


def test_large_bodies_and_many_requests_on_one_connection_pass(url: str) -> None:
    with httpx.Client(timeout=60) as client:
        for size in (0, 10, 5 << 20, 300_000):
            headers = {"X-Long": "x" * 60_000}
            response = client.post(f"{url}/echo", content=bytes(size), headers=headers)
            assert response.status_code == 200 and response.json()["body"] == size
        pieces = (bytes(1000) for _ in range(2000))
        assert client.post(f"{url}/echo", content=pieces).json()["body"] == 2_000_000


def test_pipelined_requests_with_bodies_pass(url: str) -> None:
    one = HEAD + b"Content-Length: 100000\r\n\r\n" + bytes(100_000)
    last = HEAD + b"Connection: close\r\nContent-Length: 3\r\n\r\nabc"
    with connect(url) as client:
        client.sendall(one * 5 + last)
        response = read_to_end(client)
    assert response.count(b"HTTP/1.1 200") == 6 and response.count(b'"body":100000') == 5


@pytest.mark.parametrize("start", [b"", b"POST /echo HTT", HEAD, HEAD + b"X-A: b\r\n"])
def test_a_head_that_does_not_come_closes_the_connection(start: bytes) -> None:
    with live_server(echo(), http=Hasty) as url, connect(url) as client:
        client.sendall(start)
        assert read_to_end(client) == b""


def test_only_a_head_is_waited_for_by_the_clock() -> None:
    seen = []

    class Watched(BoundedHttp):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            seen.append(self)

    with live_server(echo(), http=Watched) as url, connect(url) as client:
        wait_until(lambda: seen and seen[0]._timer is not None)  # nothing has come yet
        for _ in range(2):
            client.sendall(HEAD + b"Content-Length: 3\r\n\r\na")
            wait_until(lambda: seen[0]._timer is None)  # a body may be slow
            client.sendall(b"bc")
            assert read_response(client).startswith(b"HTTP/1.1 200")
            assert seen[0]._timer is None  # so may the next request
            client.sendall(HEAD[:10])
            wait_until(lambda: seen[0]._timer is not None)
            client.sendall(HEAD[10:] + b"Content-Length: 0\r\n\r\n")
            assert read_response(client).startswith(b"HTTP/1.1 200")


def test_the_limit_of_time_is_minutes_for_people() -> None:
    assert HEAD_TIMEOUT_S >= 30
