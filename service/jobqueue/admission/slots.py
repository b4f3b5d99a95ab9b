"""Decides whether one more request for a new job is admitted: pure, without a clock, Redis or an event loop.

`giantleap.service.jobqueue.admission.gate` holds the state of one process.
"""

import math
from dataclasses import dataclass
from enum import Enum, auto

STATE_S = 0.05
"""Lifetime of a queue state, from its arrival: a starved process must not discard it at once."""
STATISTICS_S = 0.25
"""Lifetime of the statistics behind `Retry-After`. The number of jobs also comes with every reply to a new job."""
CONTENTION_S = 1.0
"""How long after the queue was full, or requests had to wait, a request needs a slot that is known to be free."""


class Decision(Enum):
    """The outcome for one request. It waits for the release of a permit (WAIT) or for a newer state (REFRESH)."""

    ADMIT = auto()
    REFUSE = auto()
    WAIT = auto()
    REFRESH = auto()


@dataclass(slots=True)
class Slots:
    """The free slots of a queue as one process knows them.

    An admitted request holds a permit until the queue replies. Permits never exceed the free slots; further requests
    wait, cheaply, until a permit is released. A permit alone refuses no other request, since its own may still fail.

    Attributes:
        limit: Maximum number of jobs in the queue.
        permits: Admitted requests without a reply of the queue.
    """

    limit: int
    permits: int = 0
    _free: int = 0  # when `_ended` jobs had ended
    _ended: int = 0
    _state_s: float = -math.inf
    _statistics_s: float = -math.inf
    _contended_s: float = -math.inf

    def decide(self, now_s: float, ended: int) -> Decision:
        """Decide on one request.

        Args:
            now_s: Time of the clock that all calls share.
            ended: Jobs that have ended since this process started to listen.
        """
        if not self.is_contended(now_s):
            return Decision.ADMIT if self.permits < self.limit else Decision.WAIT
        if now_s >= self._state_s + STATE_S:
            return Decision.REFRESH
        free = self._free + ended - self._ended
        if free <= 0:
            return Decision.REFUSE
        return Decision.ADMIT if self.permits < free else Decision.WAIT

    def is_contended(self, now_s: float) -> bool:
        """Whether there were recently more requests than slots."""
        return now_s < self._contended_s + CONTENTION_S

    def needs_refresh(self, now_s: float) -> bool:
        """Whether to refresh the state now, so that the next one arrives before this one expires."""
        return now_s >= min(self._state_s + STATE_S / 2, self._statistics_s + STATISTICS_S)

    def record_jobs(self, jobs: int, now_s: float, ended: int) -> None:
        """Record the number of jobs in the queue from the reply to a new one."""
        self._free, self._ended = self.limit - jobs, ended
        if self._free <= 0:
            self.record_contention(now_s)
        if now_s < self._statistics_s + STATISTICS_S:
            self._state_s = now_s

    def record_contention(self, now_s: float) -> None:
        """Record that the queue is full or that requests must wait."""
        self._contended_s = now_s

    def record_state(self, jobs: int, now_s: float, ended: int) -> None:
        """Record a state that was read, or that came with a refusal."""
        self._statistics_s = now_s
        self.record_jobs(jobs, now_s, ended)

    def open(self) -> None:
        """End the contention: the state of the queue cannot be read."""
        self._contended_s = -math.inf
