"""What a worker does while Redis is away: it tries again, with growing pauses, until there is no point any more."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from giantleap.service.errors import NotReady
from giantleap.service.jobqueue.faults import REDIS_UNAVAILABLE, name_fault

_BACKOFF_CAP_S = 2.0
_MAX_OUTAGE_S = 120.0
_LOG = logging.getLogger(__name__)
Value = TypeVar("Value")


class Outages:
    """The outages of Redis as one worker sees them. Its methods may be called from several threads.

    Args:
        stop: Ends every pause.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._failures = 0

    @property
    def is_away(self) -> bool:
        """Whether the last call failed."""
        return self._failures > 0

    def end(self) -> None:
        """Records that Redis has answered."""
        self._failures = 0

    def wait(self, pause_s: float) -> None:
        """Waits, but not beyond the stop."""
        self._stop.wait(pause_s)

    def pause(self, what: str, error: Exception) -> bool:
        """Records a failure and waits for the next attempt; True if the stop came meanwhile."""
        self._failures += 1
        pause_s = _backoff_s(self._failures)
        _LOG.warning("%s lost Redis (%s); next attempt in %.1f s", what, name_fault(error), pause_s)
        return self._stop.wait(pause_s)

    def retry(self, call: Callable[[], Value], grace_s: float) -> Value:
        """Runs `call` until Redis answers, with growing pauses, for two minutes at most, or `grace_s` after a stop.

        Raises:
            NotReady: Redis did not answer.
        """
        started_s = time.monotonic()
        stopping_s: float | None = None
        failures = 0
        while True:
            try:
                reply = call()
            except REDIS_UNAVAILABLE as error:
                now_s = time.monotonic()
                if self._stop.is_set() and stopping_s is None:
                    stopping_s = now_s
                is_over = stopping_s is not None and now_s >= stopping_s + grace_s
                if is_over or now_s >= started_s + _MAX_OUTAGE_S:
                    raise NotReady(
                        f"Redis did not answer for {now_s - started_s:.0f} s ({name_fault(error)}); it must be "
                        "reachable: look at its log and at GIANTLEAP_REDIS_URL"
                    ) from error
                failures += 1
                pause_s = _backoff_s(failures)
                _LOG.warning("lost Redis (%s); next attempt in %.1f s", name_fault(error), pause_s)
                if stopping_s is None:
                    self._stop.wait(pause_s)
                else:
                    time.sleep(pause_s)
                continue
            self.end()
            return reply


def _backoff_s(failures: int) -> float:
    """The pause after a number of failures in a row: doubles to a cap; jitter spreads many workers."""
    return float(min(_BACKOFF_CAP_S, 0.05 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0))
