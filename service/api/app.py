"""The HTTP API of one process: builds what it needs from the settings, opens it for the app's life, mounts the routes.

A request passes `giantleap.service.api.middleware.request_context`, then a route (`routes_create`, `routes_jobs`,
`routes_health`), then `giantleap.service.jobqueue.producer`; what goes wrong on the way becomes a problem document in
`giantleap.service.api.problems`.
"""

import asyncio
import signal
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache, partial
from importlib.metadata import version
from types import FrameType

from fastapi import FastAPI

from giantleap.service.api.compat import kserve as front_kserve
from giantleap.service.api.compat import openai as front_openai
from giantleap.service.api.compat import remote_vae as front_remote_vae
from giantleap.service.api.dependencies import AppState
from giantleap.service.api.middleware.authentication import AuthenticationMiddleware
from giantleap.service.api.middleware.request_context import RequestContextMiddleware
from giantleap.service.api.middleware.security_headers import SecurityHeadersMiddleware, allow_origins
from giantleap.service.api.openapi import describe
from giantleap.service.api.problems import handle_errors
from giantleap.service.api.routes import create as routes_create
from giantleap.service.api.routes import health as routes_health
from giantleap.service.api.routes import jobs as routes_jobs
from giantleap.service.api.routes import put as routes_put
from giantleap.service.auth import open_keys
from giantleap.service.jobqueue.client import AsyncRedis, open_async_redis
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.bundles import load_bundles
from giantleap.service.settings import Settings
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.telemetry.tracing import Tracing, open_tracing
from giantleap.service.webhooks.sender import WebhookSender


def create_app(settings: Settings, producer: JobProducer | None = None, tracing: Tracing | None = None) -> FastAPI:
    """The application. Bundles are read here, so that a wrong one stops the start; Redis is opened with the app.

    Args:
        settings: All of them; `redis_url` must be set unless a producer is given.
        producer: The queue; none: one on `settings.redis_url`, opened and closed with the app.
        tracing: Where spans go, closed with the app; none: as the settings say.

    Raises:
        BundleError: a bundle cannot be served.
        KeysFileError: the file of API keys cannot be used.
        BadConfiguration: traces are asked for and what sends them is not installed.
        ValueError: no Redis is named.
    """
    metrics = Metrics()
    metrics.set_started("api")
    spans = open_tracing(settings.otlp_endpoint, "api") if tracing is None else tracing
    client = None
    if producer is None:
        if settings.redis_url is None:
            raise ValueError("redis_url is not set; the API needs the Redis that its workers use")
        client = open_async_redis(settings.redis_url)
        producer = JobProducer(client, settings)
    sender = None
    if client is not None and settings.webhook_secret is not None:
        sender = WebhookSender(client, settings, metrics)
    serving = AppState(settings, load_bundles(settings), producer, metrics, asyncio.Event())

    app = FastAPI(
        title="Giantleap",
        summary="Draws a small latent, enlarges it, decodes it once.",
        version=version("giantleap"),
        lifespan=partial(opened, serving, client, sender, spans),
        redoc_url=None,
    )
    app.state.serving = serving
    # Each is laid around those before it: a request meets the last one first.
    app.add_middleware(
        AuthenticationMiddleware, keys=open_keys(settings), producer=producer, origins=settings.cors_origins
    )
    allow_origins(app, settings.cors_origins)
    app.add_middleware(RequestContextMiddleware, max_body_bytes=settings.max_body_bytes, metrics=metrics, tracing=spans)
    app.add_middleware(SecurityHeadersMiddleware)
    handle_errors(app)
    for routes in (routes_create, routes_put, routes_jobs, routes_health, front_openai, front_kserve, front_remote_vae):
        app.include_router(routes.router)
    app.openapi = cache(partial(describe, app))  # type: ignore[method-assign]  # FastAPI's own way to extend it
    return app


@asynccontextmanager
async def opened(
    serving: AppState, client: AsyncRedis | None, sender: WebhookSender | None, spans: Tracing, app: FastAPI
) -> AsyncGenerator[None]:
    """Opens what an app works with, and closes it, its own Redis `client` included, when the app ends."""
    await serving.producer.open()
    try:
        if sender is not None:
            sender.open()
        with stop_on_signals(serving.stopping):
            yield
    finally:
        if sender is not None:
            await sender.close()
        await serving.producer.close()
        if client is not None:
            await client.aclose()
        await asyncio.to_thread(spans.close)


@contextmanager
def stop_on_signals(stopping: asyncio.Event) -> Iterator[None]:
    """Set `stopping` on SIGTERM and SIGINT before the server's own handler runs.

    The server then waits until open requests have ended; event streams and waiting requests would hold it up to
    its limit if they did not know. Only the main thread gets signals: elsewhere this does nothing.
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
            if handler is not None:  # None: it was not set by Python and cannot be set back
                signal.signal(number, handler)
