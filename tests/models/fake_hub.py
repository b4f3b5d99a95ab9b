"""A Hugging Face hub on a loopback port: what `giantleap.models.bundle.hub` uses of the real one, and the ways in which
it fails."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

Repository = dict[str, bytes]


@dataclass
class FakeHub:
    """Repositories by hub id, and what happened.

    Args:
        repositories: Hub id -> file name -> content. Their commit is `commit_of(hub_id)`.
        breaks: File name -> how many bytes of each answer come before the connection closes.
        statuses: File name or hub id -> status to answer with in place of the content.
        ranges: Whether `Range` is honored.
        changed: Files that come with other bytes than the hub names.
    """

    repositories: dict[str, Repository]
    endpoint: str = ""
    breaks: dict[str, int] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    ranges: bool = True
    changed: set[str] = field(default_factory=set)
    moved: bool = False
    fetched: list[tuple[str, int]] = field(default_factory=list)
    """Name and first byte of each answer with content."""
    tokens: set[str | None] = field(default_factory=set)

    def commit_of(self, hub_id: str) -> str:
        return hashlib.sha1(f"{hub_id}{'later' if self.moved else ''}".encode()).hexdigest()

    def listing(self, hub_id: str) -> dict[str, Any]:
        files = self.repositories[hub_id]
        return {
            "id": hub_id,
            "sha": self.commit_of(hub_id),
            "siblings": [
                {"rfilename": name, "size": len(content), "blobId": "0", **_lfs(name, content)}
                for name, content in files.items()
            ],
        }


def _lfs(name: str, content: bytes) -> dict[str, Any]:
    if name.endswith((".json", ".txt", ".md")):
        return {}
    return {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.hub.tokens.add(self.headers.get("Authorization"))
        if path.startswith("api/models/"):
            hub_id, _, revision = path.removeprefix("api/models/").partition("/revision/")
            self._list(hub_id, revision)
        else:
            hub_id, _, rest = path.partition("/resolve/")
            commit, _, name = rest.partition("/")
            self._send_file(hub_id, commit, name)

    def _list(self, hub_id: str, revision: str) -> None:
        hub = self.server.hub
        if status := hub.statuses.get(hub_id):
            self.send_error(status)
        elif hub_id not in hub.repositories or revision not in ("main", hub.commit_of(hub_id)):
            self.send_error(404)
        else:
            content = json.dumps(hub.listing(hub_id)).encode()
            self._send_header(200, len(content))
            self.wfile.write(content)

    def _send_file(self, hub_id: str, commit: str, name: str) -> None:
        hub = self.server.hub
        content = hub.repositories.get(hub_id, {}).get(name)
        if status := hub.statuses.get(name):
            self.send_error(status)
            return
        if content is None or commit != hub.commit_of(hub_id):
            self.send_error(404)
            return
        if name in hub.changed:
            content = bytes(len(content))
        requested = self.headers.get("Range") if hub.ranges else None
        start = int(requested.removeprefix("bytes=").removesuffix("-")) if requested else 0
        hub.fetched.append((name, start))
        rest = content[start:]
        self._send_header(206 if requested else 200, len(rest))
        self.wfile.write(rest[: hub.breaks.get(name, len(rest))])

    def _send_header(self, status: int, size_bytes: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size_bytes))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: FakeHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


@contextmanager
def serve_hub(repositories: dict[str, Repository]) -> Iterator[FakeHub]:
    hub = FakeHub(repositories)
    server = _Server(hub)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NO_PROXY", "127.0.0.1")
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
            patch.setattr("huggingface_hub.file_download.time.sleep", lambda delay_s: None)  # between its retries
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
