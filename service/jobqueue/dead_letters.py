"""Jobs that failed for good: list them, enqueue one again, or drop it. For operators; clients see their own jobs.

The scripts that end a job add it to the dead-letter stream (`lua/includes/close_failed.lua`) and leave its input, so
that a retry is possible until the record or the input has expired.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from giantleap.service.errors import Conflict, NotFound
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.producer import Enqueued, JobProducer
from giantleap.service.jobqueue.replies import DeadLetter
from giantleap.service.jobs.job import Job, UpscaleParams

_ALL = 10_000  # the stream is trimmed to about a thousand
_RETRIES = uuid.UUID("6d1a3c52-6a0f-4a53-9c53-2f1f6f0a6b1e")
"""Namespace of the ids of retries: one of a dead letter has one id, so that a repeated request makes one job."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The job that a dead letter became."""

    job: Job
    enqueued: Enqueued


def needs_input(job: Job) -> bool:
    """Whether a job cannot run without its input blob."""
    return isinstance(job.params, UpscaleParams) or job.params.strength is not None


def blocked_reason(letter: DeadLetter) -> str | None:
    """Why a dead letter cannot be enqueued again; None if it can."""
    if letter.job is None:
        return "its record has expired"
    if needs_input(letter.job) and not letter.has_input:
        return "its input has expired, or went to make room"
    return None


class DeadLetters:
    """The dead-letter stream of a deployment."""

    def __init__(self, producer: JobProducer) -> None:
        self._producer = producer

    async def list(self, max_jobs: int) -> Sequence[DeadLetter]:
        """The jobs that failed for good, the latest first."""
        return (await self._producer.run(scripts.LIST_DEAD_LETTERS, {"max_jobs": max_jobs})).letters

    async def retry(self, job_id: str) -> Retry:
        """Enqueue a job again, under a new id: the job that failed stays failed. Removes it from the stream.

        Effects: safe to repeat, also after a lost reply: the new job has one id.

        Raises:
            NotFound: The stream does not hold the job.
            Conflict: The job cannot run again.
            GiantleapError: As `JobProducer.enqueue`; the job then stays in the stream.
        """
        letter = await self._find(job_id)
        reason = blocked_reason(letter)
        if letter.job is None or reason is not None:
            raise Conflict(f"the job cannot be enqueued again: {reason}; drop it")
        body = await self._producer.read_input(job_id) if needs_input(letter.job) else None
        new_id = str(uuid.uuid5(_RETRIES, f"{job_id} {letter.failed_at_ms}"))
        # A deadline counts from the acceptance of the first job, and has passed or is of no use.
        job = replace(letter.job, id=new_id, created_at_s=time.time(), cancel_after_s=None)
        enqueued = await self._producer.enqueue(job, body)
        await self.drop(job_id)
        return Retry(job, enqueued)

    async def drop(self, job_id: str) -> None:
        """Remove a job from the stream; its record stays until it expires.

        Raises:
            NotFound: The stream does not hold the job.
        """
        if not (await self._producer.run(scripts.DROP_DEAD_LETTER, {"id": job_id})).dropped:
            raise NotFound("no dead letter has this id; `GET /dead-letters` lists those that exist")

    async def _find(self, job_id: str) -> DeadLetter:
        for letter in await self.list(_ALL):
            if letter.id == job_id:
                return letter
        raise NotFound("no dead letter has this id; `GET /dead-letters` lists those that exist")
