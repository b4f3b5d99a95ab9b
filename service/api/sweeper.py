"""Deletes files of the result store that no job needs: those of ended jobs, and what a process that died left behind.

Every API process has a sweeper; the script `sweep` lets one of them work at a time. It looks only below the times of
keys that have passed, so that a sweep with nothing to do costs one listing.
"""

import asyncio
import logging
import uuid
from collections.abc import Sequence

from giantleap.service.errors import NotReady, StoreUnavailable
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.client import cancel_tasks
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobqueue.replies import SweepReply
from giantleap.service.results.concurrent import AsyncResultStore
from giantleap.service.results.keys import job_of
from giantleap.service.settings import Settings

_MAX_PERIOD_S = 60.0
_SWEEPS_PER_LIFETIME = 10
_BATCH_S = 60.0
_LOG = logging.getLogger(__name__)


class Sweeper:
    """One task that sweeps again and again.

    Args:
        producer: The queue.
        files: The store.
        settings: The prefix of keys, and the time to live, of which a period is a part.
    """

    def __init__(self, producer: JobProducer, files: AsyncResultStore, settings: Settings) -> None:
        self._producer = producer
        self._files = files
        self._prefix = settings.key_prefix
        self._period_s = min(_MAX_PERIOD_S, max(1.0, settings.job_ttl_s / _SWEEPS_PER_LIFETIME))
        self._name = uuid.uuid4().hex
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Starts the task."""
        self._task = asyncio.create_task(self._sweep_forever(), name="result-sweeper")

    async def close(self) -> None:
        """Stops the task; another process takes the turn when it has ended."""
        if self._task is not None:
            await cancel_tasks([self._task])
            self._task = None

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            try:
                await self.sweep()
            except (NotReady, StoreUnavailable) as error:
                _LOG.warning("results not swept: %s", error.detail)

    async def sweep(self) -> int:
        """Deletes expired files that no job names, if it is this sweeper's turn; returns their number.

        Raises:
            NotReady: Redis does not answer.
            StoreUnavailable: The store does not answer.
        """
        turn = await self._ask(())
        deleted = 0
        if not turn.granted:
            return deleted
        batches = await self._files.call(_BATCH_S, self._files.store.list_expired, self._prefix, turn.now_s)
        while (names := await self._files.call(_BATCH_S, next, batches, None)) is not None:
            reply = await self._ask(names)
            if not reply.granted:
                return deleted
            await self._files.delete(reply.keys)
            deleted += len(reply.keys)
        await self._files.call(_BATCH_S, self._files.store.prune, self._prefix, turn.now_s)
        return deleted

    async def _ask(self, names: Sequence[str]) -> SweepReply:
        """Renews the turn and finds those of some files that no job needs; a name of another kind is left alone."""
        files = [{"job": job_id, "key": name} for name in names if (job_id := job_of(name)) is not None]
        arguments = {"sweeper": self._name, "turn_ms": int(2000 * self._period_s), "files": files or None}
        return await self._producer.run(scripts.SWEEP, arguments)
