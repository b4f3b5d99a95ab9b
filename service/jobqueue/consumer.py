"""The worker's side of the queue, synchronous: claim jobs and end each exactly once.

Every write is a script (`giantleap.service.jobqueue.scripts`) that first checks that the claim is still current.
`giantleap.service.jobqueue.claiming.claimer` claims, and `giantleap.service.jobqueue.claims` renews the claims while
the worker computes. The API's side is `giantleap.service.jobqueue.producer`.
"""

import dataclasses
import json
import logging
import threading
import uuid
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import redis

from giantleap.models.worker_role import WorkerRole
from giantleap.service.errors import BlockedByFilter, NotReady, StorageFull
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.claiming.claimer import JobClaimer
from giantleap.service.jobqueue.claiming.outages import Outages
from giantleap.service.jobqueue.claims import Claim, Leases, LoadedBundles
from giantleap.service.jobqueue.client import SyncRedis
from giantleap.service.jobqueue.faults import REDIS_UNAVAILABLE, name_fault, to_bad_configuration
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.replies import SettleReply
from giantleap.service.jobqueue.runner import Command, ScriptRunner, upload_results
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.job import JobError, JobState, ResultFile
from giantleap.service.results.jobs import JobFiles
from giantleap.service.settings import Settings

_NO_STAGES: Mapping[str, float] = MappingProxyType({})
_ENDS: Mapping[str, JobState] = MappingProxyType(
    {"done": JobState.SUCCEEDED, "retried": JobState.QUEUED, "canceled": JobState.CANCELED}
)
"""What a script that settles a claim made of the job, by its status; a lost claim has no entry."""
_LOG = logging.getLogger(__name__)


class JobConsumer:
    """The consumer of one worker process. Its methods may be called from several threads.

    `stop` ends its waits for a Redis that is away: at once, or after the drain's grace where a job would be lost.
    `files` is where results and large inputs lie; None: in Redis.
    """

    def __init__(
        self,
        redis: SyncRedis,
        settings: Settings,
        bundles: Sequence[str],
        consumer: str,
        device: Device | None = None,
        role: WorkerRole = WorkerRole.ALL,
        stop: threading.Event | None = None,
        files: JobFiles | None = None,
    ) -> None:
        self._settings = settings
        self._scripts = ScriptRunner(redis, settings)
        self._keys = Keys(settings.key_prefix)
        # Unique for each start: a new process must never pass the fence of the one that it replaces.
        self._consumer = f"{consumer}-{uuid.uuid4().hex[:8]}"
        self._worker: dict[str, object] = {
            "consumer": self._consumer,
            "device": "" if device is None else device.to_json(),
            "role": role,
        }
        self._leases = Leases(self._scripts, self._worker, settings.visibility_timeout_s)
        self._outages = Outages(threading.Event() if stop is None else stop)
        self._files = files
        self._claimer = JobClaimer(redis, settings, bundles, self._consumer, role, self._leases, self._outages, files)

    def open(self) -> None:
        """Creates the groups and starts the lease thread, which also sends the heartbeat of this worker.

        Effects: creates streams and groups that are missing; deletes consumers that were idle for an hour and hold
        nothing. Waits while Redis is away or loading. Safe to repeat after `close`.

        Raises:
            BadConfiguration: Redis refuses this worker, and a retry cannot help.
            NotReady: Redis did not answer for two minutes, or until the stop.
        """
        arguments = {**self._worker, "lanes": self._claimer.lanes()}

        def register() -> None:
            try:
                self._scripts.run(scripts.REGISTER_WORKER, arguments)
            except REDIS_UNAVAILABLE as error:
                if (wrong := to_bad_configuration(error)) is not None:
                    raise wrong from None
                raise

        self._outages.retry(register, grace_s=0.0)
        self._leases.open()

    def close(self) -> None:
        """Stops the lease thread and unregisters the worker. Other workers take its remaining claims when stale."""
        self._leases.close()
        if self._outages.is_away:
            return  # Redis is away; the heartbeat expires
        try:
            self._scripts.run(scripts.UNREGISTER_WORKER, {**self._worker, "lanes": self._claimer.lanes()})
        except REDIS_UNAVAILABLE as error:
            _LOG.warning("could not unregister (%s); the heartbeat will expire", name_fault(error))

    def announce(self, device: Device) -> None:
        """Publishes changes of the device. Effects: a heartbeat; if Redis is unavailable, the next one."""
        self._worker["device"] = device.to_json()
        try:
            self._scripts.run(scripts.RENEW, {**self._worker, "claims": []})
        except REDIS_UNAVAILABLE as error:
            _LOG.warning("device not published (%s)", name_fault(error))

    def claim(self, max_jobs: int, block_s: float, loaded: LoadedBundles | None = None) -> list[Claim]:
        """At most `max_jobs` jobs, at once if there are any, else the first that arrive within `block_s`.

        Due retries return to their streams, then stale messages are taken, then high priority, then low. Each eighth
        claim takes low priority first, so that a steady flow of high priority does not starve it. A worker of one
        role takes from its own queues only (`giantleap.service.jobqueue.keys.queues_of`).

        With `loaded`, new jobs are of these bundles, or all of one other: that of the job that has waited longest at
        its priority, unless those of `loaded` go first and some wait.

        Effects: one atomic script per attempt. Each job returned is in state processing and counted as started, and
        its lease is renewed until it is ended or released. Canceled jobs and jobs started too often are closed on the
        way. If Redis is unavailable or refuses, it waits and retries, and returns nothing after `block_s` or at a
        stop. Jobs claimed by a lost reply come with the next claim. The caller must end every job by `complete`,
        `transfer`, `fail`, `cancel`, `release` or `drop`.
        """
        return self._claimer.claim(max_jobs, block_s, loaded)

    def claim_ahead(self, max_jobs: int, loaded: LoadedBundles | None = None) -> list[Claim]:
        """At most `max_jobs` jobs for a device that is still busy; returns at once, mostly with all of them or none.

        None unless as many wait for each live worker: a job is not held here while another worker has nothing to do.
        None either while a job waits that was started before: it goes to a worker that can run it alone.

        Effects: as for `claim`; if Redis is unavailable it returns nothing.
        """
        return self._claimer.claim_ahead(max_jobs, loaded)

    def holds(self, claim: Claim) -> bool:
        """Whether a claim is still this worker's, as far as it knows: not lost, ended or returned."""
        return self._leases.holds(claim)

    def emit(self, claim: Claim, name: str, data: Mapping[str, object], image: bytes | None = None) -> None:
        """Adds a progress event, of a preview with its image; none if the claim is lost or Redis has no room."""
        script = scripts.EMIT if image is None else scripts.EMIT_PREVIEW
        try:
            self._scripts.run(script, {**self._fence(claim), "name": name, "data": json.dumps(data)}, value=image)
        except REDIS_UNAVAILABLE as error:
            _LOG.warning("event %s of job %s dropped (%s)", name, claim.job.id, name_fault(error))

    def find_canceled(self, claims: Sequence[Claim]) -> frozenset[str]:
        """Ids of the jobs whose cancel flag is set or whose deadline has passed, in one round trip.

        None, with a warning, if Redis is unavailable.
        """
        try:
            return self._scripts.run(scripts.FIND_STOPPED, {"ids": [claim.job.id for claim in claims]}).ids
        except REDIS_UNAVAILABLE as error:
            _LOG.warning("cancel flags not read (%s)", name_fault(error))
            return frozenset()

    def complete(
        self,
        claim: Claim,
        results: Sequence[tuple[ResultFile, bytes]],
        stages: Mapping[str, float],
        warnings: Sequence[str],
        batch_jobs: int = 1,
    ) -> JobState | None:
        """Ends a job with its results, unless its cancellation was requested: then it is closed as canceled.

        Effects: one atomic script: results and their bytes, record, `done` event, message dropped. Evicts the oldest
        results of other jobs if the budget needs it. Waits while Redis is unavailable; safe to repeat. The time of a
        batch of `batch_jobs` is shared between its jobs, for estimates.

        Returns:
            Succeeded or canceled; None if the claim was lost or the deadline has passed: then nothing is written.

        Raises:
            StorageFull: The results do not fit even then; nothing is written and the claim is still held.
            StoreUnavailable: The result store does not take them; nothing is written and the claim is still held.
            NotReady: Redis did not answer for two minutes.
        """
        files, blobs = [file for file, _ in results], [blob for _, blob in results]
        if self._files is not None:
            files, blobs = self._files.put_results(claim.job.id, results), []
        size_bytes = sum(map(len, blobs))
        upload = f"{self._consumer}:{claim.job.id}" if size_bytes else ""
        reply = self._settle(
            claim,
            scripts.COMPLETE,
            {
                "results": json.dumps([dataclasses.asdict(file) for file in files]),
                "stages": json.dumps(dict(stages)),
                "warnings": json.dumps(list(warnings)),
                "batch_jobs": batch_jobs,
                "upload": upload,
                "files": len(blobs),
                "bytes": size_bytes,
            },
            before=upload_results(self._keys.upload(upload), blobs) if size_bytes else (),
        )
        self._discard_unnamed(claim, [file.key for file in files if file.key], reply)
        if reply.status == "no_room":
            raise self._no_room("results", size_bytes)
        return _ENDS.get(reply.status)

    def transfer(
        self,
        claim: Claim,
        latents: bytes | None,
        stages: Mapping[str, float],
        warnings: Sequence[str],
        batch_jobs: int = 1,
    ) -> JobState | None:
        """Moves a job to the workers that decode: it waits again, in the finish queue, with its starts counted anew.

        Effects: one atomic script: the latents replace the input, record, message moved, `queued` event. A job whose
        cancel flag is set is closed as canceled instead. Waits while Redis is unavailable; safe to repeat.

        Args:
            claim: Of a worker of the role generate.
            latents: A safetensors file with one tensor `latent` of shape [images, C, h, w]; None if the input of the
                job is a latent already.
            stages: Seconds so far.
            warnings: For the caller of the job.
            batch_jobs: As for `complete`.

        Returns:
            Queued or canceled; None if the claim was lost or the deadline has passed: then nothing is written.

        Raises:
            StorageFull: The latents do not fit beside the inputs of live jobs; nothing is written and the claim is
                still held.
            StoreUnavailable: The result store does not take them; the same.
            NotReady: Redis did not answer for two minutes.
        """
        key = None
        if self._files is not None and latents is not None and len(latents) >= self._files.large_input_bytes:
            key = self._files.put_input(claim.job.id, latents)
        arguments = {
            "stages": json.dumps(dict(stages)),
            "warnings": json.dumps(list(warnings)),
            "batch_jobs": batch_jobs,
            "input_key": key,
        }
        reply = self._settle(claim, scripts.TRANSFER, arguments, value=b"" if key else latents or b"")
        self._discard_unnamed(claim, [key] if key else [], reply, keeps_input=latents is None)
        if reply.status == "no_room":
            raise self._no_room("latents", len(latents or b""))
        return JobState.QUEUED if reply.status == "done" else _ENDS.get(reply.status)

    def fail(self, claim: Claim, error: JobError, stages: Mapping[str, float] = _NO_STAGES) -> JobState | None:
        """Ends an attempt with an error.

        Effects: one atomic script. A retryable error with starts left puts the job into the delayed set, the delay
        doubling up to 300 s; any other closes it as failed and, unless a filter refused an image, adds it to the
        dead-letter stream. A job whose cancel flag is set is closed as canceled instead. Waits while Redis is
        unavailable; safe to repeat.

        Returns:
            Queued for a retry, failed or canceled; None if the claim was lost: then nothing is written.

        Raises:
            NotReady: Redis did not answer for two minutes.
        """
        arguments = {
            "error": json.dumps(dataclasses.asdict(error)),
            "retryable": error.retryable,
            "refused": error.code == BlockedByFilter.code,
            "stages": json.dumps(dict(stages)),
        }
        reply = self._settle(claim, scripts.FAIL, arguments)
        return JobState.FAILED if reply.status == "done" else _ENDS.get(reply.status)

    def cancel(self, claim: Claim, stages: Mapping[str, float] = _NO_STAGES) -> bool:
        """Ends a job that `find_canceled` named; False if the claim was lost. A job past its deadline has failed.

        Raises:
            NotReady: Redis did not answer for two minutes.
        """
        return self._settle(claim, scripts.CANCEL, {"stages": json.dumps(dict(stages))}).status == "done"

    def release(self, claims: Sequence[Claim]) -> None:
        """Returns jobs at a drain: they are first in line for the next worker and this start is not counted.

        Effects: one atomic script per claim. If Redis is unavailable the claim is left to become stale.
        """
        self._claimer.release(claims)

    def drop(self, claims: Sequence[Claim]) -> None:
        """Leaves jobs to become stale: their ends could not be written, so they must run again."""
        self._claimer.drop(claims)

    def _fence(self, claim: Claim) -> dict[str, object]:
        return {"consumer": self._consumer, **claim.to_arguments()}

    def _discard_unnamed(
        self, claim: Claim, uploaded: Sequence[str], reply: SettleReply, keeps_input: bool = False
    ) -> None:
        """Deletes uploads that the record does not name; after a success the input, which is no longer needed."""
        unnamed = list(uploaded)
        if reply.status == "done":
            unnamed = [claim.input_key] if claim.input_key and not keeps_input else []
        if self._files is not None and unnamed:
            self._files.discard(unnamed)

    def _no_room(self, what: str, size_bytes: int) -> StorageFull:
        return StorageFull(
            f"The {what} have {size_bytes} bytes and do not fit beside the inputs of live jobs; "
            f"{self._settings.blob_budget_bytes} bytes are allowed in all: raise blob_budget_bytes."
        )

    def _settle(
        self,
        claim: Claim,
        script: scripts.LuaScript[SettleReply],
        arguments: Mapping[str, object],
        before: Sequence[Command] = (),
        value: bytes | None = None,
    ) -> SettleReply:
        """Runs a script that ends or moves a job, until Redis answers; then the claim is no longer held.

        Effects: the claim stays held if there is no room.
        """
        named = {**self._fence(claim), "idle_s": claim.idle_s, **arguments}

        def send() -> SettleReply:
            reply = self._scripts.run(script, named, before=before, value=value)
            if reply.status == "no_upload":
                raise redis.ConnectionError("the results did not arrive whole")
            return reply

        with self._leases.settling(claim):
            try:
                reply = self._outages.retry(send, self._settings.drain_grace_s)
            except NotReady:
                self.drop([claim])
                raise
            if reply.status != "no_room":
                self._leases.drop(claim)
        if reply.status == "lost":
            _LOG.warning("job %s was ended too late: delivery %d is not current", claim.job.id, claim.delivery)
        return reply
