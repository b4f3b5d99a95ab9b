"""Pairs of latents on disk: shards of safetensors, a line of JSON for every tile and scale, one summary.

`training/data/prepare.py` writes shards, `training/run.py` reads them. A shard holds the tiles of a fixed list of
pictures and is whole or not there: its lines are written first, its tensors last, both by renaming a finished file. The
index follows from the shards alone, so whoever comes last writes the same one.
"""

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

INDEX = "index.jsonl"
SUMMARY = "summary.json"
PLAN = "plan.json"
FORMAT = 1
LEVELS = (1, 2, 4)  # a tile as it is, and shrunk for each scale head


class PairsError(ValueError):
    """Pairs that are missing, unfinished, damaged, or not those that were asked for."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is whole at any moment: the old content or the new one, also after a power cut."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_file(path: Path, content: bytes) -> None:
    """As `replacing`, at once."""
    with replacing(path) as file:
        file.write(content)


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in row-major order and its own type."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


def has_shard(folder: Path, number: int) -> bool:
    """Whether this shard is finished."""
    return (folder / shard_name(number)).is_file()


def write_shard(folder: Path, number: int, latents: Mapping[int, Tensor], lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes one shard: first its lines, then its tensors, which make it count.

    Args:
        latents: By level (1, 2 and 4); no entry where no picture gave a tile.
        lines: One for each tile, in the tensors' order, and one for each picture that was skipped.

    **Shape** latents [tiles, channels, h / level, w / level].
    """
    path = folder / shard_name(number)
    replace_file(path.with_suffix(".jsonl"), _to_lines(lines))
    replace_file(path, save({f"x{level}": tensor.contiguous() for level, tensor in latents.items()}))


def write_index(folder: Path, shard_count: int) -> dict[str, Any]:
    """Writes index and summary of finished shards; repeating it changes nothing.

    Raises:
        PairsError: A shard is missing.
    """
    missing = [number for number in range(shard_count) if not has_shard(folder, number)]
    if missing:
        raise PairsError(f"{folder}: {len(missing)} of {shard_count} shards are not there yet")
    shards: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    with replacing(folder / INDEX) as file:  # line by line: the index of millions of tiles is gigabytes
        for number in range(shard_count):
            lines = _read_lines((folder / shard_name(number)).with_suffix(".jsonl"))
            tiles = [line for line in lines if "skipped" not in line]
            skipped += [line for line in lines if "skipped" in line]
            shards.append({"file": shard_name(number), "tiles": len(tiles)})
            content = _to_lines(_index_lines(shard_name(number), tiles))
            digest.update(content)
            file.write(content)
    summary = {
        "format": FORMAT,
        **json.loads((folder / PLAN).read_text()),
        "tiles": sum(shard["tiles"] for shard in shards),
        "skipped": skipped,
        "index_sha256": digest.hexdigest(),
        "shards": shards,
    }
    replace_file(folder / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _index_lines(shard: str, tiles: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for place, line in enumerate(tiles):
        head = {key: value for key, value in line.items() if key != "sha256"}
        for level in LEVELS:
            yield {"shard": shard, "place": place, **head, "scale": level, "sha256": line["sha256"][f"x{level}"]}


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Every line of the index: shard, place in it, source, its SHA-256, tile (row, column), scale, SHA-256."""
    return _read_lines(folder / INDEX)


@dataclass(frozen=True)
class PairsStore:
    """Finished pairs, read tile by tile.

    Args:
        folder: Where they lie.
        summary: What `write_index` wrote.
        starts: Number of the first tile of each shard, and of all tiles at the end.
    """

    folder: Path
    summary: Mapping[str, Any]
    starts: Sequence[int]

    @classmethod
    def open(cls, folder: Path) -> "PairsStore":
        """Opens pairs without reading tensors.

        Raises:
            PairsError: They are missing or not finished, of another format, or empty.
        """
        try:
            summary = json.loads((folder / SUMMARY).read_text())
        except OSError as error:
            raise PairsError(f"{folder} holds no finished pairs: run `giantleap train prepare` (again)") from error
        if summary["format"] != FORMAT:
            raise PairsError(f"{folder}: format {summary['format']}; this version reads format {FORMAT}")
        starts = [0, *itertools.accumulate(shard["tiles"] for shard in summary["shards"])]
        if not starts[-1]:
            raise PairsError(f"{folder}: no picture gave a tile; {len(summary['skipped'])} were skipped ({SUMMARY})")
        return cls(folder, summary, starts)

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, tiles: Sequence[int], levels: Sequence[int] = LEVELS) -> dict[int, Tensor]:
        """The latents of these tiles, by level.

        **Shape** each [tiles, channels, h / level, w / level], float32.
        """
        rows: dict[int, list[Tensor]] = {level: [] for level in levels}
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for shard, place in map(self._place, tiles):
                if shard not in files:
                    files[shard] = stack.enter_context(safe_open(self.folder / shard, framework="pt"))
                for level in levels:
                    rows[level].append(files[shard].get_slice(f"x{level}")[place : place + 1].float())
        return {level: torch.cat(parts) for level, parts in rows.items()}

    def _place(self, tile: int) -> tuple[str, int]:
        if not 0 <= tile < len(self):
            raise IndexError(f"tile {tile}: {self.folder} has {len(self)}")
        number = bisect.bisect_right(self.starts, tile) - 1
        return self.summary["shards"][number]["file"], tile - self.starts[number]

    def check(self) -> None:
        """Reads everything and compares it with its digests.

        Raises:
            PairsError: A tile differs.
        """
        for line in read_index(self.folder):
            with safe_open(self.folder / line["shard"], framework="pt") as file:
                found = tensor_hash(file.get_slice(f"x{line['scale']}")[line["place"]])
            if found != line["sha256"]:
                raise PairsError(f"{self.folder / line['shard']}: tile {line['place']} x{line['scale']} is damaged")

    def statistics(self, count: int = 256) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel of the large latents, over the first tiles; both [channels]."""
        large = self.read(range(min(count, len(self))), (1,))[1]
        return large.mean(dim=(0, 2, 3)), large.std(dim=(0, 2, 3))


def _to_lines(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    # Not splitlines, which also cuts at characters that a file name may hold.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
