"""The input of a batch job: files found below a path or URL, divided into shards, and read as rows.

A file of prompts (`.txt`, `.jsonl`) and a parquet file are divided into ranges of rows, a WebDataset tar is one shard,
and files of one latent or image each are put together in the order of their names. A shard is named by what it holds,
so that every process divides the same input alike.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from giantleap.batch import containers
from giantleap.batch.rows import Row
from giantleap.batch.store import BatchError, Store, open_filesystem

MEDIA: Final = (".npy", ".safetensors", ".png", ".jpg", ".jpeg", ".webp")
TARS: Final = (".tar", ".tar.gz", ".tgz")
_TEXTS: Final = (".txt", ".jsonl")
_SUFFIXES: Final = (*MEDIA, *TARS, *_TEXTS, ".parquet")


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows that one process claims.

    Attributes:
        name: Of the claim.
        paths: Files of one row each, or the one file that holds the rows.
        keys: Of files of one row each; of another file the start of its keys.
        rows: Which rows of a file that holds many; None for all.
    """

    name: str
    paths: tuple[str, ...]
    keys: tuple[str, ...]
    rows: range | None = None


class Source:
    """Files to read rows from.

    Args:
        url: A file, a folder, a pattern with `*`, or an fsspec URL of one of them.

    Raises:
        BatchError: Nothing that can be read is there.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._system, self._root = open_filesystem(url)
        try:
            self._paths = self._find()
        except OSError as error:
            raise BatchError(
                f"{url}: cannot be listed ({type(error).__name__}); check the path and the access"
            ) from error
        if not self._paths:
            raise BatchError(f"{url}: there is nothing to read; give files that end in one of {', '.join(_SUFFIXES)}")

    def _find(self) -> list[str]:
        if any(sign in self._root for sign in "*?["):
            found = self._system.glob(self._root)
        else:
            found = self._system.find(self._root) if self._system.isdir(self._root) else [self._root]
        hidden = re.compile(r"(^|/)[._][^/]*")
        visible = [path for path in found if not hidden.search(path.removeprefix(self._root))]
        return sorted(path for path in visible if path.lower().endswith(_SUFFIXES) and self._system.isfile(path))

    def refuse_output(self, store: Store) -> None:
        """Refuse an output among the inputs, which the next run would read.

        Raises:
            BatchError: It is below this folder.
        """
        if f"{store.root}/".startswith(f"{self._root}/"):
            raise BatchError(f"{store.url}: is in the input {self.url}; name an output outside of it")

    @property
    def has_tars(self) -> bool:
        """Whether rows can be counted only by reading them all."""
        return any(path.lower().endswith(TARS) for path in self._paths)

    def list_shards(self, rows_per_shard: int) -> list[Shard]:
        """Divide the files.

        Raises:
            BatchError: A file of rows cannot be opened.
        """
        media = [path for path in self._paths if path.lower().endswith(MEDIA)]
        keys = self._media_keys(media)
        shards = []
        for start in range(0, len(media), rows_per_shard):
            part = slice(start, start + rows_per_shard)
            shards.append(Shard(f"files-{_digest(*keys[part])}", tuple(media[part]), tuple(keys[part])))
        for path in self._paths:
            if not path.lower().endswith(MEDIA):
                shards += self._divide(path, rows_per_shard)
        return shards

    def read(self, shard: Shard) -> Iterator[Row]:
        """The rows of a shard; an unreadable one is a row with an error."""
        path = shard.paths[0]
        if path.lower().endswith(MEDIA):
            yield from (self._read_file(path, key) for path, key in zip(shard.paths, shard.keys, strict=True))
        elif path.lower().endswith(TARS):
            with self._system.open(path, "rb") as file:
                yield from containers.read_tar(file, shard.keys[0])
        elif shard.rows is not None:
            with self._system.open(path, "rb") as file:
                read = containers.read_parquet if path.lower().endswith(".parquet") else containers.read_lines
                yield from read(file, shard.keys[0], shard.rows, path.lower().endswith(".jsonl"))

    def _read_file(self, path: str, key: str) -> Row:
        try:
            return Row(key, body=bytes(self._system.cat_file(path)))
        except OSError as error:
            return Row(key, error=f"the file cannot be read ({type(error).__name__}); check it and its permissions")

    def _divide(self, path: str, rows_per_shard: int) -> Iterator[Shard]:
        key = self._stem(path)
        name = f"{re.sub(r'[^A-Za-z0-9_-]', '_', key)[-60:]}-{_digest(key, str(self._system.size(path)))}"
        if path.lower().endswith(TARS):
            yield Shard(name, (path,), (key,))
            return
        count = self._count_rows(path)
        for start in range(0, count, rows_per_shard):
            rows = range(start, min(start + rows_per_shard, count))
            yield Shard(f"{name}-{start:08d}", (path,), (key,), rows)

    def _count_rows(self, path: str) -> int:
        with self._system.open(path, "rb") as file:
            return containers.count_parquet(file, path) if path.lower().endswith(".parquet") else sum(1 for _ in file)

    def _media_keys(self, paths: Sequence[str]) -> list[str]:
        """The names without suffixes; names that differ only in the suffix keep it."""
        stems = Counter(map(self._stem, paths))
        return [self._stem(path) if stems[self._stem(path)] == 1 else self._relative(path) for path in paths]

    def _relative(self, path: str) -> str:
        below = path.removeprefix(self._root).lstrip("/") if path.startswith(f"{self._root}/") else ""
        return below or PurePosixPath(path).name

    def _stem(self, path: str) -> str:
        name = self._relative(path)
        end = next(suffix for suffix in sorted(_SUFFIXES, key=len, reverse=True) if name.lower().endswith(suffix))
        return name[: -len(end)]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
