"""The HTTP API of one process: its middlewares, routes, error handlers and resources."""

import asyncio
import signal
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache, partial
from importlib.metadata import version
from types import FrameType

from fastapi import Depends, FastAPI

from giantleap.service.api.compat import kserve, openai, openai_edits, remote_vae
from giantleap.service.api.dependencies import AppState
from giantleap.service.api.middleware.authentication import AuthenticationMiddleware
from giantleap.service.api.middleware.early_refusal import EarlyRefusal
from giantleap.service.api.middleware.head import HeadMiddleware
from giantleap.service.api.middleware.request_context import RequestContextMiddleware
from giantleap.service.api.middleware.root_path import RootPathMiddleware
from giantleap.service.api.middleware.security_headers import SecurityHeadersMiddleware, allow_origins
from giantleap.service.api.openapi import describe, operation_id
from giantleap.service.api.problems import handle_errors
from giantleap.service.api.responses import JobProblem, handle_job_problem
from giantleap.service.api.route_table import RouteTable, refuse_unknown_parameters
from giantleap.service.api.routes import create, dead_letters, health, jobs, page, provenance
from giantleap.service.api.sweeper import Sweeper
from giantleap.service.auth import open_keys
from giantleap.service.jobqueue.client import AsyncRedis, open_async_redis
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.bundles import load_bundles
from giantleap.service.links import open_signer
from giantleap.service.results.concurrent import AsyncResultStore
from giantleap.service.results.store import open_store
from giantleap.service.settings import Settings
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.telemetry.tracing import Tracing, open_tracing
from giantleap.service.webhooks.sender import WebhookSender


def create_app(settings: Settings, producer: JobProducer | None = None, tracing: Tracing | None = None) -> FastAPI:
    """Build the application. Reads the bundles, so that a bad one stops the start; Redis is opened with the app.

    Args:
        settings: Settings of the process; `redis_url` must be set unless there is a producer.
        producer: The queue; None: one on `settings.redis_url`, opened and closed with the app.
        tracing: Where spans go, closed with the app; None: as the settings say.

    Raises:
        BundleError: A bundle cannot be served.
        KeysFileError: The file of API keys cannot be used.
        BadConfiguration: Traces are on, but their exporter is not installed.
        ValueError: There is neither a producer nor a Redis URL.
    """
    metrics = Metrics()
    metrics.set_started("api")
    spans = open_tracing(settings.otlp_endpoint, "api") if tracing is None else tracing
    client, files = None, None
    if producer is None:
        if settings.redis_url is None:
            raise ValueError("redis_url is not set; name the Redis that the workers use")
        client = open_async_redis(settings.redis_url)
        if (store := open_store(settings)) is not None:
            files = AsyncResultStore(store, settings.max_body_bytes)
        producer = JobProducer(client, settings, files)
    sender = None
    if client is not None and settings.webhook_secret is not None:
        sender = WebhookSender(client, settings, metrics)
    signer, bundles = open_signer(settings), load_bundles(settings)
    state = AppState(settings, bundles, producer, metrics, asyncio.Event(), signer, files)

    app = FastAPI(
        title="Giantleap",
        summary="Generates a latent, upscales it with LUA, decodes it once.",
        version=version("giantleap"),
        lifespan=partial(_opened, state, client, sender, spans),
        docs_url=None,  # `page.docs_router` instead
        redoc_url=None,
        dependencies=[Depends(refuse_unknown_parameters)],
        generate_unique_id_function=operation_id,
    )
    app.state.giantleap = state
    _add_middlewares(app, state, spans)
    handle_errors(app)
    app.add_exception_handler(JobProblem, handle_job_problem)
    for routes in (create, jobs, dead_letters, provenance, health, openai, openai_edits, kserve, remote_vae):
        app.include_router(routes.router)
    app.include_router(page.docs_router)
    if settings.ui:
        app.include_router(page.router)
    app.openapi = cache(partial(describe, app))  # type: ignore[method-assign]  # FastAPI's own way to extend it
    app.state.route_table = cache(lambda: RouteTable.from_document(app.openapi()))
    return app


def _add_middlewares(app: FastAPI, state: AppState, spans: Tracing) -> None:
    """Add the middlewares. Starlette adds each around the previous ones, so a request meets them in this order.

    `EarlyRefusal` is none of them: with it the server's protocol refuses new jobs while the queue is full.

    1. `RootPathMiddleware`: the path below a reverse proxy.
    2. `SecurityHeadersMiddleware`: headers of every response; closes connections with unread bodies.
    3. `CORSMiddleware`, where the settings name origins: preflight requests, and CORS headers of every response.
    4. `RequestContextMiddleware`: request id, trace, log line, metrics, limit of the body, unexpected errors.
    5. `HeadMiddleware`: HEAD as GET without the body.
    6. `AuthenticationMiddleware`: limits of headers and JSON, requests of other sites, API key, full queue, rate limit.
    """
    settings, keys = state.settings, open_keys(state.settings)
    app.state.early_refusal = EarlyRefusal(
        app,
        keys,
        state.producer,
        state.metrics,
        root_path=settings.root_path,
        max_body_bytes=settings.max_body_bytes,
    )
    app.add_middleware(
        AuthenticationMiddleware,
        keys=keys,
        producer=state.producer,
        origins=settings.cors_origins,
        signer=state.signer,
    )
    app.add_middleware(HeadMiddleware)
    app.add_middleware(
        RequestContextMiddleware, max_body_bytes=settings.max_body_bytes, metrics=state.metrics, tracing=spans
    )
    allow_origins(app, settings.cors_origins)
    app.add_middleware(SecurityHeadersMiddleware, origins=settings.cors_origins)
    app.add_middleware(RootPathMiddleware, root_path=settings.root_path)


@asynccontextmanager
async def _opened(
    state: AppState, client: AsyncRedis | None, sender: WebhookSender | None, spans: Tracing, app: FastAPI
) -> AsyncGenerator[None]:
    """Open the queue and the webhook sender; close them, and the app's own Redis client, when the app ends."""
    await state.producer.open()
    sweeper = None if state.files is None else Sweeper(state.producer, state.files, state.settings)
    try:
        # FastAPI cannot make the document in two threads at once, so that no request may need it before it is there.
        await asyncio.to_thread(app.state.route_table)
        if sender is not None:
            sender.open()
        if sweeper is not None:
            sweeper.open()
        with _stop_on_signals(state.stopping):
            yield
    finally:
        if sender is not None:
            await sender.close()
        if sweeper is not None:
            await sweeper.close()
        await state.producer.close()
        if state.files is not None:
            state.files.close()
        if client is not None:
            await client.aclose()
        await asyncio.to_thread(spans.close)


@contextmanager
def _stop_on_signals(stopping: asyncio.Event) -> Iterator[None]:
    """Set `stopping` on SIGTERM and SIGINT, before the server's own handler runs.

    The server then waits for open requests; event streams and waiting requests end early because of `stopping`. Only
    the main thread receives signals: elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(stopping.set)
        handler = previous[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            if handler is not None:  # None: set by other than Python, and cannot be restored
                signal.signal(number, handler)
