"""Asks an app in this process, without a client between: what is sent is sent as it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlencode

from starlette.types import ASGIApp, Message

from tests.fuzz.bodies import Sent


@dataclass(frozen=True, slots=True)
class Got:
    status: int
    headers: dict[str, str]
    body: bytes


async def ask(app: ASGIApp, sent: Sent, cuts: Sequence[int] = ()) -> Got:
    """One request, its body in parts that end at `cuts`; the answer, whole."""
    edges = [0, *sorted(min(cut, len(sent.body)) for cut in cuts), len(sent.body)]
    parts = [sent.body[start:end] for start, end in pairwise(edges)]
    incoming: list[Message] = [
        {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
        for number, part in enumerate(parts)
    ]
    answered: list[Message] = []

    async def receive() -> Message:
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        answered.append(message)

    headers = [(b"host", b"test"), (b"content-length", str(len(sent.body)).encode())]
    headers += [(name.encode(), value.encode("latin-1", "replace")) for name, value in sent.headers.items()]
    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": sent.path, "raw_path": sent.path.encode(), "query_string": urlencode(sent.query).encode(),
        "root_path": "", "headers": headers, "client": ("127.0.0.1", 1), "server": ("test", 80), "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    start = answered[0]
    body = b"".join(message.get("body", b"") for message in answered[1:])
    return Got(start["status"], {n.decode(): v.decode("latin-1") for n, v in start["headers"]}, body)
