"""Who may pass: the layer between `giantleap.service.api.middleware.request_context` and the routes that asks for the
key of every request.

What has no key, may not do what it asks, comes too fast or from a page of another site is refused here, before its body
is read. Every path needs a key but those of `OPEN_PATHS`: a new route is closed until it is named there. That a job is
its owner's alone is not decided here but in `giantleap.service.api.submission`.
"""

import math
from collections.abc import Mapping

import redis.exceptions
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from giantleap.service.api.problems import problem_response
from giantleap.service.auth import ANONYMOUS, OPEN_PATHS, Caller, KeyRing, Scope, presented_keys, require_scope
from giantleap.service.errors import (
    Forbidden,
    GiantleapError,
    HeadersTooLarge,
    NotReady,
    PayloadTooLarge,
    RateLimited,
    Unauthorized,
    UnsupportedMediaType,
)
from giantleap.service.jobqueue.producer import JobProducer

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 << 10
MAX_JSON_PARTS = 16_384
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_CREATING = frozenset({"POST", "PUT"})


class AuthenticationMiddleware:
    """Names the caller of each request in `request.state.caller`, or answers in its stead.

    Args:
        keys: Those that are valid; None: everybody may do everything.
        origins: Sites whose pages may call (`Settings.cors_origins`).
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, producer: JobProducer, origins: tuple[str, ...]) -> None:
        self.app = app
        self.keys = keys
        self.producer = producer
        self.origins = frozenset(origins)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        try:
            check_headers(request)
            refuse_other_sites(request, self.origins)
            request.state.caller = await self._admit(request)
        except GiantleapError as error:
            await problem_response(error, request, challenge(error))(scope, receive, send)
        except (redis.exceptions.OutOfMemoryError, redis.exceptions.ReadOnlyError):
            refused = NotReady("the queue's store takes no writes at the moment; try again")
            await problem_response(refused, request)(scope, receive, send)
        else:
            await self.app(scope, bounded_json(request, receive), send)

    async def _admit(self, request: Request) -> Caller:
        path = path_of(request)
        if self.keys is None or path in OPEN_PATHS:
            return ANONYMOUS
        presented = presented_keys(request.scope["headers"])
        if len(presented) > 1:
            raise Unauthorized("the request carries different keys; send one, in Authorization or in X-API-Key")
        caller = self.keys.find(next(iter(presented), ""))
        if caller is None:
            raise Unauthorized(
                "the API key is not known" if presented else "send an API key: Authorization: Bearer KEY, or X-API-Key"
            )
        wanted = scope_of(request.method, path)
        if wanted is not None:
            require_scope(caller, wanted)
        if caller.requests_per_minute is not None and is_counted(request.method, path):
            wait_s = await self.producer.acquire_rate_limit(caller.name, caller.requests_per_minute)
            if wait_s > 0:
                raise RateLimited(
                    f"this key may send {caller.requests_per_minute} requests a minute; wait as Retry-After says",
                    retry_after_s=math.ceil(wait_s),
                )
        return caller


def path_of(request: Request) -> str:
    """The path as routes know it."""
    path: str = request.scope["path"]
    return path.removeprefix(request.scope.get("root_path", ""))


def scope_of(method: str, path: str) -> Scope | None:
    """What a path asks of its caller, known before the body is; jobs are asked again, by kind, when they are made."""
    if path == "/metrics":
        return Scope.METRICS
    if method == "POST" and path in ("/generate", "/v1/images/generations"):
        return Scope.GENERATE
    infers = path.startswith("/v2/models/") and path.endswith("/infer")
    if method == "POST" and (path == "/upscale" or path.startswith("/remote_vae/") or infers):
        return Scope.UPSCALE
    return None


def is_counted(method: str, path: str) -> bool:
    """Whether a request counts against its key's rate: those that ask for work do, reading and canceling is free."""
    return method in _CREATING and not path.endswith("/cancel")


def challenge(error: GiantleapError) -> Mapping[str, str]:
    """The WWW-Authenticate of a refusal (RFC 6750, section 3)."""
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": 'Bearer realm="giantleap"'}
    if isinstance(error, Forbidden) and error.scope is not None:
        return {"WWW-Authenticate": f'Bearer realm="giantleap", error="insufficient_scope", scope="{error.scope}"'}
    return {}


def check_headers(request: Request) -> None:
    """Raises:
    HeadersTooLarge: there are too many of them, or too many bytes, those of the address included.
    UnsupportedMediaType: the body is compressed, which would get past every limit of its size.
    """
    headers = request.scope["headers"]
    size_bytes = len(request.scope.get("raw_path") or b"") + len(request.scope["query_string"])
    size_bytes += sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size_bytes > MAX_HEADER_BYTES:
        raise HeadersTooLarge(
            f"{len(headers)} headers, with the address {size_bytes} bytes; {MAX_HEADERS} headers of "
            f"{MAX_HEADER_BYTES} bytes are allowed"
        )
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("the body is compressed; send it as it is")


def bounded_json(request: Request, receive: Receive) -> Receive:
    """`receive` that stops a JSON body of too many parts, which would take 50 times its size once parsed.

    Of the bodies that are JSON only KServe's hold many values; `giantleap.service.api.compat.kserve` has limits of its
    own.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].lower()
    if "json" not in media_type or path_of(request).endswith("/infer"):
        return receive
    parts = 0

    async def receive_counted() -> Message:
        nonlocal parts
        message = await receive()
        body = message.get("body", b"")
        # Inside a text they count too, but no text of a request is long and has many: base64 has none.
        parts += body.count(b",") + body.count(b"[") + body.count(b"{")
        if parts > MAX_JSON_PARTS:
            raise PayloadTooLarge(f"the JSON has more than the {MAX_JSON_PARTS} commas and brackets that are allowed")
        return message

    return receive_counted


def refuse_other_sites(request: Request, origins: frozenset[str]) -> None:
    """Keeps a page of another site from using the service through a visitor's browser, where it runs without keys.

    Browsers send `Sec-Fetch-Site` with each request to https or loopback, and `Origin` wherever a change is asked for;
    pages cannot alter them, other clients do not send them.

    Raises:
        Forbidden: a browser asks for a change on behalf of a site that is not among `origins`.
    """
    headers: Headers = request.headers
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is None and origin is not None:
        site = "same-origin" if origin.partition("://")[2] == headers.get("host") else "cross-site"
    if request.method in _READING or site in (None, "same-origin", "none"):
        return
    if origin not in origins:
        raise Forbidden("a page of another site may not call this service; GIANTLEAP_CORS_ORIGINS lists those that may")
