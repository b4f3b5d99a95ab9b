"""The result store of a chaos run: contents that show whether they are whole, a reader at work, and what is left."""

import hashlib
import os
import random
import time
from dataclasses import dataclass, field

from giantleap.service.errors import StoreUnavailable
from giantleap.service.results.store import ResultStore
from tests.s3_server import S3Server

_FILLING_BYTES = 200_000
_PER_LOOK = 8


def to_content(line: str) -> bytes:
    """A content that begins with a line and ends with its own digest."""
    content = line.encode() + b"\n" + os.urandom(_FILLING_BYTES)
    return content + hashlib.sha256(content).digest()


def is_whole(content: bytes) -> bool:
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@dataclass
class StoredFiles:
    """What a run looks at of its store.

    Attributes:
        store: A client of its own.
        prefix: First part of every key.
        server: The server of S3; None: the store is a directory.
        reads: How many results were read whole in the middle of the run.
        torn: Names of those that were not.
    """

    store: ResultStore
    prefix: str
    server: S3Server | None = None
    reads: int = 0
    torn: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """The names of everything in the store, half-written files too."""
        return [name for batch in self.store.list_expired(self.prefix, time.time() + 1e6) for name in batch]

    def look(self) -> None:
        """Reads some results, whoever may be writing them."""
        try:
            results = [name for name in self.names() if ".result-" in name and not name.endswith(".part")]
            for name in random.sample(results, min(_PER_LOOK, len(results))):
                content = self.store.get(name)
                if content is not None and not is_whole(content):
                    self.torn.append(name)
                self.reads += content is not None
        except StoreUnavailable:
            return  # it is killed meanwhile

    def read(self, key: str) -> bytes | None:
        return self.store.get(key)

    def harm(self) -> None:
        """kill -9, and a start on the same files."""
        assert self.server is not None
        self.server.kill()
        self.server.start()

    def await_empty(self, within_s: float) -> list[str]:
        """The names of what is left as soon as it is nothing, or when the time is up."""
        deadline_s = time.monotonic() + within_s
        while (left := self.names()) and time.monotonic() < deadline_s:
            time.sleep(1)
        return left
