"""The producer's side of the queue, used by the API processes: put a job in, watch it, cancel it, read its results.

All writes are scripts of `giantleap.service.jobqueue.scripts`; the worker's side is
`giantleap.service.jobqueue.consumer`. `wait` is woken by `giantleap.service.jobqueue.completions`, `events` reads the
job's own stream.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import re
import statistics
import uuid
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any

import redis

from giantleap.service.errors import (
    InvalidRequest,
    MalformedRequest,
    NotFound,
    NotReady,
    QueueFull,
    StorageFull,
    TooManyJobs,
)
from giantleap.service.jobqueue import scripts, scripts_producer
from giantleap.service.jobqueue.blobs import run_with_input
from giantleap.service.jobqueue.client import REDIS_UNAVAILABLE, AsyncRedis, check_client, is_passing
from giantleap.service.jobqueue.completions import CompletionListener
from giantleap.service.jobqueue.keys import FINISH, Keys
from giantleap.service.jobqueue.listing import LIST, Page
from giantleap.service.jobqueue.records import read_record
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.job import Job, JobEvent, JobRecord, JobState, Priority, QueueStats, UpscaleParams
from giantleap.service.settings import Settings

_POLL_S = 1.0
_DEVICES_EVERY_S = 3.0
_REFUSAL_KEPT_S = 0.25
_SMALL_BODY_BYTES = 1 << 20
_EVENT_ID = re.compile(r"\d{1,19}(-\d{1,19})?")  # each part has 64 bits
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Enqueued:
    """What became of an enqueue. `created` is False where the job was there already: the same key, or the same id."""

    job_id: str
    created: bool
    queue_position: int
    estimated_start_s: float | None = None


def retry_after_s(stats: QueueStats) -> int:
    """Whole seconds after which a refused caller may try again: depth x median / workers, 1 to 600.

    A waiting job counts with the median of its queue, one that runs or waits for a retry with that of all. Where no
    job has ended yet its time is unknown and taken as one second. With workers that only draw, or only finish, the
    slower half counts.
    """
    any_s = 1.0 if stats.recent_job_median_s is None else stats.recent_job_median_s
    work_s = {False: 0.0, True: 0.0}
    for (queue, _), jobs in stats.queued.items():
        work_s[queue.endswith(FINISH)] += jobs * stats.queue_median_s.get(queue, any_s)
    workers = max(1, stats.live_workers)
    begun_s = any_s * (stats.processing + stats.delayed) / workers
    waits_s = max(
        sum(work_s.values()) / workers,
        work_s[False] / max(1, workers - stats.finishing_workers),
        work_s[True] / max(1, workers - stats.drawing_workers),
    )
    return min(600, max(1, math.ceil(begun_s + waits_s)))


class JobProducer:
    """Everything the API does with the queue. Safe to share between all tasks of one event loop."""

    def __init__(self, redis: AsyncRedis, settings: Settings) -> None:
        self._block_ms = int(1000 * min(_POLL_S, check_client(redis)))
        self._redis = redis
        self._settings = settings
        self._keys = Keys(settings.key_prefix)
        self._limits = scripts.limits(settings)
        self._enqueue = redis.register_script(scripts.PRELUDE + scripts_producer.ENQUEUE)
        self._acquire_rate_limit = redis.register_script(scripts.PRELUDE + scripts_producer.SPEND)
        self._read = redis.register_script(scripts.PRELUDE + scripts_producer.READ)
        self._cancel = redis.register_script(scripts.PRELUDE + scripts_producer.CANCEL)
        self._end_overdue = redis.register_script(scripts.PRELUDE + scripts_producer.END_OVERDUE)
        self._stats = redis.register_script(scripts.PRELUDE + scripts_producer.STATS)
        self._list_devices = redis.register_script(scripts.PRELUDE + scripts_producer.DEVICES)
        self._list = redis.register_script(scripts.PRELUDE + LIST)
        self._devices: tuple[Device, ...] = ()
        self._completions = CompletionListener(redis, self._keys.done_channel)
        self._refusal: tuple[int, float] = (1, -math.inf)
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Checks that Redis answers and starts the listener that wakes `wait`, and what keeps `devices` fresh.

        Effects: loads the scripts. The groups are made by the scripts themselves, with each stream.

        Raises:
            NotReady: Redis does not answer.
        """
        await self.ping()
        mine = (
            self._enqueue,
            self._acquire_rate_limit,
            self._read,
            self._cancel,
            self._end_overdue,
            self._stats,
            self._list_devices,
            self._list,
        )
        for script in mine:
            await self._answer(self._redis.script_load(script.script))
        await self.read_devices()
        self._tasks = [
            asyncio.create_task(self._completions.listen(), name="job-done-listener"),
            asyncio.create_task(self._watch_devices(), name="device-watcher"),
        ]

    async def close(self) -> None:
        """Stops the tasks that `open` started. The client stays open: whoever opened it closes it."""
        for task in self._tasks:
            # redis-py 8.1 swallows a cancel that meets it while it sets up a connection, so one may not be enough.
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=0.1)
        self._tasks = []

    @property
    def devices(self) -> tuple[Device, ...]:
        """Of the live workers, as they were seconds ago: a request asks without a round trip."""
        return self._devices

    async def read_devices(self) -> None:
        """Brings `devices` up to date. What a worker of another version wrote is left out.

        Raises:
            NotReady: Redis does not answer.
        """
        devices = []
        for text in await self._answer(self._list_devices(keys=[self._keys.tag], args=[self._limits])):
            try:
                devices.append(Device.from_json(text.decode()))
            except ValueError as error:
                _LOG.warning("a worker's device is not understood: %s", error)
        self._devices = tuple(devices)

    async def ping(self) -> None:
        """Raises:
        NotReady: Redis does not answer or is still loading its data.
        """
        await self._answer(self._redis.ping())

    async def enqueue(
        self, job: Job, body: bytes | None = None, idempotency_key: str | None = None, max_live: int | None = None
    ) -> Enqueued:
        """Puts a job in the queue, or finds the one that is there already under the same key or the same id.

        Effects: one atomic script that writes the record, the input blob, the message and the `queued` event, or
        nothing. Safe to repeat with the same job: a retry after a lost reply adds nothing. A job under a known
        idempotency key is returned even where its record has expired. A key is the owner's: another owner's is another.

        Args:
            max_live: Jobs of the same owner that may be queued or running at once, this one included.

        Raises:
            InvalidRequest: the key or the id belongs to a job that asks for something else.
            QueueFull: `queue_limit` jobs are queued, running or waiting for a retry, or their latent pixels and those
                of this job are more than `queue_limit_latent_px`.
            TooManyJobs: `max_live` jobs of the owner are.
            StorageFull: the input does not fit beside the inputs of live jobs, whatever result is evicted.
            NotReady: Redis does not answer.
        """
        digest = job.payload_sha256() + await _sha256(body)
        keys = [self._keys.tag]
        if idempotency_key is not None:
            keys.append(self._keys.idempotency(idempotency_key, job.owner))
        args: list[str | bytes] = [self._limits, job.id, job.bundle, job.priority.value, job.to_json(), digest]
        args += [job.owner, str(-1 if max_live is None else max_live)]
        self._completions.discard(job.id)
        extra = _extra(job, len(body or b""))
        verdict, job_id, number, start_s = await self._answer(self._put(keys, args, extra, body))
        if verdict in (b"full", b"full_px"):
            limit, what = self._settings.queue_limit, "jobs"
            if verdict == b"full_px":
                limit = self._settings.queue_limit_latent_px or 0
                what = f"latent pixels besides the {job.latent_px} of this job"
            raise QueueFull(
                f"{number} {what} are in the queue, {limit} are allowed; try again after the time in Retry-After.",
                retry_after_s=await self._retry_after_s(),
            )
        if verdict == b"busy":
            raise TooManyJobs(
                f"{number} jobs of this key are queued or running, {max_live} are allowed; wait for one to end.",
                retry_after_s=await self._retry_after_s(),
            )
        if verdict == b"storage":
            raise StorageFull(
                f"The input has {len(body or b'')} bytes, {number} of {self._settings.blob_budget_bytes} are in "
                "use; try again when running jobs have ended.",
                retry_after_s=await self._retry_after_s(),
            )
        if verdict == b"mismatch":
            raise InvalidRequest(
                "The idempotency key or job id was used before for another request; a repeat must be the same "
                "request: send it unchanged or choose a new key."
            )
        return Enqueued(job_id.decode(), verdict == b"created", max(0, number), float(start_s) if start_s else None)

    async def _put(self, keys: list[str], args: list[str | bytes], extra: str, body: bytes | None) -> list[Any]:
        """The reply of ENQUEUE, with the body in front of it where there is one.

        While callers are being refused it asks first, so that nobody's body is sent for nothing.
        """
        loop = asyncio.get_running_loop()
        reply: list[Any] = [b"upload"]
        if not body or loop.time() < self._refusal[1]:
            reply = await self._enqueue(keys=keys, args=[*args, "", extra])
        if body and reply[0] == b"upload":
            upload = self._keys.upload(uuid.uuid4().hex)
            reply = await run_with_input(self._redis, self._enqueue, upload, body, keys, [*args, upload, extra])
        if reply[0] == b"upload":
            raise redis.ConnectionError("the input did not arrive whole")
        return reply

    async def acquire_rate_limit(self, owner: str, per_minute: int) -> float:
        """Pays for one request of an owner that may send so many a minute: 0, or the seconds until the next may come.

        Effects: one atomic script; its key goes by itself when the owner has been still. A refused request costs
        nothing. A repeat after a lost reply pays twice.

        Raises:
            NotReady: Redis does not answer.
        """
        wait_us: int = await self._answer(
            self._acquire_rate_limit(keys=[self._keys.tag], args=[self._limits, owner, per_minute])
        )
        return wait_us / 1e6

    async def get(self, job_id: str) -> JobRecord | None:
        """The record, or None where the job is unknown or its record has expired.

        `queue_position` is 0 for the next job to be taken, None for one that runs, ended or waits for a retry.

        Effects: ends a job whose deadline has passed.
        """
        arguments: Any = {"keys": [self._keys.tag], "args": [self._limits, job_id]}
        reply = await self._answer(self._read(**arguments))
        record = None if reply is None else read_record(reply)
        if record is None or record.state.final or record.deadline_left_s is None or record.deadline_left_s > 0:
            return record
        await self._answer(self._end_overdue(**arguments))
        reply = await self._answer(self._read(**arguments))
        return None if reply is None else read_record(reply)

    async def list_jobs(
        self, owner: str, state: JobState | None = None, most: int = 20, cursor: str | None = None
    ) -> Page:
        """An owner's jobs, newest first, those of one state if asked; the page after `cursor`, which a page gave.

        Effects: forgets jobs whose record has expired.
        """
        args = [self._limits, owner, state or "", most, cursor or ""]
        replies, last = await self._answer(self._list(keys=[self._keys.tag], args=args))
        return Page(tuple(map(read_record, replies)), last.decode() or None)

    async def cancel(self, job_id: str) -> JobRecord | None:
        """Asks that a job stops; None where it is unknown.

        Effects: sets the flag. A queued job is canceled at once, though it counts against the queue limit until a
        worker meets its message; a running one ends at its next step; a final one stays as it is. Safe to repeat.
        """
        reply = await self._answer(self._cancel(keys=[self._keys.tag], args=[self._limits, job_id]))
        return None if reply is None else read_record(reply)

    async def read_result(self, job_id: str, index: int) -> bytes | None:
        """One result blob, or None where there is none, it has expired, or it was evicted for newer ones."""
        blob: bytes | None = await self._answer(self._redis.hget(self._keys.result(job_id), str(index)))
        return blob

    async def wait(self, job_id: str, timeout_s: float, created: Job | None = None) -> JobRecord:
        """The final record as soon as there is one, or the latest record after `timeout_s`.

        Args:
            created: The job, where this producer has just put it in: it is not read but when a poll is due, for the
                message of its end says how it ended. Not for a job with a deadline, which only a read knows.

        Raises:
            NotFound: the job is unknown, or its record expired meanwhile.
            NotReady: Redis does not answer at the end of the time; before that it is waited for.
        """
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        with self._completions.waiter(job_id) as wake:
            if created is not None:
                await _woken(wake, min(_POLL_S, timeout_s))
                record = self._completions.completed_record(created)
                if record is not None:
                    return record
            while True:
                wake.clear()
                left_s = deadline_s - asyncio.get_running_loop().time()
                record = await self._look(job_id, patient=left_s > 0)
                if record is not None and (record.state.final or left_s <= 0):
                    return record
                if record is not None and record.deadline_left_s is not None:
                    left_s = min(left_s, record.deadline_left_s)
                await _woken(wake, max(0.001, min(_POLL_S, left_s)))

    async def events(self, job_id: str, last_event_id: str = "0-0") -> AsyncIterator[JobEvent]:
        """The job's events after `last_event_id`, as they come; ends after `done`.

        Raises:
            MalformedRequest: the id is not one that a stream gives.
            NotFound: the job is unknown or its record has expired.
        """
        if not _EVENT_ID.fullmatch(last_event_id):
            raise MalformedRequest("Last-Event-ID is not an event's id; allowed is `<ms>-<n>` as it was sent.")
        while True:
            # The state is read first: what was written together with a final state is seen by the read after it.
            state = await self._answer(self._redis.hget(self._keys.job(job_id), "state"))
            if state is None:
                raise NotFound(f"No job {job_id} is known; it never was or its record has expired.")
            final = JobState(state.decode()).final
            reply = await self._answer(
                self._redis.xread({self._keys.events(job_id): last_event_id}, block=None if final else self._block_ms)
            )
            for entry_id, fields in reply[0][1] if reply else ():
                last_event_id = entry_id.decode()
                name = fields[b"name"].decode()
                yield JobEvent(last_event_id, name, json.loads(fields[b"data"]))
                if name == "done":
                    return
            if final and not reply:
                return

    async def stats(self) -> QueueStats:
        """The queue at this moment. Effects: releases the bytes of results that have expired."""
        reply = await self._answer(self._stats(keys=[self._keys.tag], args=[self._limits]))
        queued, processing, delayed, dead, oldest_us, workers, durations, blob_bytes, medians, *partial = reply
        counts: dict[tuple[str, Priority], int] = {}
        for name, count in zip(queued[::2], queued[1::2], strict=True):
            queue, _, priority = name.decode().rpartition(":")
            counts[(queue, Priority(priority))] = count
        return QueueStats(
            queued=counts,
            processing=processing,
            delayed=delayed,
            dead_lettered=dead,
            oldest_age_s=oldest_us / 1e6,
            limit=self._settings.queue_limit,
            live_workers=workers,
            recent_job_median_s=statistics.median(map(float, durations)) if durations else None,
            blob_bytes=blob_bytes,
            blob_budget_bytes=self._settings.blob_budget_bytes,
            queue_median_s={
                queue.decode(): float(median_s)
                for queue, median_s in zip(medians[::2], medians[1::2], strict=True)
                if median_s
            },
            drawing_workers=partial[0],
            finishing_workers=partial[1],
        )

    async def _retry_after_s(self) -> int:
        """When a refused caller may come again, by the queue of a moment ago: a crowd must be cheap to refuse."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._refusal[1]:
            self._refusal = (retry_after_s(await self.stats()), now_s + _REFUSAL_KEPT_S)
        return self._refusal[0]

    async def _look(self, job_id: str, patient: bool) -> JobRecord | None:
        """The record; None, if `patient`, where Redis is away for now: the job itself is none the worse for that."""
        try:
            record = await self.get(job_id)
        except NotReady:
            if not patient:
                raise
            return None
        if record is None:
            raise NotFound(f"No job {job_id} is known; it never was or its record has expired.")
        return record

    async def _answer(self, command: Awaitable[Any]) -> Any:
        try:
            return await command
        except REDIS_UNAVAILABLE as error:
            raise _to_not_ready(error) from error
        except redis.ResponseError as error:
            if is_passing(error):
                raise _to_not_ready(error) from error
            raise

    async def _watch_devices(self) -> None:
        """Keeps `devices` fresh; where Redis is away the last ones stay. Ends jobs whose deadline nobody else sees."""
        while True:
            await asyncio.sleep(_DEVICES_EVERY_S)
            try:
                await self.read_devices()
                await self._answer(self._end_overdue(keys=[self._keys.tag], args=[self._limits, ""]))
            except (NotReady, redis.RedisError) as error:
                _LOG.warning("devices not read (%s)", type(error).__name__)


async def _woken(wake: asyncio.Event, timeout_s: float) -> None:
    """Returns when the event is set or the time is up. Python 3.11's `wait_for` would make a task of it each time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await wake.wait()


def _to_not_ready(error: Exception) -> NotReady:
    if isinstance(error, redis.ResponseError):
        return NotReady("Redis takes no writes at the moment, it is full or failing over; try again.", retry_after_s=5)
    return NotReady(
        f"Redis does not answer ({type(error).__name__}); it must be reachable and loaded: try again soon.",
        retry_after_s=1,
    )


async def _sha256(body: bytes | None) -> str:
    """Digest of a body, computed beside the event loop where it is large."""
    if body is None:
        return ""
    if len(body) <= _SMALL_BODY_BYTES:
        return hashlib.sha256(body).hexdigest()
    return (await asyncio.to_thread(hashlib.sha256, body)).hexdigest()


def _extra(job: Job, input_bytes: int) -> str:
    """What the enqueue script reads of a job besides its lane, where there is any."""
    extra: dict[str, object] = {"latent_px": job.latent_px, "cancel_after_s": job.cancel_after_s}
    extra["input_bytes"] = input_bytes
    extra["finish"] = isinstance(job.params, UpscaleParams)
    if job.webhook is not None:
        extra["webhook"] = json.dumps(dataclasses.asdict(job.webhook))
    return json.dumps({name: value for name, value in extra.items() if value})
