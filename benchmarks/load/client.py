"""A minimal HTTP/1.1 load client: keep-alive connections, one request at a time on each.

It does as little as possible, so that the server dominates the times; every compared server gets the same bytes.
`benchmarks/load/run.py` plans the runs.
"""

import asyncio
import contextlib
import random
import select
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast


@dataclass(frozen=True, slots=True)
class Response:
    """One response: status, headers by lower-case name, and time."""

    status: int
    headers: dict[str, str]
    time_ms: float


@dataclass(frozen=True, slots=True)
class Load:
    """The result of a run: times of all 200 responses, the other responses, the duration, the client's processor time.

    The processor time is that of an open loop only.
    """

    times_ms: list[float]
    refused: list[Response]
    duration_s: float
    offered: int = 0
    cpu_s: float = 0.0

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
        return to_response(head, time_ms)

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()


def to_response(head: bytes, time_ms: float) -> Response:
    """Read the head of a response."""
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return Response(int(lines[0].split(" ")[1]), headers, time_ms)


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


def run_open(port: int, request: bytes, per_s: float, seconds: float, seed: int) -> Load:
    """Run an open loop: requests arrive as a Poisson process of rate `per_s`, independent of responses.

    A time starts when its request was due, so that a late client counts as a slow server. One thread with plain sockets
    and prepared bytes sends and receives; responses are read apart after the run.

    Raises:
        ConnectionError: The server closed a connection.
        ValueError: A response has no Content-Length.
    """
    moments = random.Random(seed)
    due_s = [moments.expovariate(per_s)]
    while due_s[-1] < seconds:
        due_s.append(due_s[-1] + moments.expovariate(per_s))
    with contextlib.closing(OpenLoop(port, request)) as loop:
        cpu_s, started_s = time.process_time(), time.perf_counter()
        answers = loop.run(due_s)
        duration_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    return replace(_to_load([to_response(*answer) for answer in answers], duration_s), cpu_s=cpu_s)


class OpenLoop:
    """Keep-alive connections to a port, as many as there are responses to wait for."""

    def __init__(self, port: int, request: bytes) -> None:
        self._port = port
        self._request = request
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._free = [self._connect() for _ in range(16)]
        self._received: dict[int, bytes] = {}
        self._due_s: dict[int, float] = {}

    def run(self, due_s: Sequence[float]) -> list[tuple[bytes, float]]:
        """Send a request at each of the times, from now; returns head and time in ms of each response."""
        answers: list[tuple[bytes, float]] = []
        started_s, sent = time.perf_counter(), 0
        while sent < len(due_s) or self._due_s:
            now_s = time.perf_counter() - started_s
            while sent < len(due_s) and due_s[sent] <= now_s:
                self._send(due_s[sent])
                sent += 1
            for number, _ in self._poll.poll(due_s[sent] - now_s if sent < len(due_s) else None):
                head = self._receive(number)
                if head:
                    time_s = time.perf_counter() - started_s - self._due_s.pop(number)
                    answers.append((head, 1000 * time_s))
        return answers

    def close(self) -> None:
        """Close the connections."""
        for connection in self._sockets.values():
            connection.close()
        self._poll.close()

    def _connect(self) -> int:
        connection = socket.create_connection(("127.0.0.1", self._port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets[connection.fileno()] = connection
        self._poll.register(connection, select.EPOLLIN)
        return connection.fileno()

    def _send(self, due_s: float) -> None:
        number = self._free.pop() if self._free else self._connect()
        self._due_s[number] = due_s
        self._sockets[number].sendall(self._request)

    def _receive(self, number: int) -> bytes:
        """The head of a response that is complete, else nothing."""
        part = self._sockets[number].recv(65536)
        if not part and number in self._due_s:
            raise ConnectionResetError("the server closed the connection")
        if not part:  # it was idle for too long
            self._free.remove(number)
            self._poll.unregister(number)
            self._sockets.pop(number).close()
            return b""
        received = self._received.pop(number, b"") + part
        head, found, body = received.partition(b"\r\n\r\n")
        if found and len(body) >= _content_length(head):
            self._free.append(number)
            return head
        self._received[number] = received
        return b""


def median_of(runs: Sequence[float]) -> float:
    """Return the median of the rounds, rounded to three digits."""
    return round(statistics.median(runs), 3)
