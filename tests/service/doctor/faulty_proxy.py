"""A reverse proxy over real sockets with the faults of real ones: buffering, limits, lost headers, a wrong clock."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime

import httpx
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tests.service.live_server import serve

_DROPPED = {"connection", "content-length", "transfer-encoding", "date", "host"}


@dataclass(frozen=True)
class FaultyProxy:
    """Passes requests on to a service.

    Attributes:
        target: URL of the service.
        prefix: Path below which it publishes the service, and which it strips.
        max_body_bytes: Of a request; over it: its own 413.
        skew_s: Added to each Date.
        blocked: Paths that it answers with its own 404.
        buffers: Whether it sends a response only once it has it whole.
        passes_host: Whether the service learns the Host that the client used.
    """

    target: str
    prefix: str = ""
    max_body_bytes: int | None = None
    skew_s: float = 0.0
    blocked: tuple[str, ...] = ()
    buffers: bool = False
    passes_host: bool = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        with contextlib.suppress(ClientDisconnect):
            async with httpx.AsyncClient(base_url=self.target, timeout=120) as client:
                response, source = await self._respond(request, client)
                try:
                    await response(scope, receive, send)
                finally:
                    if source is not None:
                        await source.aclose()

    async def _respond(self, request: Request, client: httpx.AsyncClient) -> tuple[Response, httpx.Response | None]:
        path = request.url.path
        if not path.startswith(self.prefix) or path.removeprefix(self.prefix) in self.blocked:
            return PlainTextResponse("nothing here", 404), None
        body = await request.body()
        if self.max_body_bytes is not None and len(body) > self.max_body_bytes:
            return PlainTextResponse("too large", 413), None
        headers = {name: value for name, value in request.headers.items() if name not in _DROPPED}
        if self.passes_host:
            headers["host"] = request.headers["host"]
        url = httpx.URL(path=path.removeprefix(self.prefix), query=request.url.query.encode())
        sent = client.build_request(request.method, url, headers=headers, content=body)
        source = await client.send(sent, stream=True)
        passed = {name: value for name, value in source.headers.items() if name not in _DROPPED}
        moment = parsedate_to_datetime(source.headers["date"]).timestamp() + self.skew_s
        passed["date"] = formatdate(moment, usegmt=True)
        if self.buffers:
            return Response(await source.aread(), source.status_code, passed), source
        return StreamingResponse(source.aiter_raw(), source.status_code, passed), source


@contextlib.contextmanager
def running_proxy(proxy: FaultyProxy) -> Iterator[str]:
    """Run a proxy until the block ends; yields its URL with the prefix."""
    config = uvicorn.Config(
        proxy, log_config=None, access_log=False, timeout_graceful_shutdown=5, date_header=False, server_header=False
    )
    with serve(config) as url:
        yield url + proxy.prefix
