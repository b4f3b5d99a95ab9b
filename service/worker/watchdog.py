"""Ends a worker process whose work makes no progress, so that its leases run out and its jobs go to another.

A lease thread cannot tell a long step from a hung one: it renews for both. `giantleap.service.worker.batch_runner`
marks every stage and step here; a mark that grows older than the limit ends the process with `EXIT_HUNG`, without
any clean-up that could hang too. Loading, warm-ups and measuring are not watched: nothing is marked then. A call that
never gives the GIL back stops this thread as it stops the lease thread: its jobs go to another worker, the process
stays.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from giantleap.service.errors import EXIT_HUNG

_CHECKS_PER_LIMIT = 4
log = logging.getLogger(__name__)


class Watchdog:
    """The age of the last progress of one worker.

    Args:
        limit_s: Longest time between two marks.
        end: What ends the process; it does not return.
        clock: Monotonic seconds.
    """

    def __init__(
        self, limit_s: float, end: Callable[[int], object] = os._exit, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit_s = limit_s
        self._end = end
        self._clock = clock
        self._mark: tuple[float, str, tuple[str, ...]] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Starts the thread that looks; safe to repeat after `close`."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def mark(self, stage: str, job_ids: Sequence[str]) -> None:
        """Progress was made; `stage` begins or goes on for these jobs."""
        self._mark = (self._clock(), stage, tuple(job_ids))

    def touch(self) -> None:
        """What was marked last goes on: its call of Redis, which is bounded, has come back."""
        mark = self._mark
        if mark is not None:
            self._mark = (self._clock(), mark[1], mark[2])

    def rest(self) -> None:
        """Nothing runs: nothing can hang."""
        self._mark = None

    def check(self) -> bool:
        """Whether what runs is hung. Effects: one log line and the end of the process if so."""
        mark = self._mark
        if mark is None or self._clock() - mark[0] <= self._limit_s:
            return False
        fields = {"stage": mark[1], "job_ids": sorted(mark[2]), "limit_s": self._limit_s}
        log.critical("no progress: this worker ends itself, its jobs go to another", extra={"fields": fields})
        for handler in logging.getLogger().handlers:
            with suppress(ValueError, OSError):  # a stream that is closed or full must not keep the process
                handler.flush()
        self._end(EXIT_HUNG)
        return True

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._limit_s / _CHECKS_PER_LIMIT)):
            if self.check():
                return
