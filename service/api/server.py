"""uvicorn's HTTP/1.1 protocol with a limit on the size of a request's head and on the time it may take.

The parser buffers a head until it is complete, and uvicorn sets no limit: one connection could fill the memory with a
single header, or stay open for ever. Requests that are read whole meet the stricter limits of
`giantleap.service.api.middleware.authentication`. A reverse proxy has such limits of its own.
"""

import asyncio
from asyncio.events import TimerHandle

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 128 << 10
HEAD_TIMEOUT_S = 60.0
_REFUSAL = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedHttp(HttpToolsProtocol):
    """One connection. It is closed when a head is too large, or not complete in `head_timeout_s`."""

    head_timeout_s = HEAD_TIMEOUT_S
    _pending_bytes = 0  # received since the parser last completed a head or a part of a body
    _timer: TimerHandle | None = None

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
        """The head is complete."""
        self._pending_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Part of the body is complete."""
        self._pending_bytes = 0
        super().on_body(body)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
