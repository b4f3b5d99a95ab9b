"""Looks after claims whose jobs do not run yet: it ends those that are no longer wanted, and returns all at a drain."""

import logging
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from giantleap.service.errors import NotReady
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.worker.drain import Drain
from giantleap.service.worker.items import Outcome, Stop
from giantleap.service.worker.settlement import BatchSummary, JobSettler

_POLL_S = 0.5

log = logging.getLogger(__name__)


class ClaimWatch:
    """Watches claims, in a thread of its own inside its context; `remaining` are those that still wait."""

    def __init__(self, claims: Sequence[Claim], consumer: JobConsumer, settler: JobSettler, drain: Drain) -> None:
        self.remaining = list(claims)
        self._consumer = consumer
        self._settler = settler
        self._drain = drain
        self._done = threading.Event()
        self._thread = threading.Thread(target=self.watch_until, args=(self._done,), name="claim-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()

    def watch_until(self, done: threading.Event) -> None:
        """Watch until `done` is set or nothing remains."""
        while self.remaining and not done.wait(_POLL_S):
            if self._drain.is_requested():
                self._end(self.remaining, Stop.RELEASED)
                continue
            stopped = self._consumer.find_canceled(self.remaining)
            self._end([claim for claim in self.remaining if claim.job.id in stopped], Stop.CANCELED)

    def _end(self, claims: Sequence[Claim], stop: Stop) -> None:
        for claim in list(claims):
            self.remaining.remove(claim)
            settle(self._settler, claim, stop)


def settle(settler: JobSettler, claim: Claim, outcome: Outcome) -> None:
    """End a job that did not run. Effects: if Redis does not answer for two minutes it becomes stale and runs again."""
    try:
        settler.settle(claim, [outcome], BatchSummary({}, 0, 1), [])
    except NotReady as error:
        log.error("the end of job %s was not written, it runs again: %s", claim.job.id, error.detail)
