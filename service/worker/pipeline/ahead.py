"""Claims the jobs of the next batch and reads their inputs while the device works on another."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from giantleap.service.jobqueue.claims import Claim, LoadedBundles
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.worker.drain import Drain
from giantleap.service.worker.pipeline.claim_watch import ClaimWatch
from giantleap.service.worker.settlement import JobSettler


class ClaimAhead:
    """The claims for the next batch, at most one claim's worth. One thread calls its methods.

    Meanwhile their leases are renewed, and those that are canceled, overdue or to be returned at a drain end at once.

    Args:
        consumer: An open queue.
        settler: Ends the jobs that do not run.
        drain: When to return them.
        max_jobs: Of one claim.
        pool: Where they are claimed and watched; a thread of it must be free.
    """

    def __init__(
        self, consumer: JobConsumer, settler: JobSettler, drain: Drain, max_jobs: int, pool: ThreadPoolExecutor
    ) -> None:
        self._consumer = consumer
        self._settler = settler
        self._drain = drain
        self._max_jobs = max_jobs
        self._pool = pool
        self._wanted = threading.Event()
        self._claims: Future[Sequence[Claim]] | None = None

    def start(self, loaded: LoadedBundles | None) -> None:
        """Start to claim; `loaded` as for `JobConsumer.claim`. Call `take` before the next start."""
        self._wanted.clear()
        self._claims = self._pool.submit(self._claim, loaded)

    def take(self) -> Sequence[Claim]:
        """The claims that were started for; none if nothing was started."""
        claims, self._claims = self._claims, None
        self._wanted.set()
        return [] if claims is None else claims.result()

    def _claim(self, loaded: LoadedBundles | None) -> Sequence[Claim]:
        watch = ClaimWatch(
            self._consumer.claim_ahead(self._max_jobs, loaded), self._consumer, self._settler, self._drain
        )
        watch.watch_until(self._wanted)
        return watch.remaining
