"""A TCP relay in a thread that cuts connections where a plan says so, for tests of clients that lose answers."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tests.streams import close_stream


@dataclass
class Relay:
    """Between a client and a service.

    Attributes:
        target: Host and port of the service.
        cut_after: For each connection to come, how many bytes of the service's answers it passes on before it is cut;
            connections after the last one are whole.
        cuts: Connections that were cut.
        writers: Connections to clients that are open.
    """

    target: tuple[str, int]
    cut_after: list[int] = field(default_factory=list)
    url: str = ""
    cuts: int = 0
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        try:
            await self._pass_both_ways(reader, writer)
        finally:
            await close_stream(writer)
            self.writers.remove(writer)

    async def _pass_both_ways(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        limit_bytes = self.cut_after.pop(0) if self.cut_after else None
        there_reader, there_writer = await asyncio.open_connection(*self.target)
        there = asyncio.create_task(_pass_on(reader, there_writer, None))
        if await _pass_on(there_reader, writer, limit_bytes):
            self.cuts += 1
            writer.transport.abort()
        await close_stream(there_writer)
        await there

    async def end(self) -> None:
        """Cut every connection and wait until none is left: a socket that a closed loop leaves open is a warning."""
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for writer in self.writers:
                writer.transport.abort()
            await asyncio.wait(others)


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter, limit_bytes: int | None) -> bool:
    """Whether it ended at the limit, and not with the connection."""
    passed_bytes = 0
    with contextlib.suppress(ConnectionError):
        while chunk := await source.read(4096):
            part = chunk if limit_bytes is None else chunk[: limit_bytes - passed_bytes]
            sink.write(part)
            await sink.drain()
            passed_bytes += len(part)
            if len(part) < len(chunk) or passed_bytes == limit_bytes:
                return True
        sink.close()
    return False


@contextlib.contextmanager
def running_relay(url: str) -> Iterator[Relay]:
    """Relay to a service until the block ends."""
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    relay = Relay((parts.hostname, parts.port))
    started, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        server = await asyncio.start_server(relay._serve, "127.0.0.1", 0)
        relay.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        await stop.wait()
        server.close()
        await relay.end()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield relay
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()
