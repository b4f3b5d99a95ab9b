"""Hears of every job that ends and wakes who waits for it: one pub/sub connection for all requests of a process.

The script that ends a job publishes its outcome (`giantleap.service.jobqueue.scripts`), so that nobody has to read the
record of a job that he put in himself. `giantleap.service.jobqueue.producer.JobProducer.wait` waits here.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator

from redis.exceptions import RedisError

from giantleap.service.jobqueue.client import REDIS_UNAVAILABLE, AsyncRedis
from giantleap.service.jobqueue.records import to_record
from giantleap.service.jobs.job import Job, JobRecord

_READ_S = 1.0
_KEPT = 4096
_LOG = logging.getLogger(__name__)


class CompletionListener:
    """The ends of jobs that were published on a channel, the last of them, and who waits for one."""

    def __init__(self, redis: AsyncRedis, channel: str) -> None:
        self._redis = redis
        self._channel = channel
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._outcomes: dict[str, str] = {}

    async def listen(self) -> None:
        """For ever; after a lost connection it connects again, and `JobProducer.wait` polls meanwhile."""
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
            except (*REDIS_UNAVAILABLE, RedisError, OSError) as error:  # any: without a listener every wait would poll
                _LOG.warning("listener lost Redis (%s); again in %.1f s", type(error).__name__, delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2.0, 2 * delay_s)

    def on_completion(self, message: str) -> None:
        """Wakes who waits for a job, and keeps its outcome for a while for whoever is about to wait."""
        job_id, _, outcome = message.partition(" ")
        self._outcomes[job_id] = outcome
        if len(self._outcomes) > _KEPT:
            del self._outcomes[next(iter(self._outcomes))]
        for wake in self._waiters.get(job_id, ()):
            wake.set()

    def discard(self, job_id: str) -> None:
        """Before a job is put in: an earlier one may have had the same id of a client, and expired."""
        self._outcomes.pop(job_id, None)

    def completed_record(self, job: Job) -> JobRecord | None:
        """The final record of a job; None where its end was not heard of, or not how it ended."""
        outcome = self._outcomes.get(job.id)
        return to_record(json.loads(outcome), job) if outcome else None

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
