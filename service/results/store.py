"""The store of results: what it does, and which one the settings name. Synchronous; workers call it from threads.

`giantleap.service.results.concurrent` is its form for asyncio. A store knows nothing of jobs: it holds whole objects
under the keys of `giantleap.service.results.keys`, and names those whose time has passed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from giantleap.service.errors import BadConfiguration, StoreUnavailable
from giantleap.service.results.files import FileStore
from giantleap.service.results.s3 import S3ResultStore
from giantleap.service.settings import Settings

INPUT_TYPE = "application/octet-stream"
"""Type of the object of an input."""
INPUT_GRACE_S = 60
"""How much longer than a result an input lives: it is stored before there is a record that names it."""


class ResultStore(Protocol):
    """Whole objects by key. Every method raises `StoreUnavailable` where the store does not do it."""

    @property
    def large_input_bytes(self) -> int:
        """Inputs from this size on go to the store; a smaller one costs less in Redis, in the write of its job."""

    def put(self, key: str, content: bytes, content_type: str) -> None:
        """Stores an object. On return it is safe; before that nobody can read any part of it."""

    def get(self, key: str) -> bytes | None:
        """An object; None if there is none."""

    def delete(self, keys: Sequence[str]) -> None:
        """Deletes objects; those that do not exist are no error."""

    def list_expired(self, prefix: str, now_s: float) -> Iterator[list[str]]:
        """The names of everything below the times of a key prefix that have passed, in batches."""

    def prune(self, prefix: str, now_s: float) -> None:
        """Deletes empty folders of times that have passed, where a store has folders."""

    def check(self) -> None:
        """Writes and deletes a small object.

        Raises:
            BadConfiguration: The store refuses, and a retry cannot help.
        """

    def ping(self) -> None:
        """Returns if the store answers."""


def open_store(settings: Settings) -> FileStore | S3ResultStore | None:
    """The store that the settings name; None for Redis. Opens no connection.

    Raises:
        BadConfiguration: The environment names what the client of S3 does not take.
    """
    url = urlsplit(settings.result_store or "redis")
    if url.scheme == "file":
        return FileStore(Path(unquote(url.path)), settings.key_prefix)
    if url.scheme == "s3":
        return S3ResultStore(url.netloc, url.path.strip("/"), settings.key_prefix)
    return None


def check_store(store: ResultStore | None) -> None:
    """Checks a store at the start of a process.

    Raises:
        BadConfiguration: It cannot be used; the message says what to do.
        StoreUnavailable: It does not answer now.
    """
    if store is None:
        return
    try:
        store.check()
    except BadConfiguration as error:
        raise BadConfiguration(f"result_store: {error.detail}") from error
    except StoreUnavailable as error:
        raise StoreUnavailable(f"result_store: {error.detail}") from error
