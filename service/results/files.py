"""Results as files below one directory, each written under a temporary name, synced and renamed."""

import contextlib
import errno
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from giantleap.service.errors import BadConfiguration, StoreUnavailable
from giantleap.service.results.keys import PART_SUFFIX, check_key, is_expired, job_of, new_keys

_BATCH = 1000
_RETRY_S = 5
_PROBE_LIFETIME_S = 60
_WRONG = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG})


class FileStore:
    """Files of one directory, which all processes that use it must share.

    Args:
        root: The directory; made with the first file, for its owner only.
        key_prefix: First part of every key.
        large_input_bytes: Smaller inputs stay in Redis. The default is by `python -m benchmarks.load.inputs`.
    """

    def __init__(self, root: Path, key_prefix: str, large_input_bytes: int = 512 << 10) -> None:
        self._root = root
        self._key_prefix = key_prefix
        self.large_input_bytes = large_input_bytes

    def put(self, key: str, content: bytes, content_type: str) -> None:
        """As `ResultStore.put`; the type is that of the record."""
        path = self._root / check_key(key)
        temporary = path.with_name(path.name + PART_SUFFIX)
        try:
            self._make_folder(path.parent)
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            _sync_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise _to_unavailable(error) from error

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._root.mkdir(0o700, parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        _sync_folder(folder.parent)

    def get(self, key: str) -> bytes | None:
        """As `ResultStore.get`."""
        try:
            return (self._root / check_key(key)).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _to_unavailable(error) from error

    def delete(self, keys: Sequence[str]) -> None:
        """As `ResultStore.delete`."""
        try:
            for key in keys:
                if job_of(key) is None:
                    check_key(key)
                (self._root / key).unlink(missing_ok=True)
        except OSError as error:
            raise _to_unavailable(error) from error

    def list_expired(self, prefix: str, now_s: float) -> Iterator[list[str]]:
        """As `ResultStore.list_expired`."""
        for folder in self._expired_folders(prefix, now_s):
            names = [f"{prefix}/{folder.name}/{name}" for name in _names(folder)]
            for start in range(0, len(names), _BATCH):
                yield names[start : start + _BATCH]

    def prune(self, prefix: str, now_s: float) -> None:
        """As `ResultStore.prune`."""
        for folder in self._expired_folders(prefix, now_s):
            with contextlib.suppress(OSError):  # it holds a file that a job still names
                folder.rmdir()

    def _expired_folders(self, prefix: str, now_s: float) -> list[Path]:
        return [self._root / prefix / name for name in _names(self._root / prefix) if is_expired(name, now_s)]

    def check(self) -> None:
        """As `ResultStore.check`."""
        [key] = new_keys(self._key_prefix, "probe", "result", 1, _PROBE_LIFETIME_S, time.time())
        try:
            self.put(key, b"probe", "text/plain")
            self.delete([key])
        except StoreUnavailable as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _WRONG:
                raise BadConfiguration(
                    f"{self._root} cannot be written ({error.__cause__.strerror}); name a directory that this user "
                    "may write"
                ) from error
            raise

    def ping(self) -> None:
        """As `ResultStore.ping`."""
        if not os.access(self._root, os.W_OK | os.X_OK):
            raise StoreUnavailable(
                "the directory of results cannot be written; it must exist and this user may write it",
                retry_after_s=_RETRY_S,
            )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _to_unavailable(error) from error


def _sync_folder(folder: Path) -> None:
    """Makes the names of a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_unavailable(error: OSError) -> StoreUnavailable:
    return StoreUnavailable(
        f"the directory of results cannot be used now ({error.strerror or type(error).__name__}); it must have room "
        "and be writable: try again",
        retry_after_s=_RETRY_S,
    )
