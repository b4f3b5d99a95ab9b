"""Refuses requests before their body is read: too large headers, other sites' pages, unknown keys, too many requests.

New jobs are refused there too while the queue is full, after the key was checked. Every path needs a key except those
of `giantleap.service.auth.OPEN_PATHS` and the files of the page. Whether a caller may see a job is decided in
`giantleap.service.api.dependencies.get_record`.
"""

import math
from collections.abc import Collection, Mapping

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from giantleap.service.api.paths import REMOTE_VAE_PATH, is_page_file, route_path
from giantleap.service.api.problems import problem_response
from giantleap.service.auth import (
    ANONYMOUS,
    OPEN_PATHS,
    URL_HOLDER,
    Caller,
    KeyRing,
    Scope,
    presented_keys,
    require_scope,
)
from giantleap.service.errors import (
    Forbidden,
    GiantleapError,
    HeadersTooLarge,
    PayloadTooLarge,
    QueueFull,
    RateLimited,
    Unauthorized,
    UnsupportedMediaType,
)
from giantleap.service.jobqueue.admission.gate import Permit
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.media_types import read_media_type
from giantleap.service.links import UrlSigner

MAX_HEADERS = 100
MAX_HEADER_BYTES = 32 << 10
MAX_JSON_PARTS = 16_384
_MAX_PRESENTED = 8  # looking a key up costs a comparison with every key of the file
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_CREATING = frozenset({"POST", "PUT"})


class AuthenticationMiddleware:
    """Sets `request.state.caller`, or responds with an error.

    Args:
        app: The next ASGI application.
        keys: Valid keys; None: anyone may do anything.
        producer: The queue, which counts requests.
        origins: Sites whose pages may call (`Settings.cors_origins`).
        signer: Checks signed URLs; None: there are none.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing | None,
        producer: JobProducer,
        origins: tuple[str, ...],
        signer: UrlSigner | None,
    ) -> None:
        self.app = app
        self.keys = keys
        self.producer = producer
        self.origins = frozenset(origins)
        self.signer = signer

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        try:
            check_headers(request)
            check_site(request, self.origins)
            request.state.caller = caller = self._authenticate(request)
            refusal = await self._admit(request)
            if refusal is None:
                await self._acquire_rate_limit(caller, request)
        except GiantleapError as error:
            await problem_response(error, request, _challenge(error))(scope, receive, send)
        else:
            next_app = self.app if refusal is None else problem_response(refusal, request)
            await next_app(scope, limit_json(request, receive), send)
        finally:
            if (permit := _permit_of(request)) is not None:
                permit.release()

    def _authenticate(self, request: Request) -> Caller:
        path = route_path(request.scope)
        signed = None
        if self.signer is not None and request.method == "GET":  # HEAD too, which runs as GET
            query, signed = self.signer.take_signature(path, request.scope["query_string"])
            request.scope["query_string"] = query  # what routes know
        if signed:
            return URL_HOLDER
        if self.keys is None or path in OPEN_PATHS or is_page_file(path):
            return ANONYMOUS
        presented = presented_keys(request.scope["headers"])
        if signed is False and not presented:
            raise Unauthorized("the URL has expired or was altered; GET the job for a new one, or send an API key")
        caller = find_caller_of(self.keys, presented)
        scope = scope_of(request.method, path)
        if scope is not None:
            require_scope(caller, scope)
        return caller

    async def _admit(self, request: Request) -> QueueFull | None:
        """Get a permit for a new job, unless the server's protocol has one; return the refusal if there is none."""
        if _permit_of(request) is None and makes_new_job(request):
            answer = await self.producer.gate.admit()
            if isinstance(answer, QueueFull):
                return answer
            request.state.permit = answer
        return None

    async def _acquire_rate_limit(self, caller: Caller, request: Request) -> None:
        if caller.requests_per_minute is None or not is_counted(request.method, route_path(request.scope)):
            return
        wait_s = await self.producer.acquire_rate_limit(caller.name, caller.requests_per_minute)
        if wait_s > 0:
            raise RateLimited(
                f"this key may send {caller.requests_per_minute} requests a minute; wait for the seconds of "
                "Retry-After",
                retry_after_s=math.ceil(wait_s),
            )


def _permit_of(request: Request) -> Permit | None:
    permit: Permit | None = getattr(request.state, "permit", None)
    return permit


def find_caller_of(keys: KeyRing, presented: Collection[str]) -> Caller:
    """The caller of the one key that is known; others, such as the token of a gateway, are ignored.

    Raises:
        Unauthorized: None or several are known, or there are too many to look up.
    """
    if len(presented) > _MAX_PRESENTED:
        raise Unauthorized(f"the request carries {len(presented)} different keys; send one")
    callers = [caller for key in presented if (caller := keys.find(key)) is not None]
    if len(callers) > 1:
        raise Unauthorized("the request carries different keys; send one, in Authorization or in X-API-Key")
    if not callers:
        raise Unauthorized(
            "the API key is not known" if presented else "send an API key: Authorization: Bearer KEY, or X-API-Key"
        )
    return callers[0]


def scope_of(method: str, path: str) -> Scope | None:
    """The scope that a path needs, checked before the body is read; `submit_job` checks that of the job again."""
    if path in ("/metrics", "/workers"):
        return Scope.METRICS
    if path == "/dead-letters" or path.startswith("/dead-letters/"):
        return Scope.ADMIN
    if method == "POST" and path in ("/generate", "/v1/images/generations", "/v1/images/edits"):
        return Scope.GENERATE
    infers = path.startswith("/v2/models/") and path.endswith("/infer")
    if method == "POST" and (path == "/upscale" or path.startswith(REMOTE_VAE_PATH + "/") or infers):
        return Scope.UPSCALE
    return None


def makes_new_job(request: Request) -> bool:
    """Whether a request can only add a job: with a key or an id of the client's it may find one that is there."""
    scope = scope_of(request.method, route_path(request.scope))
    return scope in (Scope.GENERATE, Scope.UPSCALE) and "idempotency-key" not in request.headers


def is_counted(method: str, path: str) -> bool:
    """Whether a request counts against its key's rate: those that make jobs do; reading and canceling are free."""
    return method in _CREATING and not path.endswith("/cancel")


def _challenge(error: GiantleapError) -> Mapping[str, str]:
    """The WWW-Authenticate header of a refusal (RFC 6750, section 3)."""
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": 'Bearer realm="giantleap"'}
    if isinstance(error, Forbidden) and error.scope is not None:
        return {"WWW-Authenticate": f'Bearer realm="giantleap", error="insufficient_scope", scope="{error.scope}"'}
    return {}


def check_headers(request: Request) -> None:
    """Check the size of the headers, and that the body is not compressed.

    Raises:
        HeadersTooLarge: There are too many headers or bytes, those of the address included.
        UnsupportedMediaType: The body is compressed, which would evade every limit of its size.
    """
    headers = request.scope["headers"]
    size_bytes = len(request.scope.get("raw_path") or b"") + len(request.scope["query_string"])
    size_bytes += sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size_bytes > MAX_HEADER_BYTES:
        raise HeadersTooLarge(
            f"{len(headers)} headers, with the address {size_bytes} bytes; send at most {MAX_HEADERS} headers and "
            f"{MAX_HEADER_BYTES} bytes"
        )
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("the body is compressed; send it uncompressed")


def limit_json(request: Request, receive: Receive) -> Receive:
    """Wrap `receive` so that a JSON body of too many parts fails: parsed, it would take 50 times its size.

    Of the JSON bodies only KServe's hold many values; `giantleap.service.api.compat.kserve` has limits of its own.
    """
    is_json = "json" in read_media_type(request.headers.get("content-type"))
    if not is_json or route_path(request.scope).endswith("/infer"):
        return receive
    parts = 0

    async def receive_counted() -> Message:
        nonlocal parts
        message = await receive()
        body = message.get("body", b"")
        # Counts them inside strings too, but no long string of a request has many: base64 has none.
        parts += body.count(b",") + body.count(b"[") + body.count(b"{")
        if parts > MAX_JSON_PARTS:
            raise PayloadTooLarge(f"the JSON has too many commas and brackets; send at most {MAX_JSON_PARTS}")
        return message

    return receive_counted


def check_site(request: Request, origins: frozenset[str]) -> None:
    """Keep pages of other sites from using the service through a visitor's browser.

    Browsers send `Sec-Fetch-Site` with each request to https or loopback, and `Origin` with each request that changes
    something; pages cannot alter them, and other clients do not send them.

    Raises:
        Forbidden: A page of a site that is not among `origins` makes a request that changes something.
    """
    headers: Headers = request.headers
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is None and origin is not None:
        site = "same-origin" if origin.partition("://")[2] == headers.get("host") else "cross-site"
    if request.method in _READING or site in (None, "same-origin", "none"):
        return
    if origin not in origins:
        raise Forbidden("a page of another site may not call this service; GIANTLEAP_CORS_ORIGINS lists those that may")
