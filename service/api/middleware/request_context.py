"""The context of every HTTP request: its id and trace, the limit of its body, unexpected errors, its metrics.

Pure ASGI: it neither buffers nor spawns a task, so streams and disconnects pass through untouched.
"""

import logging
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from giantleap.service.api.paths import route_path
from giantleap.service.api.problems import CLIENT_GONE, problem_response, unexpected
from giantleap.service.api.route_table import table_of
from giantleap.service.errors import PayloadTooLarge
from giantleap.service.telemetry.logs import log_fields
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.telemetry.tracing import RequestTrace, Tracing, trace_id_of

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})
# Polled every few seconds by machines: neither traced nor logged.
_QUIET = frozenset({"/livez", "/readyz", "/health", "/metrics"})


log = logging.getLogger(__name__)


class RequestContextMiddleware:
    """Runs once for each request, around everything but the security headers."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, metrics: Metrics, tracing: Tracing) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.metrics = metrics
        self.tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        request.state.request_id = read_request_id(request.headers.get("x-request-id"))
        recorded = route_path(scope) not in _QUIET
        with (
            self._opened(),
            self.tracing.request(request.method, request.headers.get("traceparent"), recorded) as trace,
            log_fields(request_id=request.state.request_id, trace_id=trace_id_of(trace.traceparent)),
        ):
            await self._run(request, receive, send, trace)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        self.metrics.open_http(1)
        try:
            yield
        finally:
            self.metrics.open_http(-1)

    async def _run(self, request: Request, receive: Receive, send: Send, trace: RequestTrace) -> None:
        scope, started_s = request.scope, time.perf_counter()
        id_header = (b"x-request-id", request.state.request_id.encode())
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                job_id = next((value for name, value in message.get("headers", ()) if name == b"x-job-id"), None)
                request.state.job_id = None if job_id is None else job_id.decode()
                message = {**message, "headers": [*message.get("headers", ()), id_header]}
            await send(message)

        try:
            declared = request.headers.get("content-length", "")
            if declared.isascii() and declared.isdigit() and int(declared[:20]) > self.max_body_bytes:
                await problem_response(self._too_large(), request)(scope, receive, send_with_id)
            else:
                await self.app(scope, self._counted(receive), send_with_id)
        except Exception as error:  # the API boundary: whatever no handler handles
            response = unexpected(error, request)
            if status:
                raise
            await response(scope, receive, send_with_id)
        finally:
            self._observe(request, status or CLIENT_GONE, time.perf_counter() - started_s, trace)

    def _observe(self, request: Request, status: int, duration_s: float, trace: RequestTrace) -> None:
        # The route's template, never the path, so that there are few labels; also of what was refused before routing.
        route = getattr(request.scope.get("route"), "path", None)
        if route is None:
            route = table_of(request).template(route_path(request.scope))
        method = request.method if request.method in _METHODS else "other"
        self.metrics.observe_http(route, method, status, duration_s)
        problem_code: str | None = getattr(request.state, "problem_code", None)
        if problem_code is not None:
            self.metrics.count_rejection(problem_code)
        job_id: str | None = getattr(request.state, "job_id", None)
        trace.end(method, route, status, job_id)
        if route_path(request.scope) not in _QUIET:
            fields = {"route": route, "method": method, "status": status, "duration_s": round(duration_s, 4)}
            log.info("request ended", extra={"fields": fields | ({} if job_id is None else {"job_id": job_id})})

    def _counted(self, receive: Receive) -> Receive:
        """Wrap `receive` so that a body without a length, or with a false one, fails at the limit."""
        received_bytes = 0

        async def receive_counted() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > self.max_body_bytes:
                raise self._too_large()
            return message

        return receive_counted

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is too large; send at most {self.max_body_bytes} bytes")


def read_request_id(header: str | None) -> str:
    """The client's X-Request-Id where it is short and plain, else a new one."""
    return header if header is not None and _REQUEST_ID.fullmatch(header) else uuid.uuid4().hex
