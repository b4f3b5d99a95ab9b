"""The process that has the device: it loads the bundles, then claims jobs, runs them in batches and ends each.

Pure planning is in `giantleap.service.worker.batching`, one batch's run in `giantleap.service.worker.batch_runner`,
leases and fencing in `giantleap.service.jobqueue.consumer`. A worker is seen by others as ready only after every scale
ran at real shapes. A fault that the loop does not know ends the process: the leases bring its jobs to another worker,
which gives up after a capped number of starts.
"""

import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from prometheus_client import start_http_server

from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.device import choose_device, choose_dtype
from giantleap.models.route import Route
from giantleap.service.errors import BadConfiguration, DoesNotFit, StorageFull
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.capacity import check_capacity, max_items
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.grid import LatentGrid, count_items, output_latent_px
from giantleap.service.jobs.job import GenerateParams, Job, JobError, JobState, UpscaleParams
from giantleap.service.settings import Settings
from giantleap.service.telemetry.logs import log_fields
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.telemetry.tracing import Tracing, open_tracing, trace_id_of
from giantleap.service.worker.batch_runner import (
    BatchRun,
    Drain,
    Latent,
    Outcome,
    Output,
    Stop,
    to_items,
    to_job_error,
    to_latents_blob,
)
from giantleap.service.worker.batching import plan_batch, slice_items
from giantleap.service.worker.engines import open_route
from giantleap.service.worker.memory import measure_device
from giantleap.service.worker.timing import WARMUPS, measure_protocol
from giantleap.service.worker.watchdog import Watchdog

log = logging.getLogger(__name__)

_BLOCK_S = 1.0
_NO_BUNDLES: Mapping[str, Bundle] = MappingProxyType({})
_PROTOCOL_RUNS = 20
Status = JobState | Literal["handed over"]


class _StopAsked(Exception):
    """A stop came while the protocol was measured, which takes minutes on a large model."""


def run_worker(
    settings: Settings, stop: threading.Event, number: int = 0, on_ready: Callable[[], None] | None = None
) -> None:
    """Load, warm, measure if asked, then work until `stop` is set; what runs then may end within the grace period.

    Args:
        settings: All of them.
        stop: Set by a signal.
        number: Which worker of this machine it is: of several GPUs it takes that one where the device is `auto`.
        on_ready: Called once, when jobs can be claimed.

    Effects: loads the bundles onto the device; signs on at Redis when ready and off at the end; serves /metrics if a
    port is set. Returns normally after a stop, having finished or handed back every claim. Ends the process with the
    code `giantleap.service.errors.EXIT_HUNG` where a step makes no progress.

    Raises:
        BadConfiguration: a bundle, a checkpoint, the device, the dtype or the engine does not fit.
        NotReady: Redis did not answer for two minutes.
    """
    redis_url = _require_url(settings)
    settings = settings.model_copy(update={"device": choose_gpu(settings.device, number, torch.cuda.device_count())})
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    metrics = Metrics()
    metrics.set_started("worker")
    tracing = open_tracing(settings.otlp_endpoint, "worker")
    if settings.metrics_port and "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        log.info("metrics_port is not opened: the API processes of this host answer for the worker too")
    elif settings.metrics_port:
        start_http_server(settings.metrics_port, settings.host, metrics.registry)
    bundles, routes = _load(settings, metrics, stop)
    if stop.is_set():
        return
    device = measure_device(bundles, routes, settings)
    metrics.set_device_memory(str(next(iter(routes.values())).device), device.memory_bytes)
    for route in routes.values():
        route.vae.budget_bytes = max(0, device.memory_bytes - device.loaded_bytes)
    client = open_redis(redis_url)
    consumer_name = f"{platform.node()}-{os.getpid()}"
    consumer = JobConsumer(client, settings, tuple(routes), consumer_name, device, settings.role)
    consumer.open()
    log.info("worker ready", extra={"fields": {"bundles": sorted(routes), "role": settings.role}})
    watchdog = Watchdog(settings.step_timeout_s)
    watchdog.open()
    if on_ready is not None:
        on_ready()
    try:
        grids = {name: to_grid(bundle, routes[name]) for name, bundle in bundles.items()}
        drain = Drain(stop, settings.drain_grace_s)
        Worker(routes, grids, consumer, metrics, settings, drain, bundles, device, tracing, watchdog).run()
    finally:
        watchdog.close()
        consumer.close()
        tracing.close()
        client.close()
    log.info("worker stopped")


class Worker:
    """The loop of a loaded worker.

    Args:
        routes: The loaded bundles by name.
        grids: Their latent grids by name.
        consumer: An open queue.
        metrics: Where work is counted.
        settings: Budgets and retry caps.
        drain: When to stop.
        bundles: The loaded bundles as read, by name.
        device: Its measured memory; without one no job is refused and no batch is split for it.
        tracing: Where spans go; none: nowhere.
        watchdog: What ends the process when a batch makes no progress; none: nothing does.
    """

    def __init__(
        self,
        routes: Mapping[str, Route],
        grids: Mapping[str, LatentGrid],
        consumer: JobConsumer,
        metrics: Metrics,
        settings: Settings,
        drain: Drain,
        bundles: Mapping[str, Bundle] = _NO_BUNDLES,
        device: Device | None = None,
        tracing: Tracing | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._watchdog = watchdog
        self._tracing = Tracing() if tracing is None else tracing
        self._bundles = bundles
        self._device = device
        self._routes = routes
        self._grids = grids
        self._consumer = consumer
        self._metrics = metrics
        self._settings = settings
        self._drain = drain

    def run(self) -> None:
        """Claim, plan and run until the drain is asked for; hands back what was claimed and not begun."""
        while not self._drain.is_asked():
            claims = self._apart(self._consumer.claim(self._settings.batch_items, _BLOCK_S))
            for claim in claims:
                if claim.delivery == 1 and claim.base_latents is None:
                    self._tracing.waited(claim.job, time.time())
                    self._metrics.observe_wait(claim.job.priority, max(0.0, time.time() - claim.job.created_at_s))
            batches = plan_batch(claims, self._grids, self._settings.batch_items, self._settings.batch_budget_latent_px)
            for batch in batches:
                if self._drain.is_asked():
                    self._consumer.release(batch)
                else:
                    self.run_batch(batch)

    def _apart(self, claims: Sequence[Claim]) -> Sequence[Claim]:
        """One of those that were started before, if there is any: it may be what ended its worker, and runs alone.

        Effects: hands the others back, else its next start would count against them too, and the last one end them all.
        """
        again = next((claim for claim in claims if claim.delivery > 1), None)
        if again is None:
            return claims
        self._consumer.release([claim for claim in claims if claim is not again])
        return [again]

    def run_batch(self, batch: Sequence[Claim]) -> None:
        """Run one batch and end each of its jobs, or hand it over to a worker that finishes."""
        job = batch[0].job
        if isinstance(job.params, UpscaleParams) and not self._settings.role.loads_decoder:
            for claim in batch:  # put in before any worker had split the work: there is nothing to draw
                self._consumer.transfer(claim, None, {}, [])
            return
        route, items = self._routes[job.bundle], to_items(batch)
        try:
            max_items = self._max_items(job)
        except DoesNotFit as error:  # the API did not know this device, or it has more bundles than thought
            for claim in batch:
                self._end(claim, [to_job_error(error)], {}, len(items), len(batch))
            return
        self._metrics.observe_batch(job.params.kind, len(items))
        route.reset_peak_memory()
        jobs = [claim.job for claim in batch]
        trace_ids = sorted({trace_id for each in jobs if (trace_id := trace_id_of(each.traceparent))})
        with (
            self._tracing.batch(jobs, _trace_attributes(job, route, len(items))) as trace,
            log_fields(job_ids=[each.id for each in jobs], trace_ids=trace_ids),
        ):
            to_the_end = self._settings.role.loads_decoder
            run = BatchRun(route, self._consumer, self._drain, trace, self._watchdog, to_the_end)
            try:
                outcomes = run.run(items, max_items)
            finally:
                if self._watchdog is not None:
                    self._watchdog.rest()
            for claim, ended in _by_claim(batch, outcomes):
                trace.end(claim.job.id, next((each.code for each in ended if isinstance(each, JobError)), None))
        stages_s = run.clock.stages_s
        self._metrics.observe_stages(job.bundle, job.params.method, job.params.scale, route.engine, stages_s)
        peak = route.peak_memory()
        self._metrics.set_peak_memory(str(route.device), peak.source, peak.size_bytes)
        for claim, ended in _by_claim(batch, outcomes):
            self._end(claim, ended, stages_s, len(items), len(batch))

    def _max_items(self, job: Job) -> int:
        """How many images of a job may be on the device at once.

        Raises:
            DoesNotFit: not even one.
        """
        item_latent_px = output_latent_px(job.params, self._grids[job.bundle])
        most = slice_items(item_latent_px, self._settings.batch_items, self._settings.batch_budget_latent_px)
        if self._device is None:
            return most
        bundle = self._bundles[job.bundle]
        check_capacity(job.params, bundle, [self._device], self._settings.max_image_px)
        return max_items(job.params, bundle, self._device, most)

    def _end(
        self,
        claim: Claim,
        outcomes: Sequence[Outcome],
        stages_s: Mapping[str, float],
        batch_items: int,
        batch_jobs: int,
    ) -> None:
        """Write what became of one job: the first error of an image fails it, a stop ends or hands it back."""
        stages_s = _with_drawing(claim, stages_s)
        status: Status
        errors = [outcome for outcome in outcomes if isinstance(outcome, JobError)]
        outputs = [outcome for outcome in outcomes if isinstance(outcome, Output)]
        latents = [outcome for outcome in outcomes if isinstance(outcome, Latent)]
        if errors:
            status, owned = self._fail(claim, errors[0], stages_s)
        elif Stop.CANCELED in outcomes:
            status, owned = JobState.CANCELED, self._consumer.cancel(claim, stages_s)
        elif Stop.RELEASED in outcomes:
            self._consumer.release([claim])
            return
        elif latents:
            status, owned = self._transfer(claim, latents, stages_s, batch_jobs)
        else:
            status, owned = self._finish(claim, outputs, stages_s, batch_jobs)
        if not owned:
            self._metrics.count_fenced()
        self._record(claim, status if owned else None, stages_s, batch_items)

    def _transfer(
        self, claim: Claim, latents: Sequence[Latent], stages_s: Mapping[str, float], batch_jobs: int
    ) -> tuple[Status, bool]:
        blob = to_latents_blob(latents)
        try:
            state = self._consumer.transfer(claim, blob, stages_s, self._warnings(claim), batch_jobs)
        except StorageFull as error:
            return self._fail(claim, to_job_error(error), stages_s)
        return JobState.CANCELED if state is JobState.CANCELED else "handed over", state is not None

    def _finish(
        self, claim: Claim, outputs: Sequence[Output], stages_s: Mapping[str, float], batch_jobs: int
    ) -> tuple[JobState, bool]:
        files = [(output.file, output.content) for output in outputs]
        try:
            owned = self._consumer.complete(claim, files, stages_s, self._warnings(claim), batch_jobs)
        except StorageFull as error:
            return self._fail(claim, to_job_error(error), stages_s)
        if owned:
            pixels = sum((file.width_px or 0) * (file.height_px or 0) for file, _ in files)
            images = sum(file.width_px is not None for file, _ in files)
            self._metrics.count_images(claim.job.bundle, claim.job.params.scale, images, pixels)
        return JobState.SUCCEEDED, owned

    def _fail(self, claim: Claim, error: JobError, stages_s: Mapping[str, float]) -> tuple[JobState, bool]:
        owned = self._consumer.fail(claim, error, stages_s)
        self._metrics.count_failure(claim.job.bundle, error.code)
        if owned and error.retryable and claim.delivery < self._settings.max_deliveries:
            self._metrics.count_retry(claim.job.bundle)
            return JobState.QUEUED, owned
        return JobState.FAILED, owned

    def _warnings(self, claim: Claim) -> list[str]:
        """What the tokenizer of the pipeline knows and the API process does not."""
        params, route = claim.job.params, self._routes[claim.job.bundle]
        if claim.base_latents is not None:
            return list(claim.base_latents.warnings)
        if not isinstance(params, GenerateParams):
            return []
        return [
            f"the {name} is {lost} tokens longer than the text encoder takes; its end was ignored"
            for name, text in (("prompt", params.prompt), ("negative prompt", params.negative_prompt))
            if (lost := route.generator.truncated_tokens(text)) > 0
        ]

    def _record(self, claim: Claim, status: Status | None, stages_s: Mapping[str, float], batch_items: int) -> None:
        """One log line per job that ended here, and its metrics; `status` is None where the lease was lost."""
        job = claim.job
        duration_s = max(0.0, time.time() - job.created_at_s)
        if isinstance(status, JobState) and status.final:
            params = job.params
            self._metrics.observe_job(params.kind, job.bundle, params.method, params.scale, status, duration_s)
        fields = {
            "job_id": job.id,
            "trace_id": trace_id_of(job.traceparent),
            "status": "fenced" if status is None else "retrying" if status is JobState.QUEUED else str(status),
            "kind": job.params.kind,
            "bundle": job.bundle,
            "method": job.params.method,
            "scale": job.params.scale,
            "images": count_items(job.params),
            "batch_items": batch_items,
            "delivery": claim.delivery,
            "duration_s": round(duration_s, 4),
            "stages_s": {stage: round(seconds, 4) for stage, seconds in stages_s.items()},
        }
        log.info("job handed over" if status == "handed over" else "job ended", extra={"fields": fields})


def _with_drawing(claim: Claim, stages_s: Mapping[str, float]) -> dict[str, float]:
    """The stage times of a job, with those of the worker that drew it."""
    before_s = {} if claim.base_latents is None else claim.base_latents.stages_s
    return {stage: before_s.get(stage, 0.0) + stages_s.get(stage, 0.0) for stage in (*before_s, *stages_s)}


def _trace_attributes(job: Job, route: Route, batch_items: int) -> dict[str, str | float]:
    return {
        "giantleap.kind": job.params.kind,
        "giantleap.bundle": job.bundle,
        "giantleap.method": job.params.method,
        "giantleap.scale": job.params.scale,
        "giantleap.engine": route.engine,
        "giantleap.batch.items": batch_items,
    }


def choose_gpu(device: str, number: int, gpus: int) -> str:
    """The device of the worker with that number: under `auto` each takes the next GPU, the CPU where there is none."""
    return f"cuda:{number % gpus}" if device == "auto" and gpus else device


def to_grid(bundle: Bundle, route: Route) -> LatentGrid:
    """The latent grid of a loaded bundle."""
    return LatentGrid(bundle.latent_space.stride_px, route.window)


def _load(settings: Settings, metrics: Metrics, stop: threading.Event) -> tuple[dict[str, Bundle], dict[str, Route]]:
    """The bundles and their loaded routes by name, measured by the paper's protocol where that is asked for."""
    try:
        bundles = {bundle.name: bundle for bundle in map(read_bundle, settings.bundle)}
        routes = {name: _open_route(bundle, settings, metrics) for name, bundle in bundles.items()}
    except ValueError as error:
        raise BadConfiguration(str(error)) from error
    if settings.measure_protocol:
        for name, route in routes.items():
            _publish_protocol(route, bundles[name], metrics, stop)
    return bundles, routes


def _open_route(bundle: Bundle, settings: Settings, metrics: Metrics) -> Route:
    """Load a bundle and run each scale of its upscalers once at the shapes of its default request."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device, bundle.dtype)
    fields: dict[str, object] = {"bundle": bundle.name, "device": str(device), "dtype": str(dtype)}
    fields["engine"] = settings.engine
    log.info("worker loading", extra={"fields": fields})
    route = open_route(bundle, settings, device, dtype)
    warmed = route.warm(bundle.defaults.base_width_px, bundle.defaults.base_height_px, steps=2)
    for (method, scale), stages_s in warmed.items():
        metrics.observe_stages(bundle.name, method, scale, route.engine, stages_s, warmup=True)
    metrics.set_engine(bundle.name, route.engine, str(device), str(dtype).removeprefix("torch."))
    return route


def _publish_protocol(route: Route, bundle: Bundle, metrics: Metrics, stop: threading.Event) -> None:
    """Measure the paper's protocol at the bundle's base size for each scale, unless a stop comes first."""
    defaults = bundle.defaults

    def watch(done: int, total: int) -> None:
        if stop.is_set():
            raise _StopAsked

    method = defaults.method
    for scale in route.scales_of(method):
        log.info("worker measuring protocol", extra={"fields": {"bundle": bundle.name, "scale": scale}})
        try:
            result = measure_protocol(
                route,
                scale,
                defaults.base_width_px,
                defaults.base_height_px,
                defaults.steps,
                method,
                warmups=WARMUPS,
                runs=_PROTOCOL_RUNS,
                on_progress=watch,
            )
        except _StopAsked:
            return
        for stage, statistics in result.stages.items():
            for statistic, value_s in statistics.to_labels().items():
                metrics.set_protocol(bundle.name, method, scale, result.image_px, stage, statistic, value_s)


def _by_claim(batch: Sequence[Claim], outcomes: Sequence[Outcome]) -> Iterator[tuple[Claim, Sequence[Outcome]]]:
    """Give each job the outcomes of its own images, which lie in the order of `to_items`."""
    start = 0
    for claim in batch:
        end = start + count_items(claim.job.params)
        yield claim, outcomes[start:end]
        start = end


def _require_url(settings: Settings) -> str:
    if settings.redis_url is None:
        raise ValueError("redis_url: none was given; a worker needs the Redis that the API uses")
    return settings.redis_url
