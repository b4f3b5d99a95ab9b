"""Progress of a job, read from a stream of server-sent events."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """One event: `queued`, `started`, `step`, `progress`, `stage`, `retrying` or `done`, with its data."""

    name: str
    data: Mapping[str, Any]
    id: str


@dataclass(slots=True)
class EventParser:
    """Turns the bytes of one connection into events. A block that the connection cut off is none."""

    _buffer: bytes = field(default=b"", init=False)

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that are complete with this chunk."""
        *blocks, self._buffer = (self._buffer + chunk.replace(b"\r", b"")).split(b"\n\n")
        for block in blocks:
            lines = (line.partition(": ") for line in block.decode().split("\n"))
            fields = {name: value for name, _, value in lines}
            if "data" in fields:  # else a heartbeat, or the time to wait before a reconnect
                yield Event(fields.get("event", "message"), json.loads(fields["data"]), fields.get("id", ""))
