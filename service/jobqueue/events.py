"""Reads a job's event stream; the image of a preview is stored beside the stream, for a short time."""

import base64
import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from giantleap.service.errors import MalformedRequest, NotFound
from giantleap.service.jobqueue.client import AsyncRedis, await_reply
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobs.job import JobEvent, JobState

_STREAM_S = 30.0
_EVENT_ID = re.compile(r"\d{1,19}(-\d{1,19})?")  # each part has 64 bits


async def _read_event(
    redis: AsyncRedis, preview_key: str, entry_id: bytes, fields: Mapping[bytes, bytes]
) -> JobEvent | None:
    """The event of an entry; None for a preview whose image is gone.

    Raises:
        NotReady: Redis does not answer.
    """
    data = json.loads(fields[b"data"])
    if fields[b"name"] == b"preview":
        image: Any = await await_reply(redis.execute_command("HGET", preview_key, entry_id))
        if image is None:
            return None
        data["image"] = base64.b64encode(image).decode()
    return JobEvent(entry_id.decode(), fields[b"name"].decode(), data)


async def read_events(
    redis: AsyncRedis, keys: Keys, job_id: str, last_event_id: str, block_ms: int
) -> AsyncGenerator[JobEvent]:
    """The events of a job after `last_event_id`, as they arrive; ends after `done`.

    Raises:
        MalformedRequest: The id is not one that a stream gives.
        NotFound: The job is unknown or its record has expired.
    """
    if not _EVENT_ID.fullmatch(last_event_id):
        raise MalformedRequest("Last-Event-ID is not an event's id; allowed is `<ms>-<n>` as it was sent.")
    while True:
        # The state is read first: the read after it sees what was written together with a final state.
        read = redis.execute_command("HGET", keys.job(job_id), "state")
        state: Any = await await_reply(read, _STREAM_S)
        if state is None:
            raise NotFound(f"No job {job_id} is known; it never was or its record has expired.")
        final = JobState(state.decode()).final
        reply = await await_reply(
            _read_entries(redis, keys.events(job_id), last_event_id, None if final else block_ms), _STREAM_S
        )
        for entry_id, fields in reply:
            last_event_id = entry_id.decode()
            if (event := await _read_event(redis, keys.preview(job_id), entry_id, fields)) is not None:
                yield event
            if fields[b"name"] == b"done":
                return
        if final and not reply:
            return


async def _read_entries(
    redis: AsyncRedis, key: str, last_event_id: str, block_ms: int | None
) -> Sequence[tuple[bytes, Any]]:
    """Entries of a stream after an id; waits so long for the first."""
    reply: Any = await redis.xread({key: last_event_id}, block=block_ms)
    if isinstance(reply, dict):  # protocol 3
        return [entry for entries in reply.values() for part in entries for entry in part]
    return reply[0][1] if reply else ()
