"""A worker process: loads and warms the bundles, measures the device, then runs the loop until it is stopped.

A worker becomes visible to others only after every scale ran at real shapes. The loop is
`giantleap.service.worker.loop`.
"""

import logging
import os
import platform
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from prometheus_client import start_http_server

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.device import choose_device, choose_dtype
from giantleap.models.engines.threads import set_threads
from giantleap.models.provenance.marker import ImageMarker
from giantleap.models.route import Route
from giantleap.models.runs import warm
from giantleap.service.errors import BadConfiguration, NotReady
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.server import check_url
from giantleap.service.jobs.bundles import read_in_modes
from giantleap.service.jobs.devices import Device, StagePeak
from giantleap.service.jobs.marking import open_manifest_signer
from giantleap.service.results.jobs import open_files
from giantleap.service.results.store import check_store, open_store
from giantleap.service.settings import Settings
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.telemetry.tracing import open_tracing
from giantleap.service.worker.bundles import BundleCache
from giantleap.service.worker.drain import Drain
from giantleap.service.worker.engines import open_route
from giantleap.service.worker.loop import Worker
from giantleap.service.worker.memory import measure_device, measure_stages
from giantleap.service.worker.outputs.filters import open_filters
from giantleap.service.worker.timing import ProtocolPlan, time_runs, to_result
from giantleap.service.worker.watchdog import Watchdog

log = logging.getLogger(__name__)

# No call of a worker that hangs may hold up its drain for long.
_REDIS_TIMEOUT_S = 5.0


def run_worker(
    settings: Settings, stop: threading.Event, number: int = 0, on_ready: Callable[[], None] | None = None
) -> None:
    """Load, warm and measure, then work until `stop` is set and running work ended or its grace period is over.

    Args:
        settings: All settings.
        stop: Set by a signal.
        number: Index of this worker on its machine; with device `auto` it selects the GPU.
        on_ready: Called once, when jobs can be claimed.

    Effects: loads the bundles onto the device; registers in Redis when ready and unregisters at the end; serves
    /metrics if a port is set. Returns normally after a stop, with every claim finished or released. Exits the process
    with `giantleap.service.errors.EXIT_HUNG` if a step makes no progress.

    Raises:
        BadConfiguration: A bundle, checkpoint, device, dtype or engine does not fit, or Redis refuses this process.
        NotReady: Redis did not answer for two minutes.
        StoreUnavailable: The result store does not answer at the start.
    """
    if settings.redis_url is None:
        raise ValueError("redis_url is not set; a worker needs the Redis that the API uses")
    try:
        _run(settings, settings.redis_url, stop, number, on_ready)
    except NotReady:
        if not stop.is_set():
            raise
        log.info("worker stopped while it waited for Redis")


def _run(
    settings: Settings, redis_url: str, stop: threading.Event, number: int, on_ready: Callable[[], None] | None
) -> None:
    settings = settings.model_copy(update={"device": choose_gpu(settings.device, number, torch.cuda.device_count())})
    set_threads(settings.torch_threads, settings.worker_processes)
    metrics = _open_metrics(settings)
    check_url(redis_url, settings)  # before minutes of loading
    check_store(open_store(settings))
    marker = ImageMarker(open_manifest_signer(settings), settings.watermark)
    filters = open_filters(settings.filters, metrics.count_filtered)
    bundles, device = open_bundles(settings, metrics, stop)
    if stop.is_set():
        return
    tracing = open_tracing(settings.otlp_endpoint, "worker")
    client = open_redis(redis_url, timeout_s=_REDIS_TIMEOUT_S, stop=stop)
    name = f"{platform.node()}-{os.getpid()}"
    consumer = JobConsumer(
        client, settings, tuple(bundles.bundles), name, device, settings.role, stop, open_files(settings)
    )
    consumer.open()
    fields = {"bundles": sorted(bundles.bundles), "loaded": sorted(bundles.loaded), "role": settings.role}
    log.info("worker ready", extra={"fields": fields})
    watchdog = Watchdog(settings.step_timeout_s)
    watchdog.open()
    if on_ready is not None:
        on_ready()
    worker = Worker(
        bundles=bundles,
        device=device,
        consumer=consumer,
        metrics=metrics,
        tracing=tracing,
        watchdog=watchdog,
        drain=Drain(stop, settings.drain_grace_s),
        settings=settings,
        marker=marker,
        filters=filters,
    )
    try:
        worker.run()
    finally:
        watchdog.close()
        consumer.close()
        tracing.close()
        client.close()
    log.info("worker stopped")


def choose_gpu(device: str, number: int, gpus: int) -> str:
    """The device of the worker of this index: with `auto` workers take GPUs in turn, or the CPU if there is none."""
    return f"cuda:{number % gpus}" if device == "auto" and gpus else device


def _open_metrics(settings: Settings) -> Metrics:
    metrics = Metrics()
    metrics.set_started("worker")
    if settings.metrics_port and "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        log.info("metrics_port is not opened: the API processes of this host serve the worker's metrics too")
    elif settings.metrics_port:
        start_http_server(settings.metrics_port, settings.host, metrics.registry)
    return metrics


def open_bundles(settings: Settings, metrics: Metrics, stop: threading.Event) -> tuple[BundleCache, Device]:
    """Load, warm and measure each bundle, the default last, which therefore stays where not all fit.

    Returns:
        The bundles, and what was measured of the device.
    """
    try:
        read = [read_in_modes(directory, settings.modes) for directory in settings.bundle]
        bundles = {bundle.name: bundle for bundle in read}
        device = choose_device(settings.device)
        opener = partial(_open_route, settings=settings, device=device)
        cache = BundleCache(bundles, opener, device, settings.bundle_memory_bytes, metrics)
        peaks: dict[str, Mapping[str, StagePeak]] = {}
        for name in reversed(bundles):
            peaks[name] = _measure_bundle(cache, bundles[name], settings, metrics, stop)
    except ValueError as error:
        raise BadConfiguration(str(error)) from error
    missing_bytes = cache.reserved_bytes - sum(cache.sizes_bytes[name] for name in cache.loaded)
    measured = replace(measure_device(device, peaks, settings, missing_bytes), loaded=cache.loaded)
    cache.give_decode_budget(max(0, measured.memory_bytes - measured.loaded_bytes))
    metrics.set_device_memory(str(device), measured.memory_bytes)
    return cache, measured


def _measure_bundle(
    cache: BundleCache, bundle: Bundle, settings: Settings, metrics: Metrics, stop: threading.Event
) -> Mapping[str, StagePeak]:
    """Load a bundle and measure its stages; on return nothing but the cache holds its route."""
    route = cache.measure(bundle.name, partial(_warm, bundle, metrics=metrics))
    peaks = measure_stages(route, bundle)
    if settings.measure_protocol:
        _publish_protocol(route, bundle, metrics, stop)
    return peaks


def _open_route(bundle: Bundle, settings: Settings, device: torch.device) -> Route:
    dtype = choose_dtype(settings.dtype, device, bundle.dtype)
    fields = {"bundle": bundle.name, "device": str(device), "dtype": str(dtype), "engine": settings.engine}
    fields |= bundle.modes.named
    log.info("worker loading", extra={"fields": fields})
    return open_route(bundle, settings, device, dtype)


def _warm(bundle: Bundle, route: Route, metrics: Metrics) -> None:
    """Run each scale of a bundle's upscalers once at the shapes of its default request."""
    warmed = warm(route, bundle.defaults.base_width_px, bundle.defaults.base_height_px, steps=2)
    for (method, scale), stages_s in warmed.items():
        metrics.observe_stages(bundle.name, method, scale, route.engine, stages_s, warmup=True)
    dtype = str(route.dtype).removeprefix("torch.")
    metrics.set_engine(bundle.name, route.engine, route.decoder, str(route.device), dtype)


def _publish_protocol(route: Route, bundle: Bundle, metrics: Metrics, stop: threading.Event) -> None:
    """Time the paper's protocol at the bundle's base size for each scale, until a stop comes."""
    defaults, method = bundle.defaults, bundle.defaults.method
    for scale in route.scales_of(method):
        log.info("worker measuring protocol", extra={"fields": {"bundle": bundle.name, "scale": scale}})
        size_px = (defaults.base_width_px, defaults.base_height_px)
        plan = ProtocolPlan(scale, *size_px, defaults.steps, defaults.guidance_scale, method)
        runs_s = []
        for stages_s in time_runs(route, plan):
            if stop.is_set():  # a run of a large model takes seconds, all of them minutes
                return
            runs_s.append(stages_s)
        result = to_result(route, plan, runs_s)
        for stage, statistics in result.stages.items():
            for statistic, value_s in statistics.to_labels().items():
                metrics.set_protocol(bundle.name, method, scale, result.image_px, stage, statistic, value_s)
