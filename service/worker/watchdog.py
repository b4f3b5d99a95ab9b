"""Ends a worker process whose work makes no progress, so that its leases run out and its jobs go to another.

The lease thread renews for a long step and for a hung one alike. `giantleap.service.worker.batch_runner` records every
stage and step here, each thread for itself; if the last one is older than the limit, the process exits with
`EXIT_HUNG`, without clean-up that could hang too. Loading, warm-up and measuring are not watched. A call that never
releases the GIL stops this thread and the lease thread: the jobs go to another worker, the process stays.
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
    """The age of the last progress of each thread of one worker.

    Args:
        limit_s: Longest time without progress.
        end: Ends the process; it does not return.
        clock: Monotonic seconds.
    """

    def __init__(
        self, limit_s: float, end: Callable[[int], object] = os._exit, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit_s = limit_s
        self._end = end
        self._clock = clock
        self._last: dict[int, tuple[float, str, tuple[str, ...]]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Start the thread that checks; safe to repeat after `close`."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def progress(self, stage: str, job_ids: Sequence[str]) -> None:
        """Record progress of this thread: `stage` starts or continues for these jobs."""
        self._last[threading.get_ident()] = (self._clock(), stage, tuple(job_ids))

    def keepalive(self) -> None:
        """Restart the time of the last progress after a call to Redis, which has a timeout of its own."""
        if (last := self._last.get(threading.get_ident())) is not None:
            self._last[threading.get_ident()] = (self._clock(), last[1], last[2])

    def pause(self) -> None:
        """Stop watching this thread until its next progress."""
        self._last.pop(threading.get_ident(), None)

    def check(self) -> bool:
        """Whether the running stage hangs. Effects: if so, one log line and the end of the process."""
        last = min(self._last.copy().values(), default=None)  # of the thread without progress for longest
        if last is None or self._clock() - last[0] <= self._limit_s:
            return False
        fields = {"stage": last[1], "job_ids": sorted(last[2]), "limit_s": self._limit_s}
        log.critical("no progress: this worker ends itself, its jobs go to another", extra={"fields": fields})
        for handler in logging.getLogger().handlers:
            with suppress(ValueError, OSError):  # a closed or full stream must not keep the process alive
                handler.flush()
        self._end(EXIT_HUNG)
        return True

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._limit_s / _CHECKS_PER_LIMIT)):
            if self.check():
                return
