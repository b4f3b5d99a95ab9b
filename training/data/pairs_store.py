"""Store pairs of latents on disk: safetensors shards, one JSON line per tile and scale, one summary.

`training/data/prepare.py` writes shards, `training/run.py` reads them. A shard has the tiles of a fixed list of
pictures and is complete or absent: its lines are written first, its tensors last, both by renaming a finished file.
The index is derived from the shards alone, so every process would write the same one.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from giantleap.models.atomic_file import replace_file, replacing

INDEX = "index.jsonl"
SUMMARY = "summary.json"
PLAN = "plan.json"
FORMAT = 1
LEVELS = (1, 2, 4)  # the tile, and its reduction for each scale head


class PairsError(ValueError):
    """Pairs are missing, unfinished, damaged, or do not match the request."""


def tensor_hash(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, row-major, in its own dtype."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.safetensors"


def has_shard(folder: Path, number: int) -> bool:
    """Return whether this shard is finished."""
    return (folder / shard_name(number)).is_file()


def has_tiles(folder: Path) -> bool:
    """Return whether a finished shard has a tile."""
    return any("skipped" not in line for line in _read_shard_lines(folder))


def read_skipped(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of skipped pictures in the finished shards."""
    return [line for line in _read_shard_lines(folder) if "skipped" in line]


def delete_shards(folder: Path) -> None:
    """Delete the shards and what was derived from them."""
    for path in (folder / SUMMARY, folder / INDEX, *folder.glob("shard-*")):
        path.unlink(missing_ok=True)


def _read_shard_lines(folder: Path) -> Iterator[dict[str, Any]]:
    for shard in sorted(folder.glob("shard-*.safetensors")):
        yield from _read_lines(shard.with_suffix(".jsonl"))


def write_shard(folder: Path, number: int, latents: Mapping[int, Tensor], lines: Sequence[Mapping[str, Any]]) -> None:
    """Write one shard: first its lines, then its tensors, which mark it finished.

    Args:
        folder: Folder of the pairs.
        number: Number of the shard.
        latents: [tiles, channels, h / level, w / level] by level (1, 2 and 4); empty without tiles.
        lines: One per tile, in the tensors' order, and one per skipped picture.
    """
    path = folder / shard_name(number)
    replace_file(path.with_suffix(".jsonl"), _to_lines(lines))
    replace_file(path, save({f"x{level}": tensor.contiguous() for level, tensor in latents.items()}))


def write_index(folder: Path, shard_count: int) -> dict[str, Any]:
    """Write index and summary of finished shards; idempotent.

    Raises:
        PairsError: A shard is missing.
    """
    missing = [number for number in range(shard_count) if not has_shard(folder, number)]
    if missing:
        raise PairsError(f"{folder}: {len(missing)} of {shard_count} shards are not there yet")
    shards: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    with replacing(folder / INDEX) as file:  # line by line: an index of millions of tiles takes gigabytes
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
    """Yield the index lines: shard, position, source, its SHA-256, tile (row, column), scale, SHA-256 of the latent."""
    return _read_lines(folder / INDEX)


@dataclass(frozen=True)
class PairsStore:
    """Finished pairs, read by tile.

    Attributes:
        folder: Folder of the pairs.
        summary: Content of `summary.json`.
        starts: Number of the first tile of each shard, then the total.
    """

    folder: Path
    summary: Mapping[str, Any]
    starts: Sequence[int]

    @classmethod
    def open(cls, folder: Path) -> "PairsStore":
        """Open pairs without reading tensors.

        Raises:
            PairsError: They are missing, unfinished, empty, or of another format.
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
        """Read these tiles: [tiles, channels, h / level, w / level], float32, by level."""
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
        """Compare all tiles with their digests.

        Raises:
            PairsError: A tile differs.
        """
        for line in read_index(self.folder):
            with safe_open(self.folder / line["shard"], framework="pt") as file:
                digest = tensor_hash(file.get_slice(f"x{line['scale']}")[line["place"]])
            if digest != line["sha256"]:
                raise PairsError(f"{self.folder / line['shard']}: tile {line['place']} x{line['scale']} is damaged")

    def statistics(self, count: int = 256) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of each channel of the large latents over the first tiles; both [channels]."""
        large = self.read(range(min(count, len(self))), (1,))[1]
        return large.mean(dim=(0, 2, 3)), large.std(dim=(0, 2, 3))


def _to_lines(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    # not splitlines, which also splits at characters that a file name may contain
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
