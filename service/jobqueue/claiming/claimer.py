"""Claims jobs for a worker and reads their inputs. `giantleap.service.jobqueue.consumer` ends the claims."""

import dataclasses
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from redis.typing import KeyT, StreamIdT

from giantleap.models.worker_role import WorkerRole
from giantleap.service.errors import NotReady, StoreUnavailable
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.claiming.outages import Outages
from giantleap.service.jobqueue.claims import Claim, Leases, LoadedBundles, to_claim
from giantleap.service.jobqueue.client import SyncRedis, check_client
from giantleap.service.jobqueue.faults import REDIS_UNAVAILABLE, name_fault
from giantleap.service.jobqueue.keys import Keys, claim_order
from giantleap.service.jobqueue.replies import ClaimedJob, ClaimReply
from giantleap.service.jobqueue.runner import ScriptRunner
from giantleap.service.results.jobs import JobFiles
from giantleap.service.settings import Settings

_POLL_S = 1.0
_STORE_PAUSE_S = 1.0
_LOG = logging.getLogger(__name__)


class JobClaimer:
    """The claims of one worker. Its methods may be called from several threads.

    Args:
        redis: A client with a timeout.
        settings: All settings.
        bundles: Whose jobs to take.
        consumer: The unique name of the worker.
        role: What the worker runs.
        leases: Keep what was claimed.
        outages: What to do while Redis is away.
        files: Where large inputs lie; None: in Redis.
    """

    def __init__(
        self,
        redis: SyncRedis,
        settings: Settings,
        bundles: Sequence[str],
        consumer: str,
        role: WorkerRole,
        leases: Leases,
        outages: Outages,
        files: JobFiles | None = None,
    ) -> None:
        if not bundles:
            raise ValueError("no bundle was given; a worker serves at least one")
        self._max_block_s = min(_POLL_S, check_client(redis))
        self._redis = redis
        self._settings = settings
        self._scripts = ScriptRunner(redis, settings)
        self._keys = Keys(settings.key_prefix)
        self._bundles = tuple(bundles)
        self._consumer = consumer
        self._role = role
        self._leases = leases
        self._outages = outages
        self._files = files
        self._turn = 0
        self._claiming = threading.Lock()
        # Jobs that only another version can read, and those whose end Redis did not take for two minutes.
        self._unreadable: set[str] = set()
        self._dropped: set[str] = set()

    def lanes(self) -> list[str]:
        """Every lane of this worker in the order of the next claim."""
        return claim_order(self._bundles, self._turn, self._role)

    def claim(self, max_jobs: int, block_s: float, loaded: LoadedBundles | None = None) -> list[Claim]:
        """See `JobConsumer.claim`."""
        if max_jobs < 1:
            raise ValueError(f"max_jobs is {max_jobs}; claim at least one job")
        deadline_s = time.monotonic() + block_s
        while True:
            try:
                lanes = self.lanes()
                with self._claiming:  # a claim that is not yet held would look like one whose reply was lost
                    reply = self._send(max_jobs, lanes, loaded)
                    self._outages.end()
                    held = self._hold(reply.claims)
                claims = self._read_bodies(held, reply.claims)
                left_s = deadline_s - time.monotonic()
                if claims or left_s <= 0:
                    return claims
                if reply.last_ids:  # absent if all jobs taken had ended meanwhile
                    self._await_message(lanes, reply, left_s)
            except REDIS_UNAVAILABLE as error:
                if self._outages.pause("claim", error) or time.monotonic() >= deadline_s:
                    return []

    def claim_ahead(self, max_jobs: int, loaded: LoadedBundles | None = None) -> list[Claim]:
        """See `JobConsumer.claim_ahead`."""
        try:
            with self._claiming:
                reply = self._send(max_jobs, self.lanes(), loaded, ahead=True)
                self._outages.end()
                held = self._hold(reply.claims)
        except REDIS_UNAVAILABLE as error:
            _LOG.warning("nothing claimed ahead (%s)", name_fault(error))
            return []
        return self._read_bodies(held, reply.claims)

    def drop(self, claims: Sequence[Claim]) -> None:
        """See `JobConsumer.drop`."""
        for claim in claims:
            self._dropped.add(claim.job.id)  # first: what is neither held nor dropped, a claim resumes
            self._leases.drop(claim)

    def release(self, claims: Sequence[Claim]) -> None:
        """See `JobConsumer.release`."""
        for claim in claims:
            with self._leases.settling(claim):
                try:
                    self._scripts.run(scripts.RELEASE, {"consumer": self._consumer, **claim.to_arguments()})
                except REDIS_UNAVAILABLE as error:
                    _LOG.warning("job %s not returned (%s); it becomes stale", claim.job.id, name_fault(error))
                self._leases.drop(claim)  # not before: what this worker has and does not hold, a claim resumes

    def _send(
        self, max_jobs: int, lanes: Sequence[str], loaded: LoadedBundles | None, ahead: bool = False
    ) -> ClaimReply:
        arguments = {
            "consumer": self._consumer,
            "max_jobs": max_jobs,
            "held": [*(claim.job.id for claim in self._leases.held()), *self._unreadable],
            "dropped": list(self._dropped),
            "lanes": lanes,
            **({} if loaded is None else {"loaded": loaded.names, "loaded_first": loaded.go_first}),
            "ahead": ahead or None,
        }
        return self._scripts.run(scripts.CLAIM, arguments)

    def _hold(self, claimed: Sequence[ClaimedJob]) -> list[Claim]:
        """Starts renewing the claims. Effects: returns jobs that this version cannot read, for workers that can."""
        if claimed:
            self._turn += 1
        claims = []
        for row in claimed:
            self._dropped.discard(row.id)
            if (claim := to_claim(row)) is not None:
                claims.append(claim)
                continue
            self._unreadable.add(row.id)
            fence = {"lane": row.lane, "message": row.message, "id": row.id, "delivery": row.delivery}
            self._scripts.run(scripts.RELEASE, {"consumer": self._consumer, **fence})
        self._leases.hold(claims)
        return claims

    def _read_bodies(self, held: Sequence[Claim], claimed: Sequence[ClaimedJob]) -> list[Claim]:
        """The claims with their inputs; nothing if Redis does not return these for two minutes, or the store now."""
        with_input = {row.id for row in claimed if row.input_bytes or row.input_key}
        try:
            whole = [self._with_body(claim) if claim.job.id in with_input else claim for claim in held]
        except StoreUnavailable as error:
            _LOG.error("inputs not read, their jobs wait: %s", error.detail)
            self.release(held)
            self._outages.wait(_STORE_PAUSE_S)
            return []
        except NotReady as error:
            _LOG.error("inputs not read, their jobs become stale: %s", error.detail)
            self.drop(held)  # the caller never sees these claims: they must not be renewed for ever
            return []
        return [claim for claim in whole if claim is not None]

    def _with_body(self, claim: Claim) -> Claim | None:
        """The claim with its input; None if the input is gone: then another worker has ended the job."""
        if claim.input_key is not None:
            body: Any = self._read_file(claim.input_key)
        else:
            key = self._keys.input(claim.job.id)
            body = self._outages.retry(lambda: self._redis.get(key), self._settings.drain_grace_s)
        if body is None:
            self.drop([claim])
            return None
        return dataclasses.replace(claim, body=body)

    def _read_file(self, key: str) -> bytes | None:
        if self._files is None:
            raise StoreUnavailable("the input lies in a result store; set GIANTLEAP_RESULT_STORE as for the API")
        return self._files.get_input(key)

    def _await_message(self, lanes: Sequence[str], reply: ClaimReply, left_s: float) -> None:
        """Returns when a stream has a newer message than the claim script saw, or a retry is due. Claims nothing."""
        due_s = _POLL_S if reply.retry_ms is None else reply.retry_ms / 1000
        block_ms = max(1, int(1000 * min(left_s, due_s, self._max_block_s)))
        last_ids: dict[KeyT, StreamIdT] = {
            self._keys.stream(lane): last_id for lane, last_id in zip(lanes, reply.last_ids, strict=True)
        }
        self._redis.xread(last_ids, count=1, block=block_ms)
