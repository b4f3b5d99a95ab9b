"""Why a queue refuses a job, and when the caller may try again: functions of the queue's statistics."""

import math

from giantleap.service.errors import (
    GiantleapError,
    OverBudget,
    QueueFull,
    StorageFull,
    TooManyJobs,
    WorkLimited,
)
from giantleap.service.jobqueue.keys import FINISH
from giantleap.service.jobqueue.replies import EnqueueReply
from giantleap.service.jobs.grid import Charge
from giantleap.service.jobs.job import Job, QueueStats
from giantleap.service.settings import Settings

_MAX_RETRY_S = 600


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
    return queue_full(f"{reply.amount} {what}", limit, retry_s)


def queue_full(what: str, limit: int, retry_s: int) -> QueueFull:
    """The refusal of a queue in which there are so many jobs, or so much of their latents."""
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
