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
from giantleap.service.errors import QueueFull
from giantleap.service.jobqueue.admission.gate import Permit
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
    _refused = False  # the current request was answered from its head
    _permit: Permit | None = None  # of the current request
    _is_idle = True  # between two requests
    _held = b""  # start of a request that waits for this decision:
    _awaited: "asyncio.Future[Permit | QueueFull] | None" = None
    _known: Permit | QueueFull | None = None  # the decision that the current request has waited for
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
        """Stop the timer and release the permit."""
        self._stop_timer()
        self._release_permit()
        if self._awaited is not None:
            self._awaited.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what was received, unless the request must wait; close the connection if its head is too large."""
        if not self._hold(data):
            self._read(data)

    def _read(self, data: bytes) -> None:
        self._pending_bytes += len(data)
        super().data_received(data)  # calls the methods below
        if self._pending_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            if not self._has_pending_response():
                self.transport.write(_REFUSAL)
            self.transport.close()

    def on_message_begin(self) -> None:
        """Start the timer of the next head, unless it runs."""
        super().on_message_begin()
        self._is_idle = False
        if self._timer is None:
            self._start_timer()

    def on_headers_complete(self) -> None:
        """The head is complete: start the request, unless the head comes again without its offer."""
        self._pending_bytes = 0
        self._stop_timer()
        if self.parser.should_upgrade():
            return
        answer = self._respond_early()
        self._refused = isinstance(answer, bytes)
        if isinstance(answer, bytes):
            self.transport.write(answer)
            self._start_timer()  # of the rest of the body, which is discarded
        else:
            if answer is not None:
                self._permit = self.scope["state"]["permit"] = answer
            super().on_headers_complete()
        self.headers = []  # for the fields of a trailer, which must not become headers (RFC 9110, 6.5.1)

    def on_body(self, body: bytes) -> None:
        """Part of the body is complete."""
        self._pending_bytes = 0
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is complete, unless it is not yet known that there is one."""
        self._is_idle = not self.parser.should_upgrade()
        if self._refused:
            self._stop_timer()
            self.on_response_complete()
        elif not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The response was sent: release the permit, if nothing else did."""
        self._release_permit()
        super().on_response_complete()

    def _release_permit(self) -> None:
        if self._permit is not None:
            self._permit.release()
            self._permit = None

    def _hold(self, data: bytes) -> bool:
        """Buffer the start of a request for a new job that must wait for a decision; False if it need not."""
        if self._held:  # the transport may deliver once more after it was paused
            self._held += data
            return True
        if self.early_refusal is None or not self._is_idle or self._has_pending_response():
            return False
        self._awaited = self.early_refusal.wait(data)
        if self._awaited is None:
            return False
        self._held = data
        self.flow.pause_reading()
        self._awaited.add_done_callback(self._resume)
        return True

    def _resume(self, awaited: "asyncio.Future[Permit | QueueFull]") -> None:
        """Parse the buffered request with its decision."""
        if awaited.cancelled():
            return
        self._known = awaited.result()
        self._read_held()
        if isinstance(self._known, Permit):  # not taken over: the head is incomplete, or the middlewares decide
            self._known.release()
        self._known = None

    def _read_held(self) -> None:
        held, self._held = self._held, b""
        if held and not self.transport.is_closing():
            self.flow.resume_reading()
            self._read(held)

    def shutdown(self) -> None:
        """Close the connection after the responses to what it has received."""
        if self._held and self._awaited is not None:
            self._awaited.cancel()
            self._read_held()
        super().shutdown()

    def _has_pending_response(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _respond_early(self) -> bytes | Permit | None:
        """Ask for an early response, on a keep-alive connection with no other response pending."""
        if self.early_refusal is None or self.parser.get_method() != b"POST":
            return None
        if self.expect_100_continue or self.parser.get_http_version() != "1.1" or not self.parser.should_keep_alive():
            return None
        if self._has_pending_response():
            return None
        known, self._known = self._known, None
        return self.early_refusal.respond(self.url, self.headers, self.server_state.default_headers, known)

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
