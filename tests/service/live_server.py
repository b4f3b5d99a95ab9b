"""A real uvicorn in a thread, on a loopback port of its own, for what only sockets show: streams, leaving, crowds."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

_TIMEOUT_S = 60.0


@contextlib.contextmanager
def live_server(app: FastAPI, **options: Any) -> Iterator[str]:
    """Run the app until the block ends; yields its base URL. `options` are uvicorn's."""
    plain = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": 5}
    with serve(uvicorn.Config(app, **plain | options)) as url:
        yield url


@contextlib.contextmanager
def serve(config: uvicorn.Config) -> Iterator[str]:
    """Serve on a free port of loopback until the block ends; yields the base URL."""
    config.port = 0
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline_s, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(_TIMEOUT_S)
        assert not thread.is_alive(), "the server did not stop"


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def read_response(client: socket.socket) -> bytes:
    """Read one response whose body is a JSON object; head and body may come in parts."""
    response = b""
    while not response.endswith(b"}"):
        part = client.recv(65536)
        assert part, response
        response += part
    return response
