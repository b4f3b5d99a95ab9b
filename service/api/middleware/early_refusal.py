"""Refuses new jobs while the queue is full, from the head of the request alone.

`giantleap.service.api.server.BoundedHttp` writes the response before any middleware runs and before the body is read:
under overload nine of ten requests end here, and each must cost a small part of an accepted one. The response equals
that of the middlewares. Requests for which that is not certain, such as those with an unknown key or from a page of
another site, are left to them.

Requests that are not refused get their permit here. A request that must wait for one is not parsed meanwhile.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

from fastapi import FastAPI
from starlette.requests import Request

from giantleap.service.api.middleware.authentication import (
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    find_caller_of,
    scope_of,
)
from giantleap.service.api.middleware.request_context import read_request_id
from giantleap.service.api.middleware.security_headers import Header, has_long_body, headers_for
from giantleap.service.api.paths import route_path
from giantleap.service.api.problems import problem_response
from giantleap.service.auth import KeyRing, Scope, presented_keys, require_scope
from giantleap.service.errors import GiantleapError, QueueFull
from giantleap.service.jobqueue.admission.gate import Permit
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

_LOG_EVERY_S = 1.0
_LINE_BYTES = 1024  # of a request; a longer one is not for a new job
_ID = "0" * 32  # placeholder of the request id in a template
_CREATING = frozenset({Scope.GENERATE, Scope.UPSCALE})
# Requests with one of these headers are left to the middlewares: they may repeat a job, or fail for another reason.
_UNDECIDED = frozenset({b"idempotency-key", b"origin", b"sec-fetch-site", b"content-encoding"})


@dataclass(frozen=True, slots=True)
class _Template:
    """A response without its request id, the number of its bytes and the headers of the server."""

    head: bytes
    body: tuple[bytes, ...]
    route: str
    reason: str

    def to_bytes(self, request_id: str, more_headers: Sequence[Header]) -> bytes:
        encoded = request_id.encode()
        body = encoded.join(self.body)
        more = b"".join(b"%s: %s\r\n" % header for header in more_headers)
        return b"%s%scontent-length: %d\r\nx-request-id: %s\r\n\r\n%s" % (self.head, more, len(body), encoded, body)


class EarlyRefusal:
    """Refuses new jobs for one process, and counts and logs what it refused: one line a second, not one for each.

    Args:
        app: Knows the templates of its paths.
        keys: Valid keys; None: anyone may do anything.
        producer: The queue.
        metrics: Count the refusals.
        root_path: As in the settings.
        max_body_bytes: Longer bodies are refused for that.
    """

    def __init__(
        self,
        app: FastAPI,
        keys: KeyRing | None,
        producer: JobProducer,
        metrics: Metrics,
        *,
        root_path: str,
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._keys = keys
        self._gate = producer.gate
        self._metrics = metrics
        self._root_path = root_path
        self._max_body_bytes = max_body_bytes
        self._refusal: QueueFull | None = None
        self._templates: dict[str, _Template] = {}
        self._unlogged: Counter[str] = Counter()

    def wait(self, data: bytes) -> asyncio.Future[Permit | QueueFull] | None:
        """Return the decision to wait for before a request for a new job is parsed; None if there is none.

        Args:
            data: The start of the request.
        """
        if not self._gate.must_wait():
            return None
        method, _, rest = data[:_LINE_BYTES].partition(b" ")
        target, found, _ = rest.partition(b" ")
        if method != b"POST" or not found or scope_of("POST", self._path_of(target)) not in _CREATING:
            return None
        return self._gate.wait()

    def respond(
        self,
        target: bytes,
        headers: Sequence[Header],
        more_headers: Sequence[Header],
        known: Permit | QueueFull | None = None,
    ) -> bytes | Permit | None:
        """Refuse or admit a POST: the bytes of the response, a permit, or None if the middlewares decide.

        Args:
            target: The path and query of the request.
            headers: Of the request, with names in lower case.
            more_headers: What the server adds to every response.
            known: The decision, if the request has waited for it. A permit that is not returned is released.
        """
        started_s = time.perf_counter()
        path = self._path_of(target)
        scope = scope_of("POST", path)
        if scope not in _CREATING or not self._is_plain(target, headers) or not self._may(headers, scope):
            if isinstance(known, Permit):
                known.release()
            return None
        refusal = known or self._gate.try_admit()
        if not isinstance(refusal, QueueFull):
            return refusal
        template = self._template(refusal, path)
        given = next((value.decode("latin-1") for name, value in headers if name == b"x-request-id"), None)
        response = template.to_bytes(read_request_id(given), more_headers)
        self._metrics.count_rejection(template.reason)
        self._metrics.observe_http(template.route, "POST", refusal.status, time.perf_counter() - started_s)
        if not self._unlogged:
            asyncio.get_running_loop().call_later(_LOG_EVERY_S, self._log)
        self._unlogged[template.route] += 1
        return response

    def _path_of(self, target: bytes) -> str:
        return route_path({"path": target.partition(b"?")[0].decode("latin-1"), "root_path": self._root_path})

    def _is_plain(self, target: bytes, headers: Sequence[Header]) -> bool:
        """Whether nothing in the head is refused for another reason, and the body is cheap to discard."""
        size_bytes = len(target)
        for name, value in headers:
            if name in _UNDECIDED or (name == b"content-length" and int(value) > self._max_body_bytes):
                return False
            size_bytes += len(name) + len(value)
        return len(headers) <= MAX_HEADERS and size_bytes <= MAX_HEADER_BYTES and not has_long_body(headers)

    def _may(self, headers: Sequence[Header], scope: Scope) -> bool:
        """Whether the key, where one is needed, may make such a job: else the answer is 401 or 403."""
        if self._keys is None:
            return True
        try:
            require_scope(find_caller_of(self._keys, presented_keys(headers)), scope)
        except GiantleapError:
            return False
        return True

    def _template(self, refusal: QueueFull, path: str) -> _Template:
        if refusal is not self._refusal:
            self._refusal = refusal
            self._templates.clear()
        if path not in self._templates:
            request = Request({"type": "http", "method": "POST", "path": path, "headers": []})
            request.state.request_id = _ID
            response = problem_response(refusal, request)
            added, defaults = headers_for(path)
            own = [header for header in response.raw_headers if header[0] != b"content-length"]
            lines = b"".join(b"%s: %s\r\n" % header for header in (*own, *added, *defaults))
            status = HTTPStatus(response.status_code)
            self._templates[path] = _Template(
                b"HTTP/1.1 %d %s\r\n%s" % (status.value, status.phrase.encode(), lines),
                tuple(bytes(response.body).split(_ID.encode())),
                self._app.state.route_table().template(path),
                request.state.problem_code,
            )
        return self._templates[path]

    def _log(self) -> None:
        for route, refused in self._unlogged.items():
            log.info("new jobs refused unread", extra={"fields": {"route": route, "status": 429, "refused": refused}})
        self._unlogged.clear()
