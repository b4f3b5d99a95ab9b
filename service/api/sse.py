"""A job's progress as server-sent events: one text block per event, a heartbeat when nothing happens.

`giantleap.service.api.routes.jobs` responds with this stream; the events come from
`giantleap.service.jobqueue.producer`.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any

from giantleap.service.errors import GiantleapError, MalformedRequest
from giantleap.service.jobs.job import JobEvent

EVENT_STREAM_TYPE = "text/event-stream"
EVENT_STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
FROM_THE_START = "0-0"
HEARTBEAT_S = 15.0
_RETRY_MS = 2000
_EVENT_ID = re.compile(r"\d{1,19}-\d{1,19}")  # each part has 64 bits


def read_last_event_id(header: str | None) -> str:
    """Where to resume: the value of Last-Event-ID, or the start.

    Raises:
        MalformedRequest: It is not an event id of this service.
    """
    if not header:
        return FROM_THE_START
    if not _EVENT_ID.fullmatch(header):
        raise MalformedRequest("Last-Event-ID is not an id of this stream; send the last `id:` that you received")
    return header


def to_block(name: str, data: Mapping[str, Any], event_id: str | None = None) -> str:
    """One event in the text/event-stream format."""
    head = "" if event_id is None else f"id: {event_id}\n"
    return f"{head}event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


async def open_events(events: AsyncGenerator[JobEvent], ended: bool) -> AsyncGenerator[JobEvent] | None:
    """The events to stream; None where the job has ended and none is left.

    An empty stream would not do: EventSource would connect again for ever, and ends only on 204.

    Args:
        events: Events after the last one that the client has.
        ended: Whether the job is in a final state, so that all its events exist.
    """
    if not ended:
        return events
    first = await anext(events, None)
    return None if first is None else _put_back(first, events)


async def _put_back(first: JobEvent, events: AsyncGenerator[JobEvent]) -> AsyncGenerator[JobEvent]:
    try:
        yield first
        async for event in events:
            yield event
    finally:
        await events.aclose()


async def stream_events(
    events: AsyncGenerator[JobEvent], stopping: asyncio.Event, heartbeat_s: float = HEARTBEAT_S
) -> AsyncGenerator[str]:
    """Blocks of text until the job is done, the process stops or Redis is lost; a client can then resume.

    Closes `events` however the stream ends, also when the client disconnects.
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
                yield to_block(event.name, event.data, event.id)
                pending = asyncio.ensure_future(_take(events))
            elif not stopped.done():
                yield ": heartbeat\n\n"
    except GiantleapError as error:  # too late for a problem document
        yield f": {error.code}; reconnect to resume\n\n"
    finally:
        stopped.cancel()
        pending.cancel()
        with suppress(asyncio.CancelledError, GiantleapError):
            await pending
        await events.aclose()


async def _take(events: AsyncGenerator[JobEvent]) -> JobEvent | None:
    """The next event; None at the end (StopAsyncIteration cannot cross a task)."""
    return await anext(events, None)
