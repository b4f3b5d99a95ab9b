"""The loop of a worker: claim jobs, run them in batches on one device, end each.

`giantleap.service.worker.process` makes what it needs. This thread alone uses the device. Planning is in
`giantleap.service.worker.batching`, one batch's run in `giantleap.service.worker.batch_runner`; the claims for the next
batch (`giantleap.service.worker.pipeline.ahead`) and the ends of those that ran
(`giantleap.service.worker.pipeline.finishing`) are the work of other threads. An unexpected fault ends the process: the
leases bring its jobs to another worker, which gives up after `max_deliveries` starts.
"""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
from giantleap.service.jobs.grid import output_latent_px
from giantleap.service.jobs.job import Job, UpscaleParams
from giantleap.service.settings import Settings
from giantleap.service.telemetry.logs import log_fields
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.telemetry.tracing import Tracing
from giantleap.service.worker.batch_runner import BatchRun
from giantleap.service.worker.batching import items_together, plan_batch, slice_items
from giantleap.service.worker.bundles import BundleCache
from giantleap.service.worker.drain import Drain
from giantleap.service.worker.items import to_items, to_job_error
from giantleap.service.worker.loading import BundleLoader
from giantleap.service.worker.pipeline.ahead import ClaimAhead
from giantleap.service.worker.pipeline.claim_watch import settle
from giantleap.service.worker.pipeline.finishing import BatchFinisher, RanBatch, batch_fields
from giantleap.service.worker.settlement import JobSettler, find_warnings
from giantleap.service.worker.watchdog import Watchdog

_BLOCK_S = 1.0
MAX_FINISHING = 2
"""Batches that wait to be encoded or are encoded at once: each holds its pixels and files in memory."""

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
        max_finishing: Batches that may be encoded and stored while the device goes on; with 0 all happens in turn, and
            nothing is claimed ahead.
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
        max_finishing: int = MAX_FINISHING,
    ) -> None:
        self._bundles = bundles
        self._device = device
        self._consumer = consumer
        self._metrics = metrics
        self._tracing = tracing
        self._watchdog = watchdog
        self._drain = drain
        self._settings = settings
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
        self._max_finishing = max_finishing
        self._pool = ThreadPoolExecutor(max_finishing + 1, "pipeline")  # one of them claims
        self._ahead = ClaimAhead(consumer, self._settler, drain, settings.batch_items, self._pool)
        self._finisher = BatchFinisher(self._settler, metrics, watchdog, marker, max_finishing, self._pool)

    def run(self) -> None:
        """Claim, plan and run until the drain is requested; at the end nothing is in flight or held.

        Effects: releases claims that did not start.
        """
        with self._pool:  # on the way out, what was handed to it ends
            try:
                while not self._drain.is_requested():
                    self._finisher.check()
                    self._run_claims(self._isolate_redelivered(self._next_claims()))
                self._finisher.wait()
            finally:
                self._consumer.release(self._ahead.take())

    def _next_claims(self) -> Sequence[Claim]:
        ahead = self._ahead.take()
        return ahead or self._consumer.claim(self._settings.batch_items, _BLOCK_S, self._loader.preference())

    def _run_claims(self, claims: Sequence[Claim]) -> None:
        """Run those of loaded bundles, then load one other bundle for its claims. Effects: releases the rest."""
        loaded = [claim for claim in claims if claim.job.bundle in self._bundles.loaded]
        others = [claim for claim in claims if claim.job.bundle not in self._bundles.loaded]
        waiting = [claim for claim in others if claim.job.bundle == others[0].job.bundle]
        self._consumer.release([claim for claim in others if claim not in waiting])
        self._observe_waits([*loaded, *waiting])
        self._run_loaded(loaded, is_last=not waiting)
        if waiting:
            self._finisher.wait()  # a load changes defaults of torch for every thread
            self._run_loaded(*self._loader.load(waiting[0].job.bundle, waiting))

    def _run_loaded(self, claims: Sequence[Claim], load_s: float = 0.0, is_last: bool = True) -> None:
        """Run claims in batches. With the last of them the next claims come, if these are the last (`is_last`)."""
        items = items_together(self._device.kind, len(claims), self._settings.batch_items)
        batches = plan_batch(claims, self._bundles.grids, items, self._settings.batch_budget_latent_px)
        for number, batch in enumerate(batches, 1):
            if self._drain.is_requested():
                self._consumer.release(batch)
                continue
            held = [replace(claim, idle_s=claim.held_s()) for claim in batch if self._consumer.holds(claim)]
            runs_alone = batch[0].delivery > 1  # it may have ended its worker: nothing else is to end with it
            if runs_alone:
                self._finisher.wait()
            elif is_last and number == len(batches) and self._max_finishing:
                self._ahead.start(self._loader.preference())
            if held:
                self._run_batch(held, load_s)
            if runs_alone:
                self._finisher.wait()

    def _run_batch(self, batch: Sequence[Claim], load_s: float) -> None:
        """Run one batch of a loaded bundle, which took `load_s` to load for it; its jobs end in the background."""
        job = batch[0].job
        route = self._bundles.use(job.bundle)
        try:
            if isinstance(job.params, UpscaleParams) and not route.role.loads_decoder:
                for claim in batch:  # enqueued before any decoding worker existed; there is nothing to generate
                    self._consumer.transfer(claim, None, {}, [])
                return
            slice_size = self._slice_size(job)
        except NotReady as error:
            self._settler.drop(batch, error)
        except (DoesNotFit, JobFailed) as error:  # the API did not know this worker
            for claim in batch:
                settle(self._settler, claim, to_job_error(error))
        else:
            self._finisher.submit(self._run(batch, route, slice_size, load_s))

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
                self._tracing.waited(claim.job, time.time() - claim.held_s(), claim.waited_s)
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

    def _run(self, batch: Sequence[Claim], route: Route, slice_size: int, load_s: float) -> RanBatch:
        """Run a batch on the device, with its metrics; its trace stays open for the encoding."""
        job, jobs, items = batch[0].job, [claim.job for claim in batch], to_items(batch)
        self._metrics.observe_batch(job.params.kind, len(items))
        route.reset_peak_memory()
        with ExitStack() as stack:
            trace = stack.enter_context(self._tracing.batch(jobs, _trace_attributes(job, route, len(items))))
            run = BatchRun(route, self._consumer, self._drain, trace, self._watchdog, self._filters)
            with log_fields(**batch_fields(batch)):
                try:
                    results = run.run(items, slice_size)
                finally:
                    self._watchdog.pause()
            stack.pop_all()  # only a fault ends the trace here
        device_s = {stage: seconds for stage, seconds in run.clock.stages_s.items() if stage != "encode"}
        self._metrics.count_busy(str(route.device), sum(device_s.values()))
        peak = route.peak_memory()
        self._metrics.set_peak_memory(str(route.device), peak.source, peak.size_bytes)
        warnings = [find_warnings(claim, route) for claim in batch]
        return RanBatch(batch, items, results, warnings, load_s, run.observe_encoding(items), trace, route.engine)


def _trace_attributes(job: Job, route: Route, batch_items: int) -> dict[str, str | float]:
    return {
        "giantleap.kind": job.params.kind,
        "giantleap.bundle": job.bundle,
        "giantleap.method": job.params.method,
        "giantleap.scale": job.params.scale,
        "giantleap.engine": route.engine,
        "giantleap.batch.items": batch_items,
    }
