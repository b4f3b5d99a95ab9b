"""Listens for the ends of jobs and wakes the requests that wait for them: one connection for all requests of a process.

The script that ends a job publishes its outcome (`close_job.lua`), so that nobody reads the record of a job that the
same process has enqueued. `giantleap.service.jobqueue.producer.JobProducer.wait` waits here.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from pydantic import TypeAdapter

from giantleap.service.jobqueue.client import AsyncRedis
from giantleap.service.jobqueue.faults import REDIS_UNAVAILABLE, name_fault
from giantleap.service.jobqueue.replies import StoredJob
from giantleap.service.jobs.job import Job, JobRecord

_READ_S = 1.0
_MAX_OUTCOMES = 4096
_STORED_JOB: TypeAdapter[StoredJob] = TypeAdapter(StoredJob)
_LOG = logging.getLogger(__name__)


class CompletionListener:
    """The latest outcomes published on a channel, and the waiters for them."""

    def __init__(self, redis: AsyncRedis, channel: str) -> None:
        self._redis = redis
        self._channel = channel
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._outcomes: dict[str, str] = {}
        self.ended = 0
        """How many jobs have ended since this process listens, those of other API processes included."""

    async def listen(self) -> None:
        """Runs for ever. After a lost connection it connects again; `JobProducer.wait` polls meanwhile."""
        delay_s = 0.1
        while True:
            try:
                async with self._redis.pubsub() as channel:
                    await channel.subscribe(self._channel)
                    delay_s = 0.1
                    while True:
                        message = await channel.get_message(ignore_subscribe_messages=True, timeout=_READ_S)
                        if message is not None:
                            self.on_completion(message["data"].decode())
            except (*REDIS_UNAVAILABLE, OSError) as error:
                _LOG.warning("listener lost Redis (%s); next attempt in %.1f s", name_fault(error), delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2.0, 2 * delay_s)

    def on_completion(self, message: str) -> None:
        """Wakes the waiters for a job, and stores its outcome for those that are about to wait."""
        job_id, _, outcome = message.partition(" ")
        self.ended += 1
        self._outcomes[job_id] = outcome
        if len(self._outcomes) > _MAX_OUTCOMES:
            del self._outcomes[next(iter(self._outcomes))]
        for wake in self._waiters.get(job_id, ()):
            wake.set()

    def discard(self, job_id: str) -> None:
        """Forgets an outcome, before a job is enqueued: an earlier job, now expired, may have had the same id."""
        self._outcomes.pop(job_id, None)

    def completed_record(self, job: Job) -> JobRecord | None:
        """The final record of a job; None if no outcome has arrived."""
        outcome = self._outcomes.get(job.id)
        return _STORED_JOB.validate_json(outcome).to_record(job) if outcome else None

    @contextlib.contextmanager
    def waiter(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set at each message about the job."""
        wake = asyncio.Event()
        self._waiters.setdefault(job_id, set()).add(wake)
        if job_id in self._outcomes:
            wake.set()
        try:
            yield wake
        finally:
            self._waiters[job_id].discard(wake)
            if not self._waiters[job_id]:
                del self._waiters[job_id]
