"""The API's side of the queue: put a job in, watch it, cancel it, read its results.

All writes are scripts (`giantleap.service.jobqueue.scripts`); the worker's side is
`giantleap.service.jobqueue.consumer`. `wait` is woken by `giantleap.service.jobqueue.completions`, `events` reads the
job's own stream.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import statistics
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import redis

from giantleap.service.errors import InvalidRequest, NotFound, NotReady, QueueFull
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.admission.gate import QueueGate
from giantleap.service.jobqueue.arguments import body_sha256, enqueue_arguments
from giantleap.service.jobqueue.backpressure import retry_after_s, to_refusal
from giantleap.service.jobqueue.client import COMMAND_S, AsyncRedis, await_reply, cancel_tasks, check_client
from giantleap.service.jobqueue.completions import CompletionListener
from giantleap.service.jobqueue.events import read_events
from giantleap.service.jobqueue.faults import to_not_ready
from giantleap.service.jobqueue.keys import Keys, idempotency_digest
from giantleap.service.jobqueue.replies import EnqueueReply
from giantleap.service.jobqueue.runner import AsyncScriptRunner, upload_input
from giantleap.service.jobqueue.server import find_warnings
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.grid import Charge
from giantleap.service.jobs.job import Job, JobEvent, JobRecord, JobState, QueueStats
from giantleap.service.results.concurrent import AsyncResultStore, require_files
from giantleap.service.results.keys import new_keys
from giantleap.service.results.store import INPUT_GRACE_S, INPUT_TYPE
from giantleap.service.settings import Settings

MAX_PER_PAGE = 100
CURSOR_PATTERN = r"^[0-9]{1,17}$"  # not \d, which matches the digits of all scripts
_POLL_S = 1.0
# How long to wait for a Redis that hangs: a probe or scrape gives up after a few seconds, and so must its answer.
_PROBE_S = 2.0
_TRANSFER_BYTES_PER_S = 10e6
_DEVICES_EVERY_S = 3.0
_WARNINGS_EVERY = 20
_REFUSAL_CACHE_S = 0.25
_LOG = logging.getLogger(__name__)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Enqueued:
    """The job in the queue. `created` is False if it was there already: the same key, or the same id."""

    job_id: str
    created: bool
    queue_position: int
    created_at_s: float | None = None
    estimated_start_s: float | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Some jobs of an owner; `next_cursor` is None at the end."""

    records: tuple[JobRecord, ...]
    next_cursor: str | None


class JobProducer:
    """Everything that the API does with the queue. Safe to share between all tasks of one event loop.

    Args:
        redis: The client; its owner closes it.
        settings: Limits and times.
        files: Where results and large inputs lie; None: in Redis.
    """

    def __init__(self, redis: AsyncRedis, settings: Settings, files: AsyncResultStore | None = None) -> None:
        self._block_ms = int(1000 * min(_POLL_S, check_client(redis)))
        self._redis = redis
        self._settings = settings
        self._files = files
        self._scripts = AsyncScriptRunner(redis, settings)
        self._keys = Keys(settings.key_prefix)
        self._transfer_s = COMMAND_S + settings.max_body_bytes / _TRANSFER_BYTES_PER_S
        self._devices: tuple[Device, ...] = ()
        self._warnings: tuple[str, ...] = ()
        self._completions = CompletionListener(redis, self._keys.done_channel)
        self._refusal: tuple[int, float] = (1, -math.inf)
        self.gate = QueueGate(self.stats, self._completions, settings.queue_limit)
        """Lets as many requests for new jobs pass at once as the queue takes, and refuses them while it is full."""
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Starts the listener that wakes `wait` and the task that keeps `devices` fresh. Redis may be away."""
        try:
            await self.read_devices()
            await self.read_warnings()
        except NotReady as error:
            _LOG.warning("requests get 503 until Redis is there: %s", error.detail)
        self._tasks = [
            asyncio.create_task(self._completions.listen(), name="job-done-listener"),
            asyncio.create_task(self._watch_devices(), name="device-watcher"),
        ]

    async def close(self) -> None:
        """Stops the tasks that `open` started. The client stays open: its owner closes it."""
        await cancel_tasks(self._tasks)
        self._tasks = []
        await self.gate.stop()

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices of the live workers, as of seconds ago: reading them takes no round trip."""
        return self._devices

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why the server may lose accepted jobs, as of a minute ago."""
        return self._warnings

    async def read_warnings(self) -> None:
        """Updates `warnings`.

        Raises:
            NotReady: Redis does not answer.
        """
        self._warnings = find_warnings(await await_reply(self._scripts.run(scripts.READ_SERVER), _PROBE_S))

    async def read_devices(self) -> None:
        """Updates `devices`. Devices that a worker of another version wrote are left out.

        Raises:
            NotReady: Redis does not answer.
        """
        devices = []
        for text in (await await_reply(self._scripts.run(scripts.LIST_DEVICES), _PROBE_S)).devices:
            try:
                devices.append(Device.from_json(text))
            except ValueError as error:
                _LOG.warning("the device of a worker cannot be read: %s", error)
        self._devices = tuple(devices)

    async def ping(self) -> None:
        """Checks that Redis answers.

        Raises:
            NotReady: Redis does not answer or is still loading its data.
        """
        await await_reply(self._redis.execute_command("PING"), _PROBE_S)

    async def enqueue(
        self,
        job: Job,
        body: bytes | None = None,
        idempotency_key: str | None = None,
        max_live: int | None = None,
        charge: Charge | None = None,
    ) -> Enqueued:
        """Puts a job in the queue, or finds the one that is there already under the same key or the same id.

        Effects: one atomic script that writes the record, the input blob, the message and the `queued` event, or
        nothing. Safe to repeat with the same job: a retry after a lost reply adds nothing. A job under a known
        idempotency key is returned even if its record has expired. Idempotency keys are separate for each owner.

        Args:
            job: What to run.
            body: Its input blob.
            idempotency_key: As the caller sent it.
            max_live: Jobs of the same owner that may be queued or running at once, this one included.
            charge: What the job takes from the owner's budget of work, which gets it back if the job ends unstarted.

        Raises:
            InvalidRequest: The key or the id belongs to a job with another payload.
            QueueFull: `queue_limit` jobs are queued, running or waiting for a retry, or their latent pixels and those
                of this job are more than `queue_limit_latent_px`.
            TooManyJobs: `max_live` jobs of the owner are live.
            WorkLimited: The budget does not cover the charge now; `OverBudget`: it never does.
            StorageFull: The input does not fit beside the inputs of live jobs, even with all results evicted.
            StoreUnavailable: The result store does not take the input now.
            NotReady: Redis does not answer.
        """
        self._completions.discard(job.id)
        arguments = enqueue_arguments(job, len(body or b""), max_live, charge) | {
            "digest": job.payload_sha256() + await body_sha256(body),
            "idempotency": None if idempotency_key is None else idempotency_digest(idempotency_key, job.owner),
        }
        reply = await self._send_job(job, body, arguments)
        if reply.jobs is not None:
            self.gate.record_jobs(reply.jobs)
        if reply.status in ("created", "existing"):
            return Enqueued(
                reply.job_id,
                reply.status == "created",
                reply.queue_position or 0,
                reply.created_at_s,
                reply.estimated_start_s,
            )
        if reply.status == "mismatch":
            raise InvalidRequest(
                "The idempotency key or job id was used before for another request; a repeat must be the same "
                "request: send it unchanged or choose a new key."
            )
        refusal = to_refusal(
            reply, job, len(body or b""), max_live, charge, settings=self._settings, retry_s=await self._retry_after_s()
        )
        if isinstance(refusal, QueueFull) and reply.status == "full":
            self.gate.record_full(refusal)
        raise refusal

    async def _send_job(self, job: Job, body: bytes | None, arguments: dict[str, Any]) -> EnqueueReply:
        """Sends the job, with the body in front of it if there is one.

        While callers are being refused it sends the job first, so that no body is sent for nothing.
        """
        text = job.to_json()
        if not body or asyncio.get_running_loop().time() < self._refusal[1]:
            reply = await await_reply(self._scripts.run(scripts.ENQUEUE, {"upload": ""} | arguments, value=text))
            if not body or reply.status != "upload":
                return reply
        if self._files is not None and len(body) >= self._files.large_input_bytes:
            return await self._send_with_file(job, body, arguments, self._files)
        upload = uuid.uuid4().hex
        before = upload_input(self._keys.upload(upload), body)
        run = self._scripts.run(scripts.ENQUEUE, {"upload": upload} | arguments, before=before, value=text)
        reply = await await_reply(run, COMMAND_S + len(body) / _TRANSFER_BYTES_PER_S)
        if reply.status == "upload":
            raise to_not_ready(redis.ConnectionError("the input did not arrive whole"))
        return reply

    async def _send_with_file(
        self, job: Job, body: bytes, arguments: dict[str, Any], files: AsyncResultStore
    ) -> EnqueueReply:
        """Stores the body, then sends the job. A file of a job that is not added is deleted, or expires."""
        lifetime_s = self._settings.job_ttl_s + INPUT_GRACE_S
        [key] = new_keys(self._keys.prefix, job.id, "input", 1, lifetime_s, time.time())
        await files.put(key, body, INPUT_TYPE)
        named = arguments | {"upload": "", "input_bytes": 0, "input_key": key}
        reply = await await_reply(self._scripts.run(scripts.ENQUEUE, named, value=job.to_json()))
        if reply.status != "created":
            await files.delete([key])
        return reply

    async def acquire_rate_limit(self, owner: str, per_minute: int) -> float:
        """Charge one request to the rate limit of its owner.

        Effects: one atomic script. Its key expires when the owner sends nothing. A refused request costs nothing. A
        repeat after a lost reply pays twice.

        Returns:
            0, or the seconds until the owner may send again.

        Raises:
            NotReady: Redis does not answer.
        """
        run = self._scripts.run(scripts.ACQUIRE_RATE_LIMIT, {"owner": owner, "per_minute": per_minute})
        return (await await_reply(run)).wait_us / 1e6

    async def get(self, job_id: str) -> JobRecord | None:
        """The record, or None if the job is unknown or its record has expired.

        `queue_position` is 0 for the next job to be taken, None for one that runs, ended or waits for a retry.

        Effects: ends a job whose deadline has passed.
        """
        record = await self._get(job_id)
        if record is None or record.state.final or record.deadline_left_s is None or record.deadline_left_s > 0:
            return record
        await await_reply(self._scripts.run(scripts.END_OVERDUE_JOBS, {"id": job_id}))
        return await self._get(job_id)

    async def _get(self, job_id: str) -> JobRecord | None:
        stored = await await_reply(self._scripts.run(scripts.GET_JOB, {"id": job_id}))
        return None if stored is None else stored.to_record()

    async def list_jobs(
        self, owner: str, state: JobState | None = None, max_jobs: int = 20, cursor: str | None = None
    ) -> Page:
        """The jobs of an owner, newest first; with `state` only those in it; with `cursor` the page after it.

        Effects: forgets jobs whose record has expired.
        """
        arguments = {"owner": owner, "state": state, "max_jobs": max_jobs, "cursor": cursor}
        reply = await await_reply(self._scripts.run(scripts.LIST_JOBS, arguments))
        return Page(tuple(stored.to_record() for stored in reply.records), reply.next_cursor)

    async def cancel(self, job_id: str) -> JobRecord | None:
        """Requests that a job stops; None if it is unknown.

        Effects: sets the flag. A queued job is canceled at once, though it counts against the queue limit until a
        worker meets its message; a running one ends at its next step; a final one stays as it is. Safe to repeat.
        """
        stored = await await_reply(self._scripts.run(scripts.CANCEL_JOB, {"id": job_id}))
        return None if stored is None else stored.to_record()

    async def delete(self, job_id: str) -> JobRecord | None:
        """Deletes a job that has ended, with its results; requests that any other stops, and returns its record.

        Effects: one atomic script, after its files in the result store are gone. The id is not free again before the
        record would have expired. Safe to repeat.

        Raises:
            StoreUnavailable: Its files cannot be deleted now; then the job stays.
            NotReady: Redis does not answer.
        """
        reply = await self.run(scripts.DELETE_JOB, {"id": job_id})
        if reply.keys:
            await require_files(self._files).delete(reply.keys)
            reply = await self.run(scripts.DELETE_JOB, {"id": job_id, "purged": True})
        return None if reply.record is None else reply.record.to_record()

    async def run(self, script: scripts.LuaScript[Value], arguments: Mapping[str, object]) -> Value:
        """Runs a script of this queue.

        Raises:
            NotReady: Redis does not answer.
        """
        return await await_reply(self._scripts.run(script, arguments))

    async def read_input(self, job_id: str) -> bytes | None:
        """The input blob of a job, or None if there is none any more."""
        key: Any = await await_reply(self._redis.execute_command("HGET", self._keys.job(job_id), "input_key"))
        if key is not None:
            return await require_files(self._files).get(key.decode())
        blob: Any = await await_reply(self._redis.execute_command("GET", self._keys.input(job_id)), self._transfer_s)
        return None if blob is None else bytes(blob)

    async def read_result(self, job_id: str, index: int, key: str | None = None) -> bytes | None:
        """One result, or None if there is none, it has expired, or it was evicted for newer ones.

        `key` is that of its record, where it lies in the result store.
        """
        if key is not None:
            return await require_files(self._files).get(key)
        read = self._redis.execute_command("HGET", self._keys.result(job_id), index)
        blob: Any = await await_reply(read, self._transfer_s)
        return None if blob is None else bytes(blob)

    async def wait(self, job_id: str, timeout_s: float, created: Job | None = None) -> JobRecord:
        """The final record as soon as there is one, or the latest record after `timeout_s`.

        Args:
            job_id: The job to wait for.
            timeout_s: How long to wait.
            created: The job, if this producer has just enqueued it. Its record is then not read before a poll is due,
                because the message of its end holds the outcome. Not for a job with a deadline, which only a read ends.

        Raises:
            NotFound: The job is unknown, or its record expired meanwhile.
            NotReady: Redis does not answer at the end of the time; before that it is waited for.
        """
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        with self._completions.waiter(job_id) as wake:
            if created is not None:
                await _wait_for_event(wake, min(_POLL_S, timeout_s))
                record = self._completions.completed_record(created)
                if record is not None:
                    return record
            while True:
                wake.clear()
                left_s = deadline_s - asyncio.get_running_loop().time()
                record = await self._poll(job_id, tolerant=left_s > 0)
                if record is not None and (record.state.final or left_s <= 0):
                    return record
                if record is not None and record.deadline_left_s is not None:
                    left_s = min(left_s, record.deadline_left_s)
                await _wait_for_event(wake, max(0.001, min(_POLL_S, left_s)))

    def events(self, job_id: str, last_event_id: str = "0-0") -> AsyncGenerator[JobEvent]:
        """As `giantleap.service.jobqueue.events.read_events`."""
        return read_events(self._redis, self._keys, job_id, last_event_id, self._block_ms)

    async def stats(self) -> QueueStats:
        """The queue at this moment. Effects: releases the bytes of results that have expired."""
        reply = await await_reply(self._scripts.run(scripts.READ_STATS), _PROBE_S)
        return QueueStats(
            queued={(lane.queue, lane.priority): lane.queued for lane in reply.lanes},
            processing=reply.processing,
            delayed=reply.delayed,
            dead_lettered=reply.dead_lettered,
            oldest_age_s=reply.oldest_age_us / 1e6,
            limit=self._settings.queue_limit,
            live_workers=reply.live_workers,
            recent_job_median_s=statistics.median(reply.durations_s) if reply.durations_s else None,
            blob_bytes=reply.blob_bytes,
            blob_budget_bytes=self._settings.blob_budget_bytes,
            queue_median_s={lane.queue: lane.median_s for lane in reply.lanes if lane.median_s is not None},
            generate_workers=reply.generate_workers,
            decode_workers=reply.decode_workers,
        )

    async def _retry_after_s(self) -> int:
        """Seconds until a retry may succeed, from cached statistics: refusals must be cheap."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._refusal[1]:
            self._refusal = (retry_after_s(await self.stats()), now_s + _REFUSAL_CACHE_S)
        return self._refusal[0]

    async def _poll(self, job_id: str, tolerant: bool) -> JobRecord | None:
        """The record; None, if `tolerant`, while Redis is unavailable."""
        try:
            record = await self.get(job_id)
        except NotReady:
            if not tolerant:
                raise
            return None
        if record is None:
            raise NotFound(f"No job {job_id} is known; it never was or its record has expired.")
        return record

    async def _watch_devices(self) -> None:
        """Keeps `devices` and `warnings` fresh; while Redis is unavailable they stay. Ends jobs past their deadline."""
        for turn in itertools.count(1):
            await asyncio.sleep(_DEVICES_EVERY_S)
            try:
                await self.read_devices()
                await await_reply(self._scripts.run(scripts.END_OVERDUE_JOBS))
                if turn % _WARNINGS_EVERY == 0:
                    await self.read_warnings()
            except NotReady as error:
                _LOG.warning("devices not read: %s", error.detail)


async def _wait_for_event(wake: asyncio.Event, timeout_s: float) -> None:
    """Returns when the event is set or the time is up. The `wait_for` of Python 3.11 creates a task for each call."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await wake.wait()
