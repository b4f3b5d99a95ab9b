"""When a stopping worker starts nothing new, and when it gives up running work."""

import threading
import time


class Drain:
    """A requested stop and its grace period.

    Args:
        stop: Set by a signal.
        grace_s: How long running work may continue once the stop is seen.
    """

    def __init__(self, stop: threading.Event, grace_s: float) -> None:
        self._stop = stop
        self._grace_s = grace_s
        self._seen_at_s: float | None = None

    def is_requested(self) -> bool:
        """Whether to start nothing new."""
        if self._stop.is_set() and self._seen_at_s is None:
            self._seen_at_s = time.monotonic()
        return self._stop.is_set()

    def is_expired(self) -> bool:
        """Whether to give up running work."""
        return self.is_requested() and time.monotonic() >= (self._seen_at_s or 0.0) + self._grace_s
