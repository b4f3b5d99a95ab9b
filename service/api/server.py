"""uvicorn's HTTP/1.1 protocol: no upgrade to another protocol, a limit on a request's head and on the time it takes.

The parser buffers a head until it is complete, and uvicorn sets no limit: one connection could fill the memory with a
single header, or stay open for ever. Requests that are read whole meet the stricter limits of
`giantleap.service.api.middleware.authentication`. A reverse proxy has such limits of its own.

A request may offer another protocol (`Upgrade: h2c` from every Java client); the server may ignore the offer (RFC 9110,
7.8). The parser believes that it was accepted: it drops the body, and whatever follows the head becomes the next
request. `Http1Parser` therefore reads such a head again without the offer.
"""

import asyncio
from array import array
from asyncio.events import TimerHandle
from typing import Any

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from giantleap.service.api.middleware.early_refusal import EarlyRefusal
from giantleap.service.settings import Settings

MAX_HEAD_BYTES = 128 << 10
HEAD_TIMEOUT_S = 60.0
_KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that no request meets one that is closing
_REFUSAL = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves the app."""
    proxies = settings.forwarded_allow_ips

    class Http(BoundedHttp):
        early_refusal = app.state.early_refusal

    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        http=Http,
        ws="none",
        forwarded_allow_ips="*" if "*" in proxies else list(proxies) or None,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_grace_s),
    )


class Http1Parser(httptools.HttpRequestParser):
    """Parses the requests of one connection as HTTP/1.1, whatever else they offer.

    Args:
        protocol: Receives the parts; `on_headers_complete` comes twice for a head with an offer.
    """

    def __init__(self, protocol: "BoundedHttp") -> None:
        self._protocol = protocol
        self._start()

    def _start(self) -> None:
        super().__init__(self._protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def feed_data(self, data: "bytes | bytearray | memoryview | array[int]") -> None:
        """Parse what was received.

        Raises:
            HttpParserError: It is not HTTP/1.1, or CONNECT, after which a proxy would expect a tunnel.
        """
        while True:
            try:
                super().feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self.get_method() == b"CONNECT":
                    raise httptools.HttpParserError("CONNECT is not supported") from upgrade
                (head_end,) = upgrade.args
                head = self._protocol.head_without_offer()
                self._start()  # after an offer the parser may take no more: of HTTP/1.0, or with `Connection: close`
                super().feed_data(head)
                data = memoryview(data)[head_end:]


class BoundedHttp(HttpToolsProtocol):
    """One connection. It is closed when a head is too large, or not complete in `head_timeout_s`."""

    head_timeout_s = HEAD_TIMEOUT_S
    early_refusal: EarlyRefusal | None = None
    _refused = False  # the request that is being read was answered from its head
    _pending_bytes = 0  # received since the parser last completed a head or a part of a body
    _timer: TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = Http1Parser(self)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer of the first head."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what was received; close the connection when a head is too large."""
        self._pending_bytes += len(data)
        super().data_received(data)  # calls the methods below
        if self._pending_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:  # else another response is still being sent
                self.transport.write(_REFUSAL)
            self.transport.close()

    def on_message_begin(self) -> None:
        """Start the timer of the next head, unless it runs."""
        super().on_message_begin()
        if self._timer is None:
            self._start_timer()

    def on_headers_complete(self) -> None:
        """The head is complete: start the request, unless the head comes again without its offer."""
        self._pending_bytes = 0
        self._stop_timer()
        if self.parser.should_upgrade():
            return
        refusal = self._find_refusal()
        self._refused = refusal is not None
        if refusal is None:
            super().on_headers_complete()
        else:
            self.transport.write(refusal)
            self._start_timer()  # of the rest of the body, which is discarded
        self.headers = []  # for the fields of a trailer, which must not become headers (RFC 9110, 6.5.1)

    def on_body(self, body: bytes) -> None:
        """Part of the body is complete."""
        self._pending_bytes = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is complete, unless it is not yet known that there is one."""
        if self._refused:
            self._stop_timer()
            self.on_response_complete()
        elif not self.parser.should_upgrade():
            super().on_message_complete()

    def _find_refusal(self) -> bytes | None:
        """The early refusal of a plain request on a connection that stays open and owes no other response."""
        if self.early_refusal is None or self.parser.get_method() != b"POST":
            return None
        if self.expect_100_continue or self.parser.get_http_version() != "1.1" or not self.parser.should_keep_alive():
            return None
        if self.cycle is not None and not self.cycle.response_complete:
            return None
        return self.early_refusal.respond(self.url, self.headers, self.server_state.default_headers)

    def head_without_offer(self) -> bytes:
        """The head that was read last, without its Upgrade headers."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"\r\n"])

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
