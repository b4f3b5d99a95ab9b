"""Refuses a crowd by what is known of a full queue, without a request to Redis for each caller.

`giantleap.service.jobqueue.admission.places` decides; this reads the queue for it and wakes who waits. The requests
come from `giantleap.service.api.middleware.early_refusal`, and those that it leaves from the authentication.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from giantleap.service.errors import NotReady, QueueFull
from giantleap.service.jobqueue.admission.places import Answer, Places
from giantleap.service.jobqueue.backpressure import queue_full, retry_after_s
from giantleap.service.jobqueue.client import cancel_tasks
from giantleap.service.jobqueue.completions import CompletionListener
from giantleap.service.jobs.job import QueueStats

TICKET_S = 1.0
"""For how long a ticket counts: a body that comes slowly, or a Redis that hangs, must not stop others for longer."""

_UNDECIDED = (Answer.WAIT, Answer.READ)


class Ticket:
    """The place of one request until the queue has answered it, or it has ended. Settling twice does nothing."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back: Callable[[], None] | None = give_back
        self._timer = asyncio.get_running_loop().call_later(TICKET_S, self.settle)

    def settle(self) -> None:
        """Gives the place back."""
        if self._give_back is not None:
            self._timer.cancel()
            self._give_back()
            self._give_back = None


class QueueGate:
    """The places of one queue as one process knows them. `enqueue.lua` has the last word in any case.

    Without a crowd it reads nothing, and as many requests pass at once as the queue takes jobs.

    Args:
        read_stats: Reads the queue; `NotReady` opens the gate.
        completions: Counts the jobs that end.
        limit: Of the jobs in the queue.
        clock: Seconds.
    """

    def __init__(
        self,
        read_stats: Callable[[], Awaitable[QueueStats]],
        completions: CompletionListener,
        limit: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_stats = read_stats
        self._completions = completions
        self._places = Places(limit)
        self._clock = clock
        self._refusal: QueueFull | None = None
        self._waiting: deque[asyncio.Future[Ticket | QueueFull]] = deque()
        self._reading: asyncio.Task[None] | None = None

    @property
    def tickets(self) -> int:
        """How many are not settled."""
        return self._places.tickets

    def ask(self) -> Ticket | QueueFull | None:
        """A ticket, the refusal of a queue that is known to be full, or None where one must wait. Costs little."""
        decision = self._decide()
        return None if self._waiting or decision in _UNDECIDED else self._answer(decision)

    def must_wait(self) -> bool:
        """Whether `ask` would return None: the answer is not known yet, or others wait for theirs."""
        return bool(self._waiting) or self._decide() in _UNDECIDED

    def wait(self) -> asyncio.Future[Ticket | QueueFull]:
        """The answer, when it is known; who does not want it any longer cancels it."""
        answer: asyncio.Future[Ticket | QueueFull] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        self._serve()
        return answer

    async def admit(self) -> Ticket | QueueFull:
        """As `ask`, when it is known."""
        return self.ask() or await self.wait()

    def put_jobs(self, jobs: int) -> None:
        """Takes the number of jobs in the queue, the one that it has just accepted included."""
        self._places.put_jobs(jobs, self._clock(), self._completions.ended)

    def close(self, refusal: QueueFull) -> None:
        """Takes the refusal of a full queue, which has just arrived."""
        self._put_state(self._places.limit, refusal)

    async def stop(self) -> None:
        """Ends a read that is under way."""
        if self._reading is not None:
            await cancel_tasks((self._reading,))

    def _decide(self) -> Answer:
        return self._places.decide(self._clock(), self._completions.ended)

    def _answer(self, decision: Answer) -> Ticket | QueueFull:
        if decision is Answer.REFUSE and self._refusal is not None:
            if self._places.is_aging(self._clock()):
                self._start_read()
            return self._refusal
        self._places.tickets += 1
        return Ticket(self._take_back)

    def _serve(self) -> None:
        """Answers all who wait, as far as the answers are known."""
        while self._waiting:
            decision = self._decide()
            if decision is Answer.READ:
                self._start_read()
            if decision in _UNDECIDED:
                self._places.put_crowd(self._clock())
                return
            # If not all can pass, the newest do, which have waited least; the others are refused by a full queue.
            too_many = len(self._waiting) > self._places.limit
            waiting = self._waiting.pop() if too_many else self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(self._answer(decision))

    def _take_back(self) -> None:
        self._places.tickets -= 1
        self._serve()

    def _start_read(self) -> None:
        if self._reading is None:
            self._reading = asyncio.create_task(self._read(), name="queue-gate")

    async def _read(self) -> None:
        stats = None
        try:
            stats = await self._read_stats()
        except NotReady:
            pass
        finally:  # however it ends, nobody waits for it any longer
            self._reading = None
            if stats is None:
                self._places.open()
                self._serve()
        if stats is not None:
            jobs = sum(stats.queued.values()) + stats.processing + stats.delayed
            limit = self._places.limit
            self._put_state(jobs, queue_full(f"{max(jobs, limit)} jobs", limit, retry_after_s(stats)))

    def _put_state(self, jobs: int, refusal: QueueFull) -> None:
        known = self._refusal
        if known is None or (known.detail, known.retry_after_s) != (refusal.detail, refusal.retry_after_s):
            self._refusal = refusal  # else the same one, of which the response is known
        self._places.put_state(jobs, self._clock(), self._completions.ended)
        self._serve()
