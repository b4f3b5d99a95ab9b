"""The loop of a worker: claim jobs, run them in batches on one device, end each.

`giantleap.service.worker.process` makes what it needs. Planning is in `giantleap.service.worker.batching`, one batch's
run in `giantleap.service.worker.batch_runner`, the end of a job in `giantleap.service.worker.settlement`. An unexpected
fault ends the process: the leases bring its jobs to another worker, which gives up after `max_deliveries` starts.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from giantleap.models.filters.chain import FilterChain
from giantleap.models.provenance.marker import ImageMarker
from giantleap.models.route import Route
from giantleap.models.worker_role import WorkerRole
from giantleap.service.errors import DoesNotFit, JobFailed, NotReady
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.capacity import check_capacity, max_items
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.grid import count_items, output_latent_px
from giantleap.service.jobs.job import Job, JobError, UpscaleParams
from giantleap.service.settings import Settings
from giantleap.service.telemetry.logs import log_fields
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.telemetry.tracing import Tracing, trace_id_of
from giantleap.service.worker.batch_runner import BatchRun
from giantleap.service.worker.batching import plan_batch, slice_items
from giantleap.service.worker.bundles import BundleCache
from giantleap.service.worker.drain import Drain
from giantleap.service.worker.items import Item, Outcome, to_items, to_job_error
from giantleap.service.worker.loading import BundleLoader
from giantleap.service.worker.settlement import BatchSummary, JobSettler, find_warnings
from giantleap.service.worker.watchdog import Watchdog

_BLOCK_S = 1.0

log = logging.getLogger(__name__)


class Worker:
    """The loop of a worker.

    Args:
        bundles: The bundles that it serves.
        device: What was measured of the device.
        consumer: An open queue.
        metrics: Where work is counted.
        tracing: Where spans go.
        watchdog: What ends the process if a batch makes no progress.
        drain: When to stop.
        settings: Budgets and retry limits.
        marker: Encodes the images.
        filters: See the images before that.
    """

    def __init__(
        self,
        *,
        bundles: BundleCache,
        device: Device,
        consumer: JobConsumer,
        metrics: Metrics,
        tracing: Tracing,
        watchdog: Watchdog,
        drain: Drain,
        settings: Settings,
        marker: ImageMarker,
        filters: FilterChain,
    ) -> None:
        self._bundles = bundles
        self._device = device
        self._consumer = consumer
        self._metrics = metrics
        self._tracing = tracing
        self._watchdog = watchdog
        self._drain = drain
        self._settings = settings
        self._marker = marker
        self._filters = filters
        self._settler = JobSettler(consumer, metrics)
        self._loader = BundleLoader(
            bundles,
            consumer,
            self._settler,
            metrics,
            watchdog,
            drain,
            settings.loaded_first_s,
            self._announce,
        )

    def run(self) -> None:
        """Claim, plan and run until the drain is requested; releases claims that did not start."""
        while not self._drain.is_requested():
            taken = self._consumer.claim(self._settings.batch_items, _BLOCK_S, self._loader.preference())
            self._run_claims(self._isolate_redelivered(taken))

    def _run_claims(self, claims: Sequence[Claim]) -> None:
        """Run those of loaded bundles, then load one other bundle for its claims. Effects: releases the rest."""
        loaded = [claim for claim in claims if claim.job.bundle in self._bundles.loaded]
        others = [claim for claim in claims if claim.job.bundle not in self._bundles.loaded]
        waiting = [claim for claim in others if claim.job.bundle == others[0].job.bundle]
        self._consumer.release([claim for claim in others if claim not in waiting])
        self._observe_waits([*loaded, *waiting])
        self._run_loaded(loaded)
        if waiting:
            self._run_loaded(*self._loader.load(waiting[0].job.bundle, waiting))

    def _run_loaded(self, claims: Sequence[Claim], load_s: float = 0.0) -> None:
        budgets = self._settings.batch_items, self._settings.batch_budget_latent_px
        for batch in plan_batch(claims, self._bundles.grids, *budgets):
            if self._drain.is_requested():
                self._consumer.release(batch)
                continue
            try:
                self.run_batch(batch, load_s)
            except NotReady as error:  # the work is lost, but the loaded worker need not be
                log.error("ends of jobs not written, they run again: %s", error.detail)
                self._consumer.drop(batch)

    def run_batch(self, batch: Sequence[Claim], load_s: float = 0.0) -> None:
        """Run one batch of a loaded bundle, which took `load_s` to load for it, and end each of its jobs."""
        job = batch[0].job
        route, items = self._bundles.use(job.bundle), to_items(batch)
        if isinstance(job.params, UpscaleParams) and not route.role.loads_decoder:
            for claim in batch:  # enqueued before any decoding worker existed; there is nothing to generate
                self._consumer.transfer(claim, None, {}, [])
            return
        stages_s: Mapping[str, float] = {"load": load_s} if load_s else {}
        try:
            slice_size = self._slice_size(job)
        except (DoesNotFit, JobFailed) as error:  # the API did not know this worker
            outcomes: list[Outcome] = [to_job_error(error)] * len(items)
        else:
            outcomes, run_s = self._run(batch, route, items, slice_size)
            stages_s = {**stages_s, **run_s}
        summary = BatchSummary(stages_s, len(items), len(batch))
        for claim, ended in _by_claim(batch, outcomes):
            self._settler.settle(claim, ended, summary, find_warnings(claim, route))

    def _announce(self) -> None:
        """Publish which bundles are loaded."""
        self._consumer.announce(replace(self._device, loaded=self._bundles.loaded))

    def _isolate_redelivered(self, claims: Sequence[Claim]) -> Sequence[Claim]:
        """If a claim was delivered before, only the first such one: it may have ended its worker, and runs alone.

        Effects: releases the others. Otherwise their next start would count against them, and could end them too.
        """
        redelivered = next((claim for claim in claims if claim.delivery > 1), None)
        if redelivered is None:
            return claims
        self._consumer.release([claim for claim in claims if claim is not redelivered])
        return [redelivered]

    def _observe_waits(self, claims: Sequence[Claim]) -> None:
        for claim in claims:
            if claim.delivery == 1 and claim.base_latents is None:
                self._tracing.waited(claim.job, time.time(), claim.waited_s)
                self._metrics.observe_wait(claim.job.priority, claim.waited_s)

    def _slice_size(self, job: Job) -> int:
        """How many images of a job may be on the device at once.

        Raises:
            DoesNotFit: Not even one fits.
            JobFailed: This worker runs one half of a job that needs both.
        """
        role = self._settings.role
        if job.params.refine is not None and role is not WorkerRole.ALL:
            raise JobFailed(f"a refine pass needs a worker of role {WorkerRole.ALL}; this one is of role {role}")
        item_latent_px = output_latent_px(job.params, self._bundles.grids[job.bundle])
        items = slice_items(item_latent_px, self._settings.batch_items, self._settings.batch_budget_latent_px)
        bundle = self._bundles.bundles[job.bundle]
        check_capacity(job.params, bundle, [self._device], self._settings.max_image_px)
        return max_items(job.params, bundle, self._device, items)

    def _run(
        self, batch: Sequence[Claim], route: Route, items: Sequence[Item], slice_size: int
    ) -> tuple[list[Outcome], Mapping[str, float]]:
        """The outcome of each item and the stage times, with metrics and traces of the batch."""
        job, jobs = batch[0].job, [claim.job for claim in batch]
        self._metrics.observe_batch(job.params.kind, len(items))
        route.reset_peak_memory()
        trace_ids = sorted({trace_id for each in jobs if (trace_id := trace_id_of(each.traceparent))})
        with (
            self._tracing.batch(jobs, _trace_attributes(job, route, len(items))) as trace,
            log_fields(job_ids=[each.id for each in jobs], trace_ids=trace_ids),
        ):
            run = BatchRun(route, self._consumer, self._drain, trace, self._watchdog, self._marker, self._filters)
            try:
                outcomes = run.run(items, slice_size)
            finally:
                self._watchdog.pause()
            for claim, ended in _by_claim(batch, outcomes):
                trace.end(claim.job.id, next((each.code for each in ended if isinstance(each, JobError)), None))
        stages_s = run.clock.stages_s
        self._metrics.observe_stages(job.bundle, job.params.method, job.params.scale, route.engine, stages_s)
        peak = route.peak_memory()
        self._metrics.set_peak_memory(str(route.device), peak.source, peak.size_bytes)
        return outcomes, stages_s


def _trace_attributes(job: Job, route: Route, batch_items: int) -> dict[str, str | float]:
    return {
        "giantleap.kind": job.params.kind,
        "giantleap.bundle": job.bundle,
        "giantleap.method": job.params.method,
        "giantleap.scale": job.params.scale,
        "giantleap.engine": route.engine,
        "giantleap.batch.items": batch_items,
    }


def _by_claim(batch: Sequence[Claim], outcomes: Sequence[Outcome]) -> Iterator[tuple[Claim, Sequence[Outcome]]]:
    """Each job with the outcomes of its own images, which are in the order of `to_items`."""
    start = 0
    for claim in batch:
        end = start + count_items(claim.job.params)
        yield claim, outcomes[start:end]
        start = end
