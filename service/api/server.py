"""uvicorn's HTTP/1.1 protocol with a bound on what a client may send before it is understood, and on how slowly.

The parser keeps a request's head until it is complete, and uvicorn 0.54 sets no limit to that: one connection could
fill the memory with a single header, or stay for ever. `giantleap.service.api.middleware.authentication` has the limits
that are told to clients in their own form; these are the wider ones behind which nothing is kept.
"""

import asyncio
from asyncio.events import TimerHandle

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 128 << 10
HEAD_TIMEOUT_S = 60.0
_REFUSAL = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedHttp(HttpToolsProtocol):
    """One connection. It is closed when its head is too large, or not complete in `HEAD_TIMEOUT_S`."""

    head_timeout_s = HEAD_TIMEOUT_S
    _unread_bytes = 0  # taken in since the parser last made something of it
    _head_bytes = 0
    _timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread_bytes += len(data)
        super().data_received(data)  # its callbacks below set the count back
        if self._unread_bytes > MAX_HEAD_BYTES or self._head_bytes > MAX_HEAD_BYTES:
            self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        if self._timer is None:
            self._await_head()

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._unread_bytes = 0
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES:
            return  # no more is kept; the connection ends when the bytes at hand are parsed
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unread_bytes = 0
        self._stop_timer()
        if self._head_bytes <= MAX_HEAD_BYTES:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread_bytes = 0
        if self._head_bytes <= MAX_HEAD_BYTES:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread_bytes = 0
        if self._head_bytes <= MAX_HEAD_BYTES:
            super().on_message_complete()

    def _refuse(self) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # else the answer before it is still being sent
            self.transport.write(_REFUSAL)
        self.transport.close()

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
