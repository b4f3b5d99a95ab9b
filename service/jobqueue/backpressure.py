"""When a full queue refuses a job, and when the caller may try again: functions of the queue's statistics.

`QueueGate` refuses a crowd by what is known, without a request to Redis for each caller.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from giantleap.service.errors import (
    GiantleapError,
    NotReady,
    OverBudget,
    QueueFull,
    StorageFull,
    TooManyJobs,
    WorkLimited,
)
from giantleap.service.jobqueue.client import cancel_tasks
from giantleap.service.jobqueue.completions import CompletionListener
from giantleap.service.jobqueue.keys import FINISH
from giantleap.service.jobqueue.replies import EnqueueReply
from giantleap.service.jobs.grid import Charge
from giantleap.service.jobs.job import Job, QueueStats
from giantleap.service.settings import Settings

STATE_S = 0.05
"""For how long what was read of the queue counts, from its arrival: a starved process must not doubt it at once."""
_MAX_RETRY_S = 600
_CROWD_S = 1.0  # after the last refusal of a crowd; then the enqueue script alone decides again


class QueueGate:
    """Knows while callers are being refused how many more jobs the queue takes, from a state of the last 50 ms.

    Each admitted request takes one place, and each job that ends gives one back. Without refusals the gate is open and
    costs nothing; `enqueue.lua` has the last word in any case.

    Args:
        read_stats: Reads the queue; `NotReady` opens the gate.
        completions: Counts the jobs that end.
        limit: Of the jobs in the queue.
    """

    def __init__(
        self, read_stats: Callable[[], Awaitable[QueueStats]], completions: CompletionListener, limit: int
    ) -> None:
        self._read_stats = read_stats
        self._completions = completions
        self._limit = limit
        self._refusal: QueueFull | None = None
        self._places = 0
        self._fresh_until_s = self._crowd_until_s = -math.inf
        self._reading: asyncio.Task[None] | None = None

    def close(self, refusal: QueueFull, places: int = 0) -> None:
        """Keeps the state of the queue, which has just arrived, for as long as it counts."""
        now_s = time.monotonic()
        self._refusal, self._places = refusal, places - self._completions.ended
        self._fresh_until_s = now_s + STATE_S
        if places <= 0:
            self._crowd_until_s = now_s + _CROWD_S

    def known_refusal(self) -> QueueFull | None:
        """The refusal of a queue that is known to be full now; costs little. Renews a state of half its age."""
        left_s = self._fresh_until_s - time.monotonic()
        refusal = self._refusal_if_full() if left_s > 0 else None
        if refusal is not None and left_s < STATE_S / 2:
            self._start_read()
        return refusal

    async def admit(self) -> QueueFull | None:
        """Takes a place for one request; returns the refusal if there is none. Callers share the read of the state."""
        if self._refusal is None:
            return None
        now_s = time.monotonic()
        if now_s >= self._crowd_until_s:
            self._refusal = None
            return None
        if now_s >= self._fresh_until_s:
            await asyncio.wait((self._start_read(),))
        refusal = self._refusal_if_full()
        self._places -= refusal is None
        return refusal

    def _refusal_if_full(self) -> QueueFull | None:
        return self._refusal if self._places + self._completions.ended <= 0 else None

    def _start_read(self) -> asyncio.Task[None]:
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(), name="queue-gate")
        return self._reading

    async def _read(self) -> None:
        try:
            stats = await self._read_stats()
        except NotReady:
            self._refusal = None
            return
        jobs = sum(stats.queued.values()) + stats.processing + stats.delayed
        refusal = _queue_full(f"{max(jobs, self._limit)} jobs", self._limit, retry_after_s(stats))
        self.close(refusal, self._limit - jobs)

    async def stop(self) -> None:
        """Ends a read that is under way."""
        if self._reading is not None:
            await cancel_tasks((self._reading,))


def retry_after_s(stats: QueueStats) -> int:
    """Whole seconds after which a refused caller may try again: depth x median / workers, 1 to 600.

    A waiting job counts with the median of its queue, one that runs or waits for a retry with the median of all. Before
    the first job has ended, a job counts one second. With workers of one role, the slower half of the route counts.
    """
    any_s = 1.0 if stats.recent_job_median_s is None else stats.recent_job_median_s
    work_s = {False: 0.0, True: 0.0}
    for (queue, _), jobs in stats.queued.items():
        work_s[queue.endswith(FINISH)] += jobs * stats.queue_median_s.get(queue, any_s)
    workers = max(1, stats.live_workers)
    running_s = any_s * (stats.processing + stats.delayed) / workers
    waiting_s = max(
        sum(work_s.values()) / workers,
        work_s[False] / max(1, workers - stats.decode_workers),
        work_s[True] / max(1, workers - stats.generate_workers),
    )
    return min(_MAX_RETRY_S, max(1, math.ceil(running_s + waiting_s)))


def to_refusal(
    reply: EnqueueReply,
    job: Job,
    input_bytes: int,
    max_live: int | None,
    charge: Charge | None,
    *,
    settings: Settings,
    retry_s: int,
) -> GiantleapError:
    """The error for a job that the enqueue script refused."""
    if reply.status == "work" and charge is not None:
        return _to_work_refusal(reply, charge)
    if reply.status == "busy":
        return TooManyJobs(
            f"{reply.amount} jobs of this key are queued or running, {max_live} are allowed; wait for one to end.",
            retry_after_s=retry_s,
        )
    if reply.status == "storage":
        return StorageFull(
            f"The input has {input_bytes} bytes, {reply.amount} of {settings.blob_budget_bytes} are in use; try again "
            "when running jobs have ended.",
            retry_after_s=retry_s,
        )
    limit, what = settings.queue_limit, "jobs"
    if reply.status == "full_px":
        limit, what = settings.queue_limit_latent_px or 0, f"latent pixels besides the {job.latent_px} of this job"
    return _queue_full(f"{reply.amount} {what}", limit, retry_s)


def _queue_full(what: str, limit: int, retry_s: int) -> QueueFull:
    return QueueFull(
        f"{what} are in the queue, {limit} are allowed; try again after the time in Retry-After.",
        retry_after_s=retry_s,
    )


def _to_work_refusal(reply: EnqueueReply, charge: Charge) -> WorkLimited:
    needed, per_minute = round(charge.pixel_steps / 1e6, 3), charge.megapixel_steps_per_minute
    what = f"The job is {needed:g} megapixel-steps of work, this key may use {per_minute} a minute"
    if charge.is_too_large:
        return OverBudget(
            f"{what}: send fewer or smaller images, fewer steps, or another method.",
            needed=needed,
            per_minute=per_minute,
        )
    return WorkLimited(
        f"{what} and has used most of them; try again after the time in Retry-After.",
        needed=needed,
        per_minute=per_minute,
        retry_after_s=math.ceil(reply.wait_us / 1e6),
    )
