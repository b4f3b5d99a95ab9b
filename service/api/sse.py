"""A job's progress as server-sent events: one text block per event, a heartbeat when nothing happens.

`giantleap.service.api.routes.jobs` answers with this stream; the events themselves come from
`giantleap.service.jobqueue.producer`.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

from giantleap.service.errors import GiantleapError, MalformedRequest
from giantleap.service.jobs.job import JobEvent

EVENT_STREAM_TYPE = "text/event-stream"
FROM_THE_START = "0-0"
HEARTBEAT_S = 15.0
_RETRY_MS = 2000
_EVENT_ID = re.compile(r"\d{1,19}-\d{1,19}")  # each part has 64 bits


def read_last_event_id(header: str | None) -> str:
    """Where to resume: the value of Last-Event-ID, or the start.

    Raises:
        MalformedRequest: it is no id that this service gave out.
    """
    if not header:
        return FROM_THE_START
    if not _EVENT_ID.fullmatch(header):
        raise MalformedRequest("Last-Event-ID is not an id of this stream; send the last `id:` line that you got")
    return header


def to_block(event: JobEvent) -> str:
    """One event in the text/event-stream format."""
    return f"id: {event.id}\nevent: {event.name}\ndata: {json.dumps(event.data, separators=(',', ':'))}\n\n"


async def stream_events(
    events: AsyncIterator[JobEvent], stopping: asyncio.Event, heartbeat_s: float = HEARTBEAT_S
) -> AsyncGenerator[str]:
    """Blocks of text until the job is done, the service stops or its store is lost; a client then resumes.

    Effects: closes `events` when the stream ends for whatever reason, a client that went away included.
    """
    yield f"retry: {_RETRY_MS}\n\n"
    stopped = asyncio.ensure_future(stopping.wait())
    pending = asyncio.ensure_future(_take(events))
    try:
        while not stopped.done():
            await asyncio.wait({pending, stopped}, timeout=heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
            if pending.done():
                event = pending.result()
                if event is None:
                    return
                yield to_block(event)
                pending = asyncio.ensure_future(_take(events))
            elif not stopped.done():
                yield ": heartbeat\n\n"
    except GiantleapError as error:  # Redis went away, or the job's record expired: too late for a problem
        yield f": {error.code}; reconnect to go on\n\n"
    finally:
        stopped.cancel()
        pending.cancel()
        with suppress(asyncio.CancelledError, GiantleapError):
            await pending
        if isinstance(events, AsyncGenerator):
            await events.aclose()


async def _take(events: AsyncIterator[JobEvent]) -> JobEvent | None:
    """The next event; None at the end (StopAsyncIteration cannot cross a task)."""
    return await anext(events, None)
