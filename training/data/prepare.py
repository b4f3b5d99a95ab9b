"""Prepare pairs of latents from photographs: pictures, tar shards or a data set in, `training/data/pairs_store.py` out.

Large enough pictures are cut into tiles without overlap; each tile is reduced for every scale head and encoded to
posterior means. The ordered pictures are divided into shards; a finished shard is never made again, so a killed run
resumes. Processes started by `torchrun`, on machines that share the folder, divide the shards.
"""

import hashlib
import json
import os
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from giantleap.models.atomic_file import replace_file
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.pixels.rgb import DAMAGE, open_picture, to_rgb
from giantleap.models.vae.autoencoder import Vae
from giantleap.training.data.frozen_vae import read_vae, vae_hash
from giantleap.training.data.hf_source import HubSource, list_rows
from giantleap.training.data.pairs_store import (
    LEVELS,
    PLAN,
    SUMMARY,
    PairsError,
    delete_shards,
    has_shard,
    has_tiles,
    read_skipped,
    tensor_hash,
    write_index,
    write_shard,
)

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
Filter = Literal["bicubic", "area"]
FILTERS: tuple[Filter, ...] = ("bicubic", "area")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READERS = 4  # threads that read and decompress pictures while tiles are encoded
READ_AHEAD = 8  # prefetched pictures


@dataclass(frozen=True)
class PrepareConfig:
    """Settings that determine the pairs.

    Attributes:
        source: A folder, read recursively for pictures and .tar files; one .tar file; or a data set.
        bundle: Directory of the bundle whose VAE encodes.
        out: Folder of the pairs.
        min_side_px: Pictures with a shorter side are skipped.
        tile_px: Side of a tile.
        batch: Tiles encoded at once.
        pictures_per_shard: Pictures per shard, the most that a kill can lose.
        dtype: Type of the latents on disk.
        filter: How tiles are reduced: "area" as renderers do; "mixed" takes both filters in turn, picture by picture.

    References: arXiv 2511.10629, section 4 (1440 px, tiles of 512 px, bicubic by 2 and 4).
    """

    source: Path | HubSource
    bundle: Path
    out: Path
    min_side_px: int = 1440
    tile_px: int = 512
    batch: int = 8
    pictures_per_shard: int = 64
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    filter: Filter | Literal["mixed"] = "bicubic"


class Source(Protocol):
    """A picture that can be read."""

    @property
    def name(self) -> str:
        """Name in the index."""
        ...

    @property
    def size_bytes(self) -> int:
        """Size of the encoded bytes."""
        ...

    def read(self) -> bytes:
        """Return the encoded bytes; may raise OSError."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A file, or a member of a tar file at a known offset."""

    name: str
    path: Path
    size_bytes: int
    offset: int = 0

    def read(self) -> bytes:
        """Return the encoded bytes; may raise OSError."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size_bytes)


@dataclass(frozen=True)
class Report:
    """The work of one process in one call."""

    pictures: int
    tiles: int
    spent_s: float
    is_finished: bool
    skipped: tuple[dict[str, Any], ...]

    @property
    def tiles_per_s(self) -> float:
        """Tiles per second."""
        return self.tiles / self.spent_s if self.spent_s > 0 else 0.0


def list_sources(source: Path | HubSource) -> tuple[Sequence[Source], list[str]]:
    """List every picture in a fixed order, and the tar files that end too early.

    Raises:
        PairsError: The folder or data set does not exist or has no picture.
    """
    if isinstance(source, HubSource):
        return list_rows(source), []
    if source.is_file() and source.suffix == ".tar":
        root, paths = source.parent, [source]
    elif source.is_dir():
        root = source
        paths = sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.relative_to(root).as_posix())
        paths = [path for path in paths if not is_hidden(path.relative_to(root))]
    else:
        raise PairsError(f"{source}: no folder and no .tar file")
    sources: list[FileSource] = []
    broken: list[str] = []
    for path in paths:
        name = to_name(path.relative_to(root))
        if path.suffix.lower() in SUFFIXES:
            sources.append(FileSource(name, path, path.stat().st_size))
        elif path.suffix.lower() == ".tar":
            members, is_whole = _list_tar(path, name)
            sources += members
            broken += [] if is_whole else [name]
    if not sources:
        raise PairsError(f"{source}: no picture ({', '.join(SUFFIXES)}) and no .tar file with one")
    return sources, broken


def _list_tar(path: Path, name: str) -> tuple[list[FileSource], bool]:
    members: list[FileSource] = []
    try:
        with tarfile.open(path, "r:") as tar:
            members.extend(
                FileSource(f"{name}/{to_name(Path(member.name))}", path, member.size, member.offset_data)
                for member in tar
                if member.isreg() and Path(member.name).suffix.lower() in SUFFIXES and not is_hidden(Path(member.name))
            )
    except (tarfile.TarError, OSError):
        return members, False
    return members, True


def is_hidden(path: Path) -> bool:
    """Whether a part of a relative path is hidden, as the resource files `._name` that macOS leaves beside pictures."""
    return any(part.startswith(".") and part not in (".", "..") for part in path.parts)


def to_name(path: Path) -> str:
    """A path as UTF-8 text: other bytes, which file names may hold, are escaped."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def to_reason(error: Exception) -> str:
    """Why a picture is damaged, without the text of the library, which may hold memory addresses."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than are read"
    return f"damaged or cut off ({type(error).__name__})"


def read_picture(source: Source) -> tuple[Image.Image | None, str, str]:
    """Read one picture.

    Returns:
        The picture, upright and in RGB, or None if damaged; the SHA-256 of its bytes; the reason it is damaged.
    """
    try:
        content = source.read()
    except OSError as error:
        return None, "", str(error.strerror)
    digest = hashlib.sha256(content).hexdigest()
    try:
        with open_picture(content)[0] as image:
            return to_rgb(image), digest, ""
    except DAMAGE as error:
        return None, digest, to_reason(error)


def cut_tiles(picture: Image.Image, tile_px: int) -> dict[tuple[int, int], Tensor]:
    """Cut tiles [3, tile_px, tile_px] in [-1, 1] from the top left, by row and column, without overlap or remainder."""
    pixels = np.asarray(picture)
    rows, columns = pixels.shape[0] // tile_px, pixels.shape[1] // tile_px
    tiles = {}
    for row in range(rows):
        for column in range(columns):
            cut = pixels[row * tile_px : (row + 1) * tile_px, column * tile_px : (column + 1) * tile_px]
            tiles[row, column] = torch.from_numpy(cut.copy()).permute(2, 0, 1).float() / 127.5 - 1.0
    return tiles


def shrink_tiles(tiles: Tensor, level: int, kernel: Filter = "bicubic") -> Tensor:
    """Reduce [batch, 3, px, px] to [batch, 3, px / level, px / level]: antialiased bicubic and clamped, or by area."""
    if level == 1:
        return tiles
    if kernel == "area":
        return F.avg_pool2d(tiles, level)
    return F.interpolate(tiles, scale_factor=1.0 / level, mode="bicubic", antialias=True).clamp(-1.0, 1.0)


def encode_tiles(
    vae: Vae, tiles: Sequence[Tensor], config: PrepareConfig, kernel: Filter = "bicubic"
) -> dict[int, Tensor]:
    """Encode tiles and their reductions to posterior means, by level, on the CPU in the store's dtype."""
    parts: dict[int, list[Tensor]] = {level: [] for level in LEVELS}
    for start in range(0, len(tiles), config.batch):
        batch = torch.stack(list(tiles[start : start + config.batch])).to(vae.device)
        for level in LEVELS:
            parts[level].append(vae.encode(shrink_tiles(batch, level, kernel)).to("cpu", DTYPES[config.dtype]))
    return {level: torch.cat(batch) for level, batch in parts.items() if batch}


def prepare(
    config: PrepareConfig, device: torch.device, dtype: torch.dtype = torch.float32, rank: int = 0, world_size: int = 1
) -> Report:
    """Make the missing shards of this process; the last process writes the index.

    Args:
        config: The settings.
        device: Device of the VAE.
        dtype: Compute type of the VAE.
        rank: This process makes the shards with number % world_size == rank.
        world_size: Number of processes.

    Raises:
        PairsError: There is nothing to read, or `out` has pairs of other pictures, settings or another VAE.
        BundleError: The bundle cannot be read.
        ValueError: An encoded tile is not finite.
    """
    bundle = read_bundle(config.bundle)
    unit_px = bundle.latent_space.stride_px * max(LEVELS)
    if config.tile_px % unit_px or not 0 < config.tile_px <= config.min_side_px:
        raise PairsError(
            f"tile_px {config.tile_px}: a multiple of {unit_px} px, at most min_side_px {config.min_side_px}, is needed"
        )
    sources, broken = list_sources(config.source)
    config.out.mkdir(parents=True, exist_ok=True)
    encoder = {"latent_space": bundle.latent_space.name, "vae_sha256": vae_hash(bundle), "vae_dtype": str(dtype)}
    _check_plan(config, {**_plan(config, sources, broken), **encoder})
    groups = [sources[i : i + config.pictures_per_shard] for i in range(0, len(sources), config.pictures_per_shard)]
    mine = [n for n in range(rank, len(groups), world_size) if not has_shard(config.out, n)]
    vae = read_vae(bundle, device, dtype)
    started_s, tiles = time.monotonic(), 0
    skipped: list[dict[str, Any]] = []
    with (
        tqdm(total=sum(len(groups[n]) for n in mine), desc=f"prepare {rank}/{world_size}", unit="picture") as bar,
        ThreadPoolExecutor(READERS) as readers,
    ):
        for number in mine:
            latents, lines = _make_shard(vae, number, groups[number], config, readers, bar)
            write_shard(config.out, number, latents, lines)
            tiles += sum("skipped" not in line for line in lines)
            skipped += [line for line in lines if "skipped" in line]
            bar.set_postfix(tiles=tiles, skipped=len(skipped))
    spent_s = time.monotonic() - started_s
    is_finished = all(has_shard(config.out, number) for number in range(len(groups)))
    if is_finished:
        if not has_tiles(config.out):
            raise PairsError(_to_advice(config, unit_px, read_skipped(config.out)))
        write_index(config.out, len(groups))
        for leftover in config.out.glob(".shard-*.partial"):  # left by killed processes
            leftover.unlink(missing_ok=True)
    return Report(sum(len(groups[n]) for n in mine), tiles, spent_s, is_finished, tuple(skipped))


def _make_shard(
    vae: Vae,
    number: int,
    sources: Sequence[Source],
    config: PrepareConfig,
    readers: ThreadPoolExecutor,
    bar: "tqdm[None]",
) -> tuple[dict[int, Tensor], list[dict[str, Any]]]:
    """Return the latents and lines of one shard; they depend on the pictures alone."""
    parts: dict[int, list[Tensor]] = {level: [] for level in LEVELS}
    lines: list[dict[str, Any]] = []
    first = number * config.pictures_per_shard
    for index, (source, (picture, digest, fault)) in enumerate(_read_ahead(sources, readers), first):
        bar.update()
        head = {"source": source.name, "source_sha256": digest}
        if picture is None:
            lines.append({**head, "skipped": "corrupt", "why": fault})
            continue
        if min(picture.size) < config.min_side_px:
            why = f"{picture.width}x{picture.height} px"
            lines.append({**head, "skipped": "small", "why": why, "side_px": min(picture.size)})
            continue
        tiles = cut_tiles(picture, config.tile_px)
        kernel = FILTERS[index % len(FILTERS)] if config.filter == "mixed" else config.filter
        latents = encode_tiles(vae, list(tiles.values()), config, kernel)
        for place, (row, column) in enumerate(tiles):
            tile = {f"x{level}": latents[level][place] for level in LEVELS}
            if not all(bool(latent.isfinite().all()) for latent in tile.values()):
                raise ValueError(f"{source.name}: tile {row}, {column}: the VAE gave values that are not finite")
            hashes = {name: tensor_hash(latent) for name, latent in tile.items()}
            lines.append({**head, "tile": [row, column], "sha256": hashes})
        for level in LEVELS:
            parts[level].append(latents[level])
    return {level: torch.cat(batch) for level, batch in parts.items() if batch}, lines


def _read_ahead(
    sources: Sequence[Source], readers: ThreadPoolExecutor
) -> Iterator[tuple[Source, tuple[Image.Image | None, str, str]]]:
    for start in range(0, len(sources), READ_AHEAD):
        group = sources[start : start + READ_AHEAD]
        yield from zip(group, readers.map(read_picture, group), strict=True)


def _plan(config: PrepareConfig, sources: Sequence[Source], broken: Sequence[str]) -> dict[str, Any]:
    """Return the settings that all shards must share."""
    listed = hashlib.sha256()
    for source in sources:
        listed.update(f"{source.name}\0{source.size_bytes}\n".encode())
    return {
        "pictures": len(sources),
        "sources_sha256": listed.hexdigest(),
        "broken_tars": list(broken),
        "min_side_px": config.min_side_px,
        "tile_px": config.tile_px,
        "pictures_per_shard": config.pictures_per_shard,
        "dtype": config.dtype,
        "filter": config.filter,
    }


def _check_plan(config: PrepareConfig, plan: dict[str, Any]) -> None:
    path = config.out / PLAN
    if not path.exists():
        if any(config.out.glob("shard-*")) or (config.out / SUMMARY).exists():
            raise PairsError(f"{config.out}: shards without {PLAN}; prepare into another directory")
        replace_file(path, (json.dumps(plan, indent=1) + os.linesep).encode())
    stored = json.loads(path.read_text())
    differing = sorted(key for key in plan.keys() | stored.keys() if plan.get(key) != stored.get(key))
    if differing and not has_tiles(config.out):  # nothing is lost
        delete_shards(config.out)
        replace_file(path, (json.dumps(plan, indent=1) + os.linesep).encode())
    elif differing:
        raise PairsError(
            f"{config.out} was begun with other {', '.join(differing)}; prepare into another directory, or as before"
        )


def _to_advice(config: PrepareConfig, unit_px: int, skipped: Sequence[dict[str, Any]]) -> str:
    """Why no picture gave a tile, and with which sides some would."""
    sides_px = [line["side_px"] for line in skipped if line["skipped"] == "small"]
    corrupt = len(skipped) - len(sides_px)
    found = f"{len(sides_px)} have a side below {config.min_side_px} px, {corrupt} are damaged"
    if not sides_px:
        return f"no picture gave a tile: {found}; give other pictures"
    side_px = max(sides_px)
    if side_px < unit_px:
        return f"no picture gave a tile: {found}; give larger ones"
    tile_px = min(config.tile_px, side_px // unit_px * unit_px)
    change = f"--min-side-px {side_px}" + ("" if tile_px == config.tile_px else f" --tile-px {tile_px}")
    return f"no picture gave a tile: {found}; give larger ones, or {change}"


def count_skipped(report: Report) -> dict[str, int]:
    """Count the skipped pictures by reason."""
    return {reason: sum(line["skipped"] == reason for line in report.skipped) for reason in ("corrupt", "small")}
