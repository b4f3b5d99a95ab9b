"""A minimal HTTP/1.1 load client: keep-alive connections, one request at a time on each.

It does as little as possible, so that the server dominates the times; every compared server gets the same bytes.
`benchmarks/load/run.py` plans the runs.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast


@dataclass(frozen=True, slots=True)
class Response:
    """One response: status, headers by lower-case name, and time."""

    status: int
    headers: dict[str, str]
    time_ms: float


@dataclass(frozen=True, slots=True)
class Load:
    """The result of a run: times of all 200 responses, the other responses, and the duration."""

    times_ms: list[float]
    refused: list[Response]
    duration_s: float
    offered: int = 0

    @property
    def per_s(self) -> float:
        """Successful responses per second."""
        return len(self.times_ms) / self.duration_s

    def quantile_ms(self, part: float) -> float:
        """Return the quantile `part` of the times, by nearest rank."""
        ordered = sorted(self.times_ms)
        return ordered[min(len(ordered) - 1, int(part * len(ordered)))]

    @property
    def median_ms(self) -> float:
        """Median time."""
        return statistics.median(self.times_ms)


@dataclass(slots=True)
class Connection(asyncio.Protocol):
    """One connection; `ask` sends a request and waits for the complete response."""

    _transport: asyncio.Transport | None = None
    _waiting: asyncio.Future[bytes] | None = None
    _received: bytearray = field(default_factory=bytearray)
    _body_at: int = -1
    _body_bytes: int = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transport is not a subclass

    def connection_lost(self, error: Exception | None) -> None:
        """Fail the pending request."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error or ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Complete the pending request when its body is complete."""
        self._received += data
        if self._body_at < 0:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._body_at = end + 4
            self._body_bytes = _content_length(bytes(self._received[:end]))
        if len(self._received) >= self._body_at + self._body_bytes:
            head = bytes(self._received[: self._body_at])
            self._received.clear()
            self._body_at = -1
            if self._waiting is not None and not self._waiting.done():
                self._waiting.set_result(head)

    async def ask(self, request: bytes) -> Response:
        """Send a request and wait for its response.

        Raises:
            ConnectionError: The server closed the connection.
            ValueError: The response has no Content-Length.
        """
        assert self._transport is not None
        self._waiting = asyncio.get_running_loop().create_future()
        started_s = time.perf_counter()
        self._transport.write(request)
        head = await self._waiting
        time_ms = 1000 * (time.perf_counter() - started_s)
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        return Response(int(lines[0].split(" ")[1]), headers, time_ms)

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    raise ValueError("the response has no Content-Length; this client does not read chunked bodies")


def to_request(path: str, body: bytes, headers: dict[str, str], method: str = "POST") -> bytes:
    """Return the bytes of one request."""
    sent = {"Host": "127.0.0.1", "Content-Length": str(len(body))} | headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


async def open_connections(port: int, number: int) -> list[Connection]:
    """Open `number` connections."""
    loop = asyncio.get_running_loop()
    opened = [await loop.create_connection(Connection, "127.0.0.1", port) for _ in range(number)]
    return [connection for _, connection in opened]


async def run_closed(
    port: int, request: bytes, clients: int, warm_up: int, seconds: float, allowed: tuple[int, ...] = (200,)
) -> Load:
    """Run a closed loop: each of `clients` sends its next request when the last one is answered.

    Raises:
        RuntimeError: The status of a response is not allowed.
    """
    connections = await open_connections(port, clients)
    try:
        for _ in range(-(-warm_up // clients)):
            await asyncio.gather(*(_ask(connection, request, allowed) for connection in connections))
        responses: list[Response] = []
        started_s = time.perf_counter()

        async def run(connection: Connection) -> None:
            while time.perf_counter() - started_s < seconds:
                responses.append(await _ask(connection, request, allowed))

        await asyncio.gather(*map(run, connections))
        return _to_load(responses, time.perf_counter() - started_s)
    finally:
        for connection in connections:
            connection.close()


async def _ask(connection: Connection, request: bytes, allowed: tuple[int, ...]) -> Response:
    response = await connection.ask(request)
    if response.status not in allowed:
        raise RuntimeError(f"got status {response.status}, expected {' or '.join(map(str, allowed))}")
    return response


def _to_load(responses: Sequence[Response], duration_s: float) -> Load:
    good = [response.time_ms for response in responses if response.status == 200]
    return Load(good, [response for response in responses if response.status != 200], duration_s, len(responses))


async def run_open(port: int, request: bytes, per_s: float, seconds: float, seed: int) -> Load:
    """Run an open loop: requests arrive as a Poisson process of rate `per_s`, independent of responses."""
    free: list[Connection] = await open_connections(port, 16)
    opened = list(free)
    responses: list[Response] = []
    tasks: list[asyncio.Task[None]] = []
    moments = random.Random(seed)

    async def send() -> None:
        if not free:
            fresh = await open_connections(port, 1)
            free.extend(fresh)
            opened.extend(fresh)
        connection = free.pop()
        responses.append(await connection.ask(request))
        free.append(connection)

    started_s = time.perf_counter()
    due_s = 0.0
    while due_s < seconds:
        due_s += moments.expovariate(per_s)
        await asyncio.sleep(max(0.0, due_s - (time.perf_counter() - started_s)))
        tasks.append(asyncio.create_task(send()))
    await asyncio.gather(*tasks)
    duration_s = time.perf_counter() - started_s
    for connection in opened:
        connection.close()
    return _to_load(responses, duration_s)


def median_of(runs: Sequence[float]) -> float:
    """Return the median of the rounds, rounded to three digits."""
    return round(statistics.median(runs), 3)
