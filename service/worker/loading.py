"""Loads a bundle for claimed jobs, which meanwhile can be canceled, pass their deadline, or go back at a drain.

A load is one call of minutes that nothing can interrupt. So a thread looks after its jobs
(`giantleap.service.worker.pipeline.claim_watch`). The watchdog sees a load as one step; the leases are renewed as ever.
Two loads never overlap, nor a load and a batch: libraries that load weights change torch's defaults for the whole
process meanwhile.
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch

from giantleap.service.errors import BundleNotLoaded
from giantleap.service.jobqueue.claims import Claim, LoadedBundles
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.job import JobError
from giantleap.service.telemetry.logs import log_fields
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.worker.bundles import BundleCache
from giantleap.service.worker.drain import Drain
from giantleap.service.worker.items import to_job_error
from giantleap.service.worker.pipeline.claim_watch import ClaimWatch, settle
from giantleap.service.worker.settlement import JobSettler
from giantleap.service.worker.watchdog import Watchdog

log = logging.getLogger(__name__)


class BundleLoader:
    """Decides whether jobs of loaded bundles go first, and loads a bundle for jobs of another.

    Args:
        cache: The bundles.
        consumer: An open queue.
        settler: Ends the jobs that do not run.
        metrics: Where failures are counted.
        watchdog: What ends the process if a load hangs.
        drain: When to stop.
        loaded_first_s: How long after a load jobs of loaded bundles go first.
        announce: Publishes which bundles are loaded.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        cache: BundleCache,
        consumer: JobConsumer,
        settler: JobSettler,
        metrics: Metrics,
        watchdog: Watchdog,
        drain: Drain,
        loaded_first_s: float,
        announce: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._consumer = consumer
        self._settler = settler
        self._metrics = metrics
        self._watchdog = watchdog
        self._drain = drain
        self._loaded_first_s = loaded_first_s
        self._announce = announce
        self._clock = clock
        self._loaded_at_s = clock()

    def preference(self) -> LoadedBundles | None:
        """What the next claim takes first; None if every bundle is loaded."""
        if self._cache.holds_all:
            return None
        return LoadedBundles(self._cache.loaded, self._clock() - self._loaded_at_s < self._loaded_first_s)

    def load(self, name: str, claims: Sequence[Claim]) -> tuple[list[Claim], float]:
        """Load a bundle for its claims.

        Effects: evicts others; a `loading` event of each job; ends or returns the jobs that do not wait to the end. If
        the bundle cannot be loaded, its jobs fail as retryable and nothing of it stays.

        Returns:
            The claims that can run now, and the seconds of the load.
        """
        if self._drain.is_requested():
            self._consumer.release(claims)
            return [], 0.0
        started_s = self._clock()
        failure: JobError | None = None
        ids = [claim.job.id for claim in claims]
        self._watchdog.progress("load", ids)
        with log_fields(job_ids=ids), ClaimWatch(claims, self._consumer, self._settler, self._drain) as watch:
            self._cache.make_room(name)
            self._announce()
            for claim in claims:
                self._consumer.emit(claim, "loading", {"bundle": name})
                self._watchdog.keepalive()
            try:
                self._cache.load(name)
            except torch.AcceleratorError:
                raise  # this process has lost its device context
            except Exception as error:
                log.error("bundle %s was not loaded", name, exc_info=error)
                failure = to_job_error(_to_fault(name, error))
        self._watchdog.pause()
        self._announce()
        self._loaded_at_s = self._clock()  # also after a failure: a broken bundle costs the others no more than this
        if failure is None:
            return watch.remaining, self._loaded_at_s - started_s
        self._cache.free()  # after the handler, whose frames hold what was loaded
        self._metrics.count_load_failure(name)
        for claim in watch.remaining:
            settle(self._settler, claim, failure)
        return [], 0.0


def _to_fault(name: str, error: Exception) -> BundleNotLoaded:
    kind = type(error).__name__
    return BundleNotLoaded(
        f"bundle {name} could not be loaded ({kind}; the worker's log has the cause); other bundles are served: try "
        "again later"
    )
