"""Admission control: rejects new jobs from a cached state while the queue is full, without a Redis call per request.

`giantleap.service.jobqueue.admission.slots` decides. This module refreshes the state and resolves waiting requests. The
callers are `giantleap.service.api.middleware.early_refusal` and, for requests that it passes on, the authentication.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from giantleap.service.errors import NotReady, QueueFull
from giantleap.service.jobqueue.admission.slots import Decision, Slots
from giantleap.service.jobqueue.backpressure import queue_full, retry_after_s
from giantleap.service.jobqueue.client import cancel_tasks
from giantleap.service.jobqueue.completions import CompletionListener
from giantleap.service.jobs.job import QueueStats

PERMIT_S = 1.0
"""Lifetime of a permit: a slow request body or a hanging Redis blocks other requests for no longer than this."""

_UNDECIDED = (Decision.WAIT, Decision.REFRESH)


class Permit:
    """One request that was admitted and has no reply of the queue yet. Releasing it twice has no effect."""

    def __init__(self, on_release: Callable[[], None]) -> None:
        self._on_release: Callable[[], None] | None = on_release
        self._timer = asyncio.get_running_loop().call_later(PERMIT_S, self.release)

    def release(self) -> None:
        """Free the slot for another request."""
        if self._on_release is not None:
            self._timer.cancel()
            self._on_release()
            self._on_release = None


class QueueGate:
    """Admission to one queue, per process. `enqueue.lua` enforces the limit in any case.

    Without contention the state is never read: up to `limit` requests are in flight at once.

    Args:
        read_stats: Reads the queue. If it raises `NotReady`, all waiting requests are admitted.
        completions: Counts finished jobs.
        limit: Maximum number of jobs in the queue.
        clock: Monotonic time in seconds.
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
        self._slots = Slots(limit)
        self._clock = clock
        self._refusal: QueueFull | None = None
        self._waiting: deque[asyncio.Future[Permit | QueueFull]] = deque()
        self._refresh_task: asyncio.Task[None] | None = None

    @property
    def permits(self) -> int:
        """Number of permits that are not released."""
        return self._slots.permits

    def try_admit(self) -> Permit | QueueFull | None:
        """Decide at once: a permit, a refusal, or None if the request must `wait`."""
        decision = self._decide()
        return None if self._waiting or decision in _UNDECIDED else self._apply(decision)

    def must_wait(self) -> bool:
        """Whether `try_admit` would return None: the state is unknown, or earlier requests are waiting."""
        return bool(self._waiting) or self._decide() in _UNDECIDED

    def wait(self) -> asyncio.Future[Permit | QueueFull]:
        """Return a future of the decision. Cancel it to withdraw the request."""
        decision: asyncio.Future[Permit | QueueFull] = asyncio.get_running_loop().create_future()
        self._waiting.append(decision)
        self._resolve_waiting()
        return decision

    async def admit(self) -> Permit | QueueFull:
        """Decide, waiting if necessary."""
        return self.try_admit() or await self.wait()

    def record_jobs(self, jobs: int) -> None:
        """Record the number of jobs in the queue, as its reply to an accepted job states it."""
        self._slots.record_jobs(jobs, self._clock(), self._completions.ended)

    def record_full(self, refusal: QueueFull) -> None:
        """Record that the queue has just refused a job."""
        self._put_state(self._slots.limit, refusal)

    async def stop(self) -> None:
        """Cancel a refresh in progress."""
        if self._refresh_task is not None:
            await cancel_tasks((self._refresh_task,))

    def _decide(self) -> Decision:
        return self._slots.decide(self._clock(), self._completions.ended)

    def _apply(self, decision: Decision) -> Permit | QueueFull:
        if decision is Decision.REFUSE and self._refusal is not None:
            if self._slots.needs_refresh(self._clock()):
                self._start_refresh()
            return self._refusal
        self._slots.permits += 1
        return Permit(self._release_permit)

    def _resolve_waiting(self) -> None:
        """Resolve waiting requests until one cannot be decided yet."""
        while self._waiting:
            decision = self._decide()
            if decision is Decision.REFRESH:
                self._start_refresh()
            if decision in _UNDECIDED:
                self._slots.record_contention(self._clock())
                return
            # Beyond the limit most will be refused: admit the newest, so that an accepted job has waited little.
            too_many = len(self._waiting) > self._slots.limit
            waiting = self._waiting.pop() if too_many else self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(self._apply(decision))

    def _release_permit(self) -> None:
        self._slots.permits -= 1
        self._resolve_waiting()

    def _start_refresh(self) -> None:
        if self._refresh_task is None:
            self._refresh_task = asyncio.create_task(self._refresh(), name="queue-gate-refresh")

    async def _refresh(self) -> None:
        stats = None
        try:
            stats = await self._read_stats()
        except NotReady:
            pass
        finally:  # also if it was canceled or failed: nothing waits for it then
            self._refresh_task = None
            if stats is None:
                self._slots.open()
                self._resolve_waiting()
        if stats is not None:
            jobs = sum(stats.queued.values()) + stats.processing + stats.delayed
            limit = self._slots.limit
            self._put_state(jobs, queue_full(f"{max(jobs, limit)} jobs", limit, retry_after_s(stats)))

    def _put_state(self, jobs: int, refusal: QueueFull) -> None:
        known = self._refusal
        if known is None or (known.detail, known.retry_after_s) != (refusal.detail, refusal.retry_after_s):
            self._refusal = refusal  # keep an equal one: its response is cached by identity
        self._slots.record_state(jobs, self._clock(), self._completions.ended)
        self._resolve_waiting()
