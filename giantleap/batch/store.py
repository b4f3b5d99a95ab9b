"""The output of a batch job: a folder or an S3 bucket by fsspec, where a file appears whole or not at all."""

import secrets
from typing import Any, Final

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from giantleap.models.messages import install_hint

_CREATES_BY_PUT: Final = frozenset({"s3", "s3a"})
"""Stores with a conditional put: `If-None-Match: *`."""
_CREATES_BY_OPEN: Final = frozenset({"file", "local", "memory"})


class BatchError(ValueError):
    """An input, an output or an option that a batch job cannot use."""


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path in it.

    Raises:
        BatchError: There is no such file system, or its package is not installed.
    """
    try:
        system, path = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise BatchError(f"{url}: a package for this kind of URL is missing; {install_hint('batch')}") from error
    except ValueError as error:
        raise BatchError(f"{url}: unknown kind of URL; name a path or an s3:// URL") from error
    return (LocalFileSystem(auto_mkdir=True) if isinstance(system, LocalFileSystem) else system), str(path).rstrip("/")


class Store:
    """Files below a folder or URL, by names with `/`.

    Raises:
        BatchError: As `open_filesystem`, or the file system cannot create a file exclusively.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._system, self.root = open_filesystem(url)
        protocols = self._system.protocol
        self._protocols = {protocols} if isinstance(protocols, str) else set(protocols)
        if not self._protocols & (_CREATES_BY_OPEN | _CREATES_BY_PUT):
            raise BatchError(f"{url}: processes cannot share it safely; name a folder or an s3:// URL")

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        try:
            return bytes(self._system.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file. Effects: in a folder under a temporary name first, which a kill leaves behind."""
        path = self._path(name)
        if not isinstance(self._system, LocalFileSystem):
            self._system.pipe_file(path, content)
            return
        temporary = f"{path}.{secrets.token_hex(4)}.tmp"
        self._system.pipe_file(temporary, content)
        self._system.mv(temporary, path)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that does not exist yet; False if it does. Of several processes one succeeds."""
        path = self._path(name)
        try:
            if self._protocols & _CREATES_BY_PUT:
                self._system.pipe_file(path, content, mode="create")
            else:
                with self._system.open(path, "xb") as file:
                    file.write(content)
        except FileExistsError:
            return False
        return True

    def delete(self, name: str) -> None:
        """Delete a file, which exists."""
        self._system.rm_file(self._path(name))

    def names(self, folder: str) -> list[str]:
        """The names of all files below a folder, without its own name; none if it does not exist."""
        prefix = f"{self._path(folder)}/"
        return [path.removeprefix(prefix) for path in self._system.find(prefix) if not path.endswith(".tmp")]

    def modified_s(self, name: str) -> float | None:
        """When a file was written, Unix seconds by the clock of the store; None if there is none."""
        try:
            return float(self._system.modified(self._path(name)).timestamp())
        except FileNotFoundError:
            return None

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"
