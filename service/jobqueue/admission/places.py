"""Whether one more request for a new job may pass: a decision of values, without a clock, Redis or the event loop.

`giantleap.service.jobqueue.admission.gate` keeps the values of one process.
"""

import math
from dataclasses import dataclass
from enum import Enum, auto

STATE_S = 0.05
"""For how long what was read of the queue counts, from its arrival: a starved process must not doubt it at once."""
STATISTICS_S = 0.25
"""For how long the time that a refusal names counts; the number of jobs also comes with the replies to them."""
CROWD_S = 1.0
"""For how long after the queue was full, or requests had to wait, they pass only into places known to be free."""


class Answer(Enum):
    """What becomes of a request. It waits for a ticket to be settled, or for a newer state of the queue."""

    ADMIT = auto()
    REFUSE = auto()
    WAIT = auto()
    READ = auto()


@dataclass(slots=True)
class Places:
    """What one process knows of the free places of a queue.

    Each request that passes holds a ticket until the queue has answered it: no more pass at once than there are places,
    and what follows waits, at little cost, until it is known whether there is a place for it. Nobody is refused for the
    ticket of another, who may yet fail.

    Attributes:
        limit: Of the jobs in the queue.
        tickets: Requests that have passed and wait for the queue's answer.
    """

    limit: int
    tickets: int = 0
    _free: int = 0  # when `_ended` jobs had ended
    _ended: int = 0
    _state_s: float = -math.inf
    _statistics_s: float = -math.inf
    _crowd_s: float = -math.inf

    def decide(self, now_s: float, ended: int) -> Answer:
        """The answer to one request.

        Args:
            now_s: The time of the same clock as of the other calls.
            ended: How many jobs have ended since this process listens.
        """
        if not self.is_crowded(now_s):
            return Answer.ADMIT if self.tickets < self.limit else Answer.WAIT
        if now_s >= self._state_s + STATE_S:
            return Answer.READ
        free = self._free + ended - self._ended
        if free <= 0:
            return Answer.REFUSE
        return Answer.ADMIT if self.tickets < free else Answer.WAIT

    def is_crowded(self, now_s: float) -> bool:
        """Whether more requests than places were seen a moment ago."""
        return now_s < self._crowd_s + CROWD_S

    def is_aging(self, now_s: float) -> bool:
        """Whether the queue should be read again, so that a newer state is there before this one no longer counts."""
        return now_s >= min(self._state_s + STATE_S / 2, self._statistics_s + STATISTICS_S)

    def put_jobs(self, jobs: int, now_s: float, ended: int) -> None:
        """Takes the number of jobs in the queue from the reply to one of them."""
        self._free, self._ended = self.limit - jobs, ended
        if self._free <= 0:
            self.put_crowd(now_s)
        if now_s < self._statistics_s + STATISTICS_S:
            self._state_s = now_s

    def put_crowd(self, now_s: float) -> None:
        """Takes that the queue is full, or that requests must wait."""
        self._crowd_s = now_s

    def put_state(self, jobs: int, now_s: float, ended: int) -> None:
        """Takes the state of the queue as it was read, or as it refused a job."""
        self._statistics_s = now_s
        self.put_jobs(jobs, now_s, ended)

    def open(self) -> None:
        """Forgets the crowd: nothing can be known of the queue now."""
        self._crowd_s = -math.inf
