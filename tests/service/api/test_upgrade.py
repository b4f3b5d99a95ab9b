"""An offer of another protocol changes nothing: the body stays a body, and never becomes a request of its own."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request

from giantleap.service.api.server import BoundedHttp, server_config
from giantleap.service.settings import read_settings
from tests.service.compat_fakes import FileProducer, build_app
from tests.service.live_server import live_server, serve

METHODS = ("POST", "PUT", "PATCH", "DELETE", "GET", "OPTIONS")
OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
    "websocket": b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    "TLS": b"connection: upgrade\r\nupgrade: TLS/1.0, HTTP/1.1\r\n",
    "unknown": b"Upgrade: teleport/7\r\nConnection: UPGRADE\r\n",
    "several": b"Upgrade: h2c\r\nConnection: Upgrade\r\nUpgrade: websocket, x\r\nUpgrade:\r\n",
}
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"%x\r\n%s\r\n3\r\nabc\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)


class Seen(list[tuple[str, str, bytes]]):
    """Method, path and body of each request that reached the app."""


def record(seen: Seen) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.api_route("/{path:path}", methods=list(METHODS))
    async def answer(path: str, request: Request) -> dict[str, Any]:
        seen.append((request.method, f"/{path}", await request.body()))
        return {"body": len(seen[-1][2]), "headers": sorted({name for name, _ in request.headers.items()})}

    return app


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Seen]]:
    seen = Seen()
    with live_server(record(seen), http=BoundedHttp) as url:
        yield url, seen


def send(url: str, *segments: bytes) -> bytes:
    """Send each segment on its own, then read until the server closes."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number, segment in enumerate(segments):
            if number:
                time.sleep(0.02)  # else the kernel may join them
            client.sendall(segment)
        response = b""
        while part := client.recv(65536):
            response += part
    return response


def head(method: str, offer: bytes, framing: bytes, path: str = "/echo") -> bytes:
    return b"%s %s HTTP/1.1\r\nHost: x\r\n%s%s\r\n" % (method.encode(), path.encode(), offer, framing)


LAST = head("GET", b"Connection: close\r\n", b"", "/last")
FRAMINGS = {
    "length": (b"Content-Length: %d\r\n" % len(SMUGGLED), SMUGGLED, SMUGGLED),
    "chunked": (b"Transfer-Encoding: chunked\r\n", CHUNKED, SMUGGLED + b"abc"),
}


@pytest.mark.parametrize("cut", ["joined", "two segments", "three segments"])
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_request_with_an_offer_keeps_its_body_and_nothing_of_it_is_run(
    method: str, offer: str, framing: str, cut: str, server: tuple[str, Seen]
) -> None:
    url, seen = server
    seen.clear()
    field, sent, body = FRAMINGS[framing]
    start = head(method, OFFERS[offer], field)
    segments = {
        "joined": (start + sent + LAST,),
        "two segments": (start, sent + LAST),
        "three segments": (start[:40], start[40:] + sent[:20], sent[20:] + LAST),
    }[cut]
    response = send(url, *segments)
    assert seen == [(method, "/echo", body), ("GET", "/last", b"")]
    assert response.count(b"HTTP/1.1 200 OK") == 2 and b"101" not in response


@pytest.mark.parametrize("offer", OFFERS)
def test_a_request_that_comes_byte_by_byte_or_pipelined_is_read_the_same(offer: str, server: tuple[str, Seen]) -> None:
    url, seen = server
    seen.clear()
    one = head("POST", OFFERS[offer], FRAMINGS["length"][0]) + SMUGGLED
    send(url, one * 3 + LAST)
    assert seen == [("POST", "/echo", SMUGGLED)] * 3 + [("GET", "/last", b"")]
    seen.clear()
    parts = one + LAST
    send(url, *(parts[index : index + 16] for index in range(0, len(parts), 16)))
    assert seen == [("POST", "/echo", SMUGGLED), ("GET", "/last", b"")]


@pytest.mark.parametrize("offer", OFFERS)
def test_what_else_a_head_says_still_holds(offer: str, server: tuple[str, Seen]) -> None:
    url, seen = server
    seen.clear()
    length = FRAMINGS["length"][0]
    extra = b"X-Empty:\r\nX-Last: 1\r\nExpect: 100-continue\r\n"
    response = send(url, head("POST", OFFERS[offer], length + extra), SMUGGLED + LAST)
    assert response.startswith(b"HTTP/1.1 100 Continue") and b'"x-empty","x-last"' in response
    send(url, head("POST", OFFERS[offer], length, "http://x/echo?a=%20b") + SMUGGLED + LAST)
    assert seen == [("POST", "/echo", SMUGGLED), ("GET", "/last", b"")] * 2


@pytest.mark.parametrize("cut", ["joined", "two segments"])
@pytest.mark.parametrize("closing", ["HTTP/1.0", "close"])
def test_a_request_that_is_to_close_the_connection_is_answered_and_the_last(
    closing: str, cut: str, server: tuple[str, Seen]
) -> None:
    url, seen = server
    seen.clear()
    start = head("POST", b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n", FRAMINGS["length"][0])
    if closing == "HTTP/1.0":
        start = start.replace(b"close, ", b"").replace(b"HTTP/1.1", b"HTTP/1.0")
    response = send(url, start + SMUGGLED + LAST) if cut == "joined" else send(url, start, SMUGGLED)
    assert response.startswith(b"HTTP/1.1 200") and seen == [("POST", "/echo", SMUGGLED)]


def test_thousands_of_offers_in_one_segment_are_read(server: tuple[str, Seen]) -> None:
    url, seen = server
    seen.clear()
    send(url, head("GET", OFFERS["h2c"], b"") * 2000 + LAST)
    assert len(seen) == 2001


@pytest.mark.parametrize("offer", [b"", *OFFERS.values()], ids=["none", *OFFERS])
def test_a_body_whose_length_is_not_clear_is_refused_and_the_connection_closed(
    offer: bytes, server: tuple[str, Seen]
) -> None:
    url, seen = server
    for framing in (
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        b"Content-Length: 4\r\nContent-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Content-Length: +4\r\n",
        b"Content-Length: 4, 4\r\n",
        b"Content-Length: 0x4\r\n",
        b"Content-Length:\r\n",
        b"Content-Length : 4\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"X-A: b\nTransfer-Encoding: chunked\r\n",
        b"X-A: b\r\n Transfer-Encoding: chunked\r\n",
    ):
        seen.clear()
        response = send(url, head("POST", offer, framing) + b"0\r\n\r\n" + SMUGGLED)
        assert response.startswith(b"HTTP/1.1 400") and response.count(b"HTTP/1.1") == 1, framing
        assert seen == [], framing


@pytest.mark.parametrize("target", ["/echo", "example.org:443"])
def test_connect_is_refused_and_what_follows_is_not_run(target: str, server: tuple[str, Seen]) -> None:
    url, seen = server
    seen.clear()
    for segments in ((SMUGGLED,), (b"", SMUGGLED)):
        start = head("CONNECT", b"", b"Content-Length: %d\r\n" % len(SMUGGLED), target)
        response = send(url, start + segments[0])
        assert response.startswith(b"HTTP/1.1 400") and response.count(b"HTTP/1.1") == 1
    assert seen == []


def test_fields_of_a_trailer_are_no_headers(server: tuple[str, Seen]) -> None:
    url, seen = server
    for offer in (b"", b"Connection: Upgrade\r\n"):
        seen.clear()
        trailer = b"3\r\nabc\r\n0\r\nX-Api-Key: k\r\nUpgrade: h2c\r\n\r\n"
        response = send(url, head("POST", offer, b"Transfer-Encoding: chunked\r\n") + trailer + LAST)
        assert seen == [("POST", "/echo", b"abc"), ("GET", "/last", b"")]
        assert b"x-api-key" not in response and b'"upgrade"' not in response


@pytest.fixture(scope="module")
def service(bundle_dirs: tuple[Path, ...]) -> Iterator[str]:
    """The app as `giantleap api` serves it."""
    app = build_app(FileProducer(), bundle_dirs)
    with serve(server_config(app, read_settings(bundle=bundle_dirs))) as url:
        yield url


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed; the tests above send the same bytes")
@pytest.mark.parametrize("version", ["--http2", "--http1.1"])
def test_curl_draws_whichever_protocol_it_offers(version: str, service: str, tmp_path: Path) -> None:
    command = ["curl", "-sS", version, f"{service}/generate", "-H", "Content-Type: application/json"]
    for size in (1, 150):  # the second is sent in several segments
        body = tmp_path / "body.json"
        body.write_text(json.dumps({"prompt": "a cube"}) + " " * 1000 * size)
        ended = subprocess.run(
            [*command, "-d", f"@{body}", "-w", "\n%{http_code}"], capture_output=True, text=True, timeout=60, check=True
        )
        answer, _, status = ended.stdout.rpartition("\n")
        assert status == "200" and json.loads(answer)["status"] == "succeeded"


JAVA = """
import java.net.URI;
import java.net.http.*;

public class Client {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        String json = "{\\"prompt\\": \\"a cube\\"}";
        for (String body : new String[] {json, json + " ".repeat(500_000), json}) {
            for (String method : new String[] {"POST", "PUT"}) {
                String path = method.equals("POST") ? "/generate" : "/jobs/" + java.util.UUID.randomUUID();
                HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0] + path))
                    .header("Content-Type", "application/json")
                    .method(method, HttpRequest.BodyPublishers.ofString(body)).build();
                HttpResponse<String> response = client.send(request, HttpResponse.BodyHandlers.ofString());
                System.out.println(response.statusCode() + " " + response.version());
            }
        }
    }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="no JDK: apt-get install default-jdk-headless")
def test_the_client_of_the_jdk_draws_with_its_defaults(service: str, tmp_path: Path) -> None:
    (tmp_path / "Client.java").write_text(JAVA)
    ended = subprocess.run(
        ["java", str(tmp_path / "Client.java"), service], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split("\n")[:-1] == ["200 HTTP_1_1"] * 6
