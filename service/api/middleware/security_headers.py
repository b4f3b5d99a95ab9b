"""Security headers of every response, and the end of connections whose request body was not read.

A response that is sent before the whole body was read closes the connection; otherwise the server would receive the
rest of the body, however long. It first discards some more of the body, since a client that is still sending would
otherwise meet a connection reset instead of its response. The values of the headers are those of the OWASP REST
Security Cheat Sheet for an API; the pages /docs and /ui may load their own files.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from giantleap.service.api.paths import is_page_file, route_path
from giantleap.service.auth import DOCS_PATH, UI_PATH

Header = tuple[bytes, bytes]
_ALWAYS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)
_NOTHING = b"default-src 'none'; frame-ancestors 'none'"
# The page at /ui: its own files, the API, and pictures that it made or has just fetched.
_UI = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger UI sets styles of elements too.
_SWAGGER = _UI.replace(b"style-src 'self'", b"style-src 'self' 'unsafe-inline'")
_SHORT_BODY_DIGITS = 5  # less than 100 kB
_LINGER_S = 10.0  # longest time to discard the rest of a body
_SILENCE_S = 1.0  # longest wait for its next part
_PUBLIC = frozenset({DOCS_PATH, "/openapi.json"})
_RESPONSE_HEADERS = (
    *("Content-Disposition", "dtype", "Inference-Header-Content-Length", "Location", "Preference-Applied"),
    *("Retry-After", "Server-Timing", "shape", "WWW-Authenticate", "X-Decode", "X-Job-Id", "X-Method"),
    *("X-Request-Id", "X-Seed", "X-Warnings"),
)


class SecurityHeadersMiddleware:
    """Adds the headers to every response. A response may set Cache-Control and Cross-Origin-Resource-Policy itself.

    Args:
        app: The next ASGI application.
        origins: Sites whose pages may use what they receive (`Settings.cors_origins`).
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str] = ()) -> None:
        self.app = app
        self.origins = frozenset(origin.encode() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        unread = has_long_body(scope["headers"])
        allowed = any(name == b"origin" and value in self.origins for name, value in scope["headers"])
        added, defaults = headers_for(route_path(scope), allowed)

        async def receive_tracked() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                if unread:
                    added.append((b"connection", b"close"))
                headers = list(message.get("headers", ()))
                own = {name.lower() for name, _ in headers}
                unset = [header for header in defaults if header[0] not in own]
                message = {**message, "headers": [*headers, *added, *unset]}
            elif unread and message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _discard_body(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self.app(scope, receive_tracked if unread else receive, send_with_headers)


def headers_for(path: str, allowed: bool = False) -> tuple[list[Header], list[Header]]:
    """The headers of every response of a path, and those that a response may set itself.

    Args:
        path: Of the request, without a root path.
        allowed: Whether it comes from a site that may use what it receives.
    """
    defaults = [(b"cross-origin-resource-policy", b"cross-origin" if allowed else b"same-origin")]
    if path not in _PUBLIC:
        defaults.append((b"cache-control", b"no-store"))
    return [*_ALWAYS, (b"content-security-policy", _policy(path))], defaults


def _policy(path: str) -> bytes:
    if path in (UI_PATH, DOCS_PATH) or is_page_file(path):
        return _SWAGGER if path.startswith(DOCS_PATH) else _UI
    return _NOTHING


async def _discard_body(receive: Receive) -> None:
    """Receive and discard the rest of a body, for a limited time."""
    try:
        async with asyncio.timeout(_LINGER_S):
            while True:
                message = await asyncio.wait_for(receive(), _SILENCE_S)
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def has_long_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the body is of unknown length, or longer than is cheap to discard."""
    for name, value in headers:
        if name == b"transfer-encoding" or (name == b"content-length" and len(value) > _SHORT_BODY_DIGITS):
            return True
    return False


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Let pages of these sites call the service (CORS); without any, no page of another site may read a response.

    They may send any header: tracing and client libraries add headers of their own, and the service ignores those that
    it does not know.
    """
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            allow_private_network=True,  # browsers ask where the page is public and the service is not
            expose_headers=list(_RESPONSE_HEADERS),
            max_age=600,
        )
