"""The headers that every answer carries so that no browser, cache or other site makes more of it than it is.

The outermost layer: also what `giantleap.service.api.middleware.request_context` answers itself passes here. An answer
that comes before the whole body was read closes the connection, else the rest of that body, however long, would still
be taken in; but not at once: a client that is still sending would then meet a reset instead of its answer. The values
are those of the OWASP REST Security Cheat Sheet for an API; the page /docs loads Swagger UI and may do so.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ALWAYS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)
_NOTHING = b"default-src 'none'; frame-ancestors 'none'"
# FastAPI's page: its own inline script, Swagger UI from jsDelivr, an icon, and the document that it shows.
_SWAGGER = (
    b"default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src https://cdn.jsdelivr.net "
    b"'unsafe-inline'; img-src 'self' data: https://fastapi.tiangolo.com; connect-src 'self'; frame-ancestors 'none'"
)
_SHORT_BODY_DIGITS = 5  # less than 100 kB
_LINGER_S = 10.0  # at most, for the rest of a body that nobody wants
_SILENCE_S = 1.0  # and no longer than this for its next part
_PUBLIC = frozenset({"/docs", "/openapi.json"})
_ASK = (
    *("Accept", "Authorization", "Cancel-After", "Content-Type", "Idempotency-Key", "Inference-Header-Content-Length"),
    *("Last-Event-ID", "Prefer", "Traceparent", "X-API-Key", "X-Request-Id"),
)
_TELL = (
    *("dtype", "Inference-Header-Content-Length", "Location", "Preference-Applied", "Retry-After", "Server-Timing"),
    *("shape", "WWW-Authenticate", "X-Decode", "X-Job-Id", "X-Method", "X-Request-Id", "X-Seed", "X-Warnings"),
)


class SecurityHeadersMiddleware:
    """Adds the headers to every answer. A route may say itself how long its answer is kept; else nobody keeps it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        added = [*_ALWAYS, (b"content-security-policy", _SWAGGER if path == "/docs" else _NOTHING)]
        unread = _has_long_body(scope["headers"])

        async def receive_known() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def send_safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                if unread:
                    added.append((b"connection", b"close"))
                headers = list(message.get("headers", ()))
                said = any(name.lower() == b"cache-control" for name, _ in headers)
                kept = [] if said or path in _PUBLIC else [(b"cache-control", b"no-store")]
                message = {**message, "headers": [*headers, *added, *kept]}
            elif unread and message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _forget_body(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self.app(scope, receive_known if unread else receive, send_safe)


async def _forget_body(receive: Receive) -> None:
    """Takes in and drops what is left of a body, for a while."""
    try:
        async with asyncio.timeout(_LINGER_S):
            while True:
                message = await asyncio.wait_for(receive(), _SILENCE_S)
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _has_long_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the body is of unknown length, or longer than what is cheap to take in and forget."""
    for name, value in headers:
        if name == b"transfer-encoding" or (name == b"content-length" and len(value) > _SHORT_BODY_DIGITS):
            return True
    return False


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Lets pages of these sites call the service (CORS); none: no page of another site may read an answer."""
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=list(_ASK),
            expose_headers=list(_TELL),
            max_age=600,
        )
