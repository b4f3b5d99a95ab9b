"""The worker's side of the queue, synchronous: claim jobs, keep their leases, end each exactly once.

A lease thread renews what is held while the worker computes. Every write is a script of
`giantleap.service.jobqueue.scripts` that first checks that this consumer still owns the message; the producer's side is
`giantleap.service.jobqueue.producer`.
"""

import dataclasses
import json
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import redis
from redis.typing import KeyT, StreamIdT

from giantleap.models.worker_role import WorkerRole
from giantleap.service.errors import NotReady, StorageFull
from giantleap.service.jobqueue import scripts, scripts_consumer
from giantleap.service.jobqueue.blobs import run_with_results
from giantleap.service.jobqueue.client import REDIS_UNAVAILABLE, SyncRedis, check_client, run_command, run_script
from giantleap.service.jobqueue.keys import FINISH, Keys, claim_order
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.job import GenerateParams, Job, JobError, JobState, ResultFile
from giantleap.service.settings import Settings

_POLL_S = 1.0
_BACKOFF_CAP_S = 2.0
_PATIENCE_S = 120.0
LastIds = dict[KeyT, StreamIdT]
RunScript = Callable[[Sequence[str], Sequence[str | bytes]], Any]
_NO_STAGES: Mapping[str, float] = MappingProxyType({})
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseLatents:
    """What another worker did of a job to generate before it handed it over; the claim's body holds the latents.

    Args:
        stages_s: Seconds of its stages.
        warnings: What it had to say.
    """

    stages_s: Mapping[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """A job that this worker holds. `delivery` counts its starts, this one included, and fences late writes.

    The count restarts when the job is transferred. `body` is the input blob, or, with `base_latents`, the raw latents.
    """

    job: Job
    body: bytes | None
    stream: str
    message_id: str
    delivery: int
    base_latents: BaseLatents | None = None


class JobConsumer:
    """The claims of one worker process. Its methods may be called from several threads."""

    def __init__(
        self,
        redis: SyncRedis,
        settings: Settings,
        bundles: Sequence[str],
        consumer: str,
        device: Device | None = None,
        role: WorkerRole = WorkerRole.ALL,
    ) -> None:
        if not bundles:
            raise ValueError("no bundle was given; a worker serves at least one")
        self._block_cap_s = min(_POLL_S, check_client(redis))
        self._redis = redis
        self._settings = settings
        self._bundles = tuple(bundles)
        # A name of its own for each start: a new process must never pass the fence of the one it replaces.
        self._consumer = f"{consumer}-{uuid.uuid4().hex[:8]}"
        self._device = "" if device is None else device.to_json()
        self._role = role
        self._only = "" if role is WorkerRole.ALL else role.value
        self._keys = Keys(settings.key_prefix)
        self._limits = scripts.limits(settings)
        self._open = self._register(scripts_consumer.OPEN)
        self._close = self._register(scripts_consumer.CLOSE)
        self._claim = self._register(scripts_consumer.CLAIM)
        self._renew = self._register(scripts_consumer.RENEW)
        self._emit = self._register(scripts_consumer.EMIT)
        self._stopped = self._register(scripts_consumer.STOPPED)
        self._finish = redis.register_script(scripts.PRELUDE + scripts_consumer.FINISH)
        self._transfer = self._register(scripts_consumer.HAND_OVER)
        self._fail = self._register(scripts_consumer.FAIL)
        self._cancel = self._register(scripts_consumer.FINISH_CANCELED)
        self._release = self._register(scripts_consumer.RELEASE)
        self._held: dict[tuple[str, str], Claim] = {}
        self._ending: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._lease: threading.Thread | None = None
        self._turn = 0
        self._failures = 0

    def open(self) -> None:
        """Makes the groups and starts the lease thread, which also says that this worker lives, on which device.

        Effects: creates streams and groups that are missing; deletes consumers that were idle for an hour and hold
        nothing. Waits while Redis is loading. Safe to repeat after `close`.

        Raises:
            NotReady: Redis did not answer for two minutes.
        """
        args = [self._limits, self._consumer, self._device, self._only, *self._lanes()]
        self._retry_until_available(lambda: self._open(self._tag(), args))
        self._stop.clear()
        self._lease = threading.Thread(target=self._keep_leases, name="lease", daemon=True)
        self._lease.start()

    def close(self) -> None:
        """Stops the lease thread and signs the worker off. What is still held goes to another worker when stale."""
        self._stop.set()
        if self._lease is not None:
            self._lease.join()
            self._lease = None
        try:
            self._close(self._tag(), [self._limits, self._consumer, self._only, *self._lanes()])
        except REDIS_UNAVAILABLE as error:
            _LOG.warning("could not sign off (%s); the heartbeat will run out", type(error).__name__)

    def claim(self, max_jobs: int, block_s: float) -> list[Claim]:
        """At most `max_jobs` jobs, at once if there are any, else the first that come within `block_s`.

        Due retries go back to their streams, then stale messages are taken, then high priority, then low; each
        eighth claim takes low first, so that a steady flow of high priority does not starve it. A worker of one half
        of the route takes only from its own queues (`giantleap.service.jobqueue.keys.queues_of`).

        Effects: one atomic script per attempt; each job returned is in state processing, counted as started, and
        its lease is kept until it is ended or released. Canceled jobs and jobs started too often are closed on the
        way. Where Redis is away it waits and tries again, and returns nothing after `block_s`. A reply lost on the
        way costs the job one delivery: another claim takes it when it is stale. Every job returned must be ended by
        finish, fail, cancel or release: until then it is renewed.

        Raises:
            NotReady: jobs were claimed, but Redis did not give their inputs for two minutes.
        """
        if max_jobs < 1:
            raise ValueError(f"max_jobs is {max_jobs}; claim at least one job")
        deadline_s = time.monotonic() + block_s
        while True:
            try:
                claims, last_ids, due_s = self._take(max_jobs)
                self._failures = 0
                left_s = deadline_s - time.monotonic()
                if claims or left_s <= 0:
                    return claims
                if last_ids:  # none where jobs were taken that had ended meanwhile
                    self._await_message(last_ids, min(left_s, due_s, self._block_cap_s))
            except REDIS_UNAVAILABLE as error:
                self._failures += 1
                pause_s = _backoff_s(self._failures)
                _LOG.warning("claim lost Redis (%s); again in %.1f s", type(error).__name__, pause_s)
                time.sleep(pause_s)
                if time.monotonic() >= deadline_s:
                    return []

    def emit(self, claim: Claim, name: str, data: Mapping[str, object]) -> None:
        """Adds a progress event. Effects: none where the claim is lost; dropped with a warning where Redis is away."""
        try:
            self._emit(self._tag(), [*self._owner(claim), name, json.dumps(data)])
        except REDIS_UNAVAILABLE as error:
            _LOG.warning("event %s of job %s dropped (%s)", name, claim.job.id, type(error).__name__)

    def find_canceled(self, claims: Sequence[Claim]) -> set[str]:
        """Ids of those jobs whose cancel flag is set or whose deadline has passed, in one round trip.

        None, with a warning, where Redis is away.
        """
        try:
            stopped = self._stopped(self._tag(), [self._limits, *(claim.job.id for claim in claims)])
        except REDIS_UNAVAILABLE as error:
            _LOG.warning("cancel flags not read (%s)", type(error).__name__)
            return set()
        return {job_id.decode() for job_id in stopped}

    def complete(
        self,
        claim: Claim,
        results: Sequence[tuple[ResultFile, bytes]],
        stages: Mapping[str, float],
        warnings: Sequence[str],
        batch_jobs: int = 1,
    ) -> bool:
        """Ends a job with its results; False where the claim was lost or the deadline has passed: nothing is written.

        Effects: one atomic script: results and their bytes, record, `done` event, message dropped. Evicts the oldest
        results of other jobs where the budget needs it. Waits where Redis is away; safe to repeat. Of a batch of
        `batch_jobs` the job counts with its share of the time, for estimates.

        Raises:
            StorageFull: the results do not fit even then; nothing is written and the claim is still held.
            NotReady: Redis did not answer for two minutes.
        """
        files = json.dumps([dataclasses.asdict(file) for file, _ in results])
        blobs = [blob for _, blob in results]
        size_bytes = sum(map(len, blobs))
        upload = self._keys.upload(f"{self._consumer}:{claim.job.id}") if size_bytes else ""
        rest = [files, json.dumps(dict(stages)), json.dumps(list(warnings)), str(batch_jobs)]
        rest += [upload, str(len(blobs)), str(size_bytes)]
        code = self._settle(claim, partial(self._send_results, upload, blobs), rest)
        if code < 0:
            raise self._no_room("results", size_bytes)
        return code == 1

    def transfer(
        self,
        claim: Claim,
        latents: bytes | None,
        stages: Mapping[str, float],
        warnings: Sequence[str],
        batch_jobs: int = 1,
    ) -> JobState | None:
        """Gives a job to whoever finishes: it waits again, in the finish queue, with its starts counted anew.

        Effects: one atomic script: the latents take the place of the input, record, message moved, `queued` event. A
        job whose cancel flag is set is closed as canceled instead. Waits where Redis is away; safe to repeat.

        Args:
            claim: Of a worker that only draws.
            latents: A safetensors file with one tensor `latent` of shape [images, C, h, w]; None where nothing was to
                draw: then the input stays what it is.
            stages: Seconds so far.
            warnings: For the caller of the job.
            batch_jobs: As for `complete`.

        Returns:
            Queued or canceled; None where the claim was lost or the deadline has passed: then nothing is written.

        Raises:
            StorageFull: the latents do not fit beside what lives; nothing is written and the claim is still held.
            NotReady: Redis did not answer for two minutes.
        """
        texts = [json.dumps(dict(stages)), json.dumps(list(warnings)), str(batch_jobs)]
        code = self._settle(claim, self._transfer, [*texts, latents or b""])
        if code < 0:
            raise self._no_room("latents", len(latents or b""))
        return (None, JobState.QUEUED, JobState.CANCELED)[code]

    def _no_room(self, what: str, size_bytes: int) -> StorageFull:
        return StorageFull(
            f"The {what} have {size_bytes} bytes and do not fit beside the inputs of live jobs; "
            f"{self._settings.blob_budget_bytes} bytes are allowed in all: raise blob_budget_bytes."
        )

    def fail(self, claim: Claim, error: JobError, stages: Mapping[str, float] = _NO_STAGES) -> bool:
        """Ends an attempt with an error; False where the claim was lost: then nothing is written.

        Effects: one atomic script. A retryable error with starts left puts the job into the delayed set, the delay
        doubling up to 300 s; any other closes it as failed and adds it to the dead-letter stream. A job whose cancel
        flag is set is closed as canceled instead. Waits where Redis is away; safe to repeat.

        Raises:
            NotReady: Redis did not answer for two minutes.
        """
        rest = [json.dumps(dataclasses.asdict(error)), "1" if error.retryable else "0", json.dumps(dict(stages))]
        return self._settle(claim, self._fail, rest) == 1

    def cancel(self, claim: Claim, stages: Mapping[str, float] = _NO_STAGES) -> bool:
        """Ends a job that `canceled` named; False where the claim was lost. One past its deadline has failed.

        Raises:
            NotReady: Redis did not answer for two minutes.
        """
        return self._settle(claim, self._cancel, [json.dumps(dict(stages))]) == 1

    def release(self, claims: Sequence[Claim]) -> None:
        """Hands work back at a drain: it is first in line for the next worker and this start is not counted.

        Effects: one atomic script per claim. Where Redis is away the claim is left to become stale.
        """
        for claim in claims:
            self._drop(claim)
            try:
                self._release(self._tag(), self._owner(claim))
            except REDIS_UNAVAILABLE as error:
                _LOG.warning("job %s not handed back (%s); it goes stale", claim.job.id, type(error).__name__)

    def _register(self, text: str) -> RunScript:
        return partial(run_script, self._redis.register_script(scripts.PRELUDE + text))

    def _send_results(self, upload: str, blobs: Sequence[bytes], keys: Sequence[str], args: Sequence[str]) -> int:
        """One attempt at the script FINISH, with the results in front of it where there are any."""
        if not upload:
            code: int = run_script(self._finish, keys, args)
        else:
            code = run_command(lambda: run_with_results(self._redis, self._finish, upload, blobs, keys, args))
        return code

    def _tag(self) -> list[str]:
        return [self._keys.tag]

    def _owner(self, claim: Claim) -> list[str]:
        """ARGV of every script that speaks for one claim."""
        return [self._limits, self._consumer, self._lane(claim), claim.message_id, claim.job.id, str(claim.delivery)]

    def _lanes(self) -> list[str]:
        """Every lane of this worker in the order of the next claim."""
        return claim_order(self._bundles, self._turn, self._role)

    def _lane(self, claim: Claim) -> str:
        return claim.stream.removeprefix(self._keys.stream(""))

    def _take(self, max_jobs: int) -> tuple[list[Claim], LastIds, float]:
        """One run of the claim script: the claims; else each stream's last id and the seconds to the next retry."""
        lanes = self._lanes()
        with self._lock:
            held = json.dumps([f"{self._lane(claim)} {claim.message_id}" for claim in self._held.values()])
        args = [self._limits, self._consumer, str(max_jobs), held, *lanes]
        taken, last_ids, due_ms = self._claim(self._tag(), args)
        if not taken:
            due_s = due_ms / 1000 if due_ms >= 0 else _POLL_S
            streams: LastIds = {
                self._keys.stream(name): last.decode() for name, last in zip(lanes, last_ids, strict=True)
            }
            return [], streams, due_s
        self._turn += 1
        read = [(claim, row[4]) for row in taken if (claim := self._to_claim(*row)) is not None]
        claims = [claim for claim, _ in read]
        with self._lock:
            self._held.update({(claim.stream, claim.message_id): claim for claim in claims})
        try:
            whole = [self._with_body(claim) if size_bytes else claim for claim, size_bytes in read]
        except NotReady:
            for claim in claims:  # what the caller never sees must not be renewed for ever
                self._drop(claim)
            raise
        return [claim for claim in whole if claim is not None], {}, 0.0

    def _to_claim(
        self, job: bytes, lane: bytes, message: bytes, delivery: int, _: int, stages: bytes, warnings: bytes
    ) -> Claim | None:
        """The claim; None where an API process of another version made the job: it goes stale, for another worker."""
        try:
            read = Job.from_json(job)
        except (TypeError, KeyError, ValueError) as error:
            _LOG.error("a job of another version is not understood (%s); it is left to go stale", type(error).__name__)
            return None
        claim = Claim(read, None, self._keys.stream(lane.decode()), message.decode(), delivery)
        if isinstance(claim.job.params, GenerateParams) and f"{FINISH}:" in claim.stream:
            base_latents = BaseLatents(json.loads(stages), tuple(json.loads(warnings)))
            return dataclasses.replace(claim, base_latents=base_latents)
        return claim

    def _with_body(self, claim: Claim) -> Claim | None:
        """The claim with its input; None where the input is gone, for then another worker has ended the job."""
        body = self._retry_until_available(lambda: self._redis.get(self._keys.input(claim.job.id)))
        if body is None:
            self._drop(claim)
            return None
        return dataclasses.replace(claim, body=body)

    def _await_message(self, last_ids: LastIds, block_s: float) -> None:
        """Returns when a stream has a newer message than the claim script saw. It only looks: nothing is claimed."""
        run_command(lambda: self._redis.xread(last_ids, count=1, block=max(1, int(block_s * 1000))))

    def _settle(self, claim: Claim, script: RunScript, rest: Sequence[str | bytes]) -> int:
        key = (claim.stream, claim.message_id)
        with self._lock:
            self._ending.add(key)
        try:
            code: int = self._retry_until_available(lambda: script(self._tag(), [*self._owner(claim), *rest]))
            if code >= 0:
                self._drop(claim)
        except NotReady:
            self._drop(claim)  # left to become stale, so that another worker runs the job again
            raise
        finally:
            with self._lock:
                self._ending.discard(key)
        if code == 0:
            _LOG.warning("job %s was ended too late: delivery %d is not ours", claim.job.id, claim.delivery)
        return code

    def _drop(self, claim: Claim) -> bool:
        with self._lock:
            return self._held.pop((claim.stream, claim.message_id), None) is not None

    def _forget(self, claim: Claim) -> None:
        """After a lost lease; a claim that is just being ended looks lost too, and its own call says how it went."""
        key = (claim.stream, claim.message_id)
        with self._lock:
            lost = key not in self._ending and self._held.pop(key, None) is not None
        if lost:
            _LOG.warning("the lease of job %s was lost", claim.job.id)

    def _retry_until_available(self, call: Callable[[], Any]) -> Any:
        """Runs `call` until Redis answers, with growing pauses, for two minutes at most."""
        deadline_s = time.monotonic() + _PATIENCE_S
        failures = 0
        while True:
            try:
                return call()
            except REDIS_UNAVAILABLE as error:
                if time.monotonic() >= deadline_s:
                    raise NotReady(f"Redis did not answer for {_PATIENCE_S:.0f} s; it must be reachable.") from error
                failures += 1
                pause_s = _backoff_s(failures)
                _LOG.warning("lost Redis (%s); again in %.1f s", type(error).__name__, pause_s)
                time.sleep(pause_s)

    def _keep_leases(self) -> None:
        """Until `close`: renews every claim held, each quarter of the visibility timeout, sooner after a failure."""
        period_s = self._settings.visibility_timeout_s / 4
        pause_s = period_s
        while not self._stop.wait(pause_s):
            with self._lock:
                held = list(self._held.values())
            args = [self._limits, self._consumer, self._device, self._only]
            for claim in held:
                args += [self._lane(claim), claim.message_id, claim.job.id, str(claim.delivery)]
            try:
                lost = {job_id.decode() for job_id in self._renew(self._tag(), args)}
                pause_s = period_s
            except (
                *REDIS_UNAVAILABLE,
                redis.RedisError,
            ) as error:  # whatever it is: without this thread each job goes to another
                _LOG.warning("leases not renewed (%s)", type(error).__name__)
                pause_s = min(period_s, 0.5)
                continue
            for claim in held:
                if claim.job.id in lost:
                    self._forget(claim)


def _backoff_s(failures: int) -> float:
    """Pause after so many failures in a row: doubles to a cap; jitter keeps many workers apart."""
    return float(min(_BACKOFF_CAP_S, 0.05 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0))
