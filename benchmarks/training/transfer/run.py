"""Transfer the pocket adapter to an autoencoder with 12 channels and compare with ten times the steps from scratch.

`python -m benchmarks.training.transfer` makes the autoencoder (the principal components of 4 x 4 blocks), draws
pictures, encodes them, trains every variant with `training/run.py` (equal losses, batch and rate) and measures held-
out pictures and six photographs. It resumes where it was stopped; `--only` trains one variant. It writes
`benchmarks/results/transfer.json` and exits with 1 when the transferred adapter is more than 0.3 dB behind.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import PHOTO_PACKAGES, read_machine
from benchmarks.pictures import Pixels, read_leaves, write_pictures
from benchmarks.quality.photos import read_photos
from benchmarks.quality.routes import SCALES, psnr_db
from giantleap.models.atomic_file import replace_file
from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.network import Lua
from giantleap.models.vae.autoencoder import Vae
from giantleap.training.data.frozen_vae import read_vae
from giantleap.training.data.pairs_store import PairsStore
from giantleap.training.data.prepare import PrepareConfig, prepare
from giantleap.training.evaluation.cases import shrink
from giantleap.training.evaluation.held_out import evaluate
from giantleap.training.pocket.bundle import write_autoencoder_bundle
from giantleap.training.pocket.network import BlockPca, make_autoencoder, start_at_pca
from giantleap.training.pocket.pictures import to_images
from giantleap.training.run import DistributedContext, train
from giantleap.training.run_config import RunConfig, check_config
from giantleap.training.transfer import Start, prepare_start

CPU = torch.device("cpu")
TILE_PX = 256
HELD_OUT = 32
LEAVES, HELD_OUT_LEAVES = 160, 24
CHANNELS = 12
CROP_PX = 96  # of each picture of leaves, to fit the components
MAX_BEHIND_DB = 0.3
TIMES = 10  # times as many steps from scratch
BEST: Start = "fit"  # the start that is compared with scratch


@dataclass(frozen=True)
class Variant:
    """One adapter: its start (None: from scratch) and its number of steps."""

    name: str
    start: Start | None
    steps: int


def variants_of(steps: int) -> list[Variant]:
    """Return the variants that are compared."""
    starts: tuple[Start, ...] = ("fit", "slice", "fresh")
    return [
        *(Variant(f"transfer_{start}", start, steps) for start in starts),
        Variant("scratch_short", None, steps),
        Variant("scratch", None, TIMES * steps),
    ]


def draw_pictures(folder: Path, pool: Path, count: int) -> None:
    """Draw the missing pictures; the last `HELD_OUT` come from other leaves."""
    write_pictures(folder, read_leaves(pool, LEAVES, seed=0), range(count), TILE_PX)
    write_pictures(folder, read_leaves(pool, HELD_OUT_LEAVES, seed=1), range(count, count + HELD_OUT), TILE_PX)


def make_bundle(directory: Path, leaves: Pixels) -> None:
    """Write the bundle of another autoencoder: the principal components of 4 x 4 blocks, untrained."""
    crops = to_images(leaves[:, :CROP_PX, :CROP_PX])
    autoencoder = make_autoencoder(CHANNELS)
    start_at_pca(autoencoder, BlockPca.fit(crops, CHANNELS))
    write_autoencoder_bundle(directory, autoencoder)


def plan(bundle: Path, pairs: Path, start_file: Path | None, steps: int, rate: float, batch: int) -> RunConfig:
    """Return the run configuration; variants differ only in start and steps."""
    stage = {"name": "I", "steps": steps, "effective_batch": batch, "micro_batch": batch}
    values: dict[str, Any] = {
        "bundle": bundle,
        "pairs": pairs,
        "lua": {"preset": "pocket"} if start_file is None else {"start": start_file},
        "stages": [stage],
        "held_out_tiles": HELD_OUT,
        "optimizer": {"rate": rate, "warmup_steps": 20, "ema_decay": 0.99, "ema_warmup": True},
        "log_every": 50,
        "save_every": 25,
    }
    return check_config(values, "benchmarks.training.transfer")


def run_folder(variant: Variant, folder: Path, rate: float, batch: int) -> Path:
    """Return the folder of a run, distinct for every length, rate and batch."""
    return folder / f"{variant.name}_{variant.steps}x{batch}_{rate:g}"


def run_variant(variant: Variant, folder: Path, source: Path, bundle: Path, rate: float, batch: int) -> Path:
    """Train or resume one variant and return its weights; `start.safetensors` beside them is the transferred start."""
    out, pairs = run_folder(variant, folder, rate, batch), folder / "pairs"
    weights = out / "lua.safetensors"
    if weights.is_file():
        return weights
    start_file = None
    if variant.start is not None:
        start_file = out / "start.safetensors"
        out.mkdir(parents=True, exist_ok=True)
        if not start_file.is_file():
            write_lua(start_file, prepare_start(source, bundle, pairs, variant.start, CPU))
    return train(plan(bundle, pairs, start_file, variant.steps, rate, batch), out, DistributedContext(CPU), resume=True)


@dataclass(frozen=True)
class Photo:
    """One photograph, its small latents, and the PSNR of decode-then-bicubic by scale."""

    original: Tensor
    small: Mapping[int, Tensor]
    bicubic_db: Mapping[int, float]


@torch.no_grad()
def read_photo_latents(vae: Vae) -> list[Photo]:
    """Encode the photographs once for all variants, reduced as in `benchmarks/quality/photos.py`."""
    photos = []
    for original in tqdm(read_photos().values(), desc="photographs"):
        small = {scale: vae.encode(shrink(original, scale)) for scale in SCALES}
        enlarged = {s: F.interpolate(vae.decode(z), scale_factor=float(s), mode="bicubic") for s, z in small.items()}
        photos.append(Photo(original, small, {s: psnr_db(x, original) for s, x in enlarged.items()}))
    return photos


@torch.no_grad()
def measure(net: Lua, vae: Vae, store: PairsStore, photos: Sequence[Photo]) -> dict[str, float]:
    """Return PSNR in dB: held-out pictures against the decoded large latent, photographs against the originals."""
    scores, _ = evaluate(net, vae, store, range(len(store) - HELD_OUT, len(store)))
    figures = {}
    for scale in SCALES:
        values_db = [psnr_db(vae.decode(net(photo.small[scale], scale)), photo.original) for photo in photos]
        figures[f"held_out_x{scale}_db"] = scores[f"x{scale}_held_out_psnr_db"]
        figures[f"held_out_x{scale}_over_bicubic_db"] = scores[f"x{scale}_held_out_gain_db"]
        figures[f"photos_x{scale}_db"] = fmean(values_db)
        figures[f"photos_x{scale}_over_bicubic_db"] = fmean(
            value - photo.bicubic_db[scale] for value, photo in zip(values_db, photos, strict=True)
        )
    return {name: round(value, 3) for name, value in figures.items()}


def judge(figures: Mapping[str, Mapping[str, float]], steps: int) -> dict[str, float]:
    """Return the lead of the transferred adapter over scratch in dB; negative where it is behind."""
    moved, scratch = figures[f"transfer_{BEST} {steps}"], figures[f"scratch {TIMES * steps}"]
    names = [f"{kind}_x{scale}_db" for kind in ("held_out", "photos") for scale in SCALES]
    return {name: round(moved[name] - scratch[name], 3) for name in names}


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Format one line per variant."""
    names = [f"{kind}_x{scale}_db" for kind in ("held_out", "photos") for scale in SCALES]
    lines = [f"{'':<22}" + "".join(f"{name:>17}" for name in names)]
    lines += [f"{each:<22}" + "".join(f"{row[name]:>17.2f}" for name in names) for each, row in figures.items()]
    return "\n".join(lines)


def collect(
    variants: list[Variant], folder: Path, bundle: Bundle, rate: float, batch: int
) -> dict[str, dict[str, float]]:
    """Return the figures of every variant and of every start before training, cached beside the weights."""
    vae, store = read_vae(bundle, CPU, torch.float32), PairsStore.open(folder / "pairs")
    photos: list[Photo] = []
    figures: dict[str, dict[str, float]] = {}
    for variant in variants:
        names = ["lua"] if variant.start is None else ["start", "lua"]
        for name in names:
            weights = run_folder(variant, folder, rate, batch) / f"{name}.safetensors"
            cached = weights.with_suffix(".json")
            if not cached.is_file():
                photos = photos or read_photo_latents(vae)
                replace_file(cached, json.dumps(measure(read_lua(weights), vae, store, photos)).encode())
            steps = variant.steps if name == "lua" else 0
            figures[f"{variant.name} {steps}"] = {"steps": steps, **json.loads(cached.read_text())}
    return figures


def run(
    source: Path,
    folder: Path,
    pool: Path,
    out: Path,
    pictures: int,
    steps: int,
    rate: float,
    batch: int,
    only: str | None,
) -> None:
    """Train, measure, write the JSON; exit status 1 when the transfer is more than 0.3 dB behind."""
    torch.set_num_threads(1)
    draw_pictures(folder / "pictures", pool, pictures)
    bundle = folder / f"pocket{CHANNELS}"
    if not bundle.is_dir():
        make_bundle(bundle, read_leaves(pool, LEAVES, seed=0))
    prepare(PrepareConfig(folder / "pictures", bundle, folder / "pairs", TILE_PX, TILE_PX), CPU, torch.bfloat16)
    variants = variants_of(steps)
    for variant in variants:
        if only in (None, variant.name):
            typer.echo(f"{variant.name}: {run_variant(variant, folder, source, bundle, rate, batch)}")
    if only is not None:
        return
    figures = collect(variants, folder, read_bundle(bundle), rate, batch)
    ahead = judge(figures, steps)
    typer.echo(table(figures))
    typer.echo(f"transfer_{BEST} over scratch, dB: {ahead}")
    settings = {"pictures": pictures, "steps": steps, "rate": rate, "batch": batch, "start": BEST}
    is_met = min(ahead.values()) >= -MAX_BEHIND_DB
    record = {
        "machine": read_machine(PHOTO_PACKAGES),
        "settings": settings,
        "figures": figures,
        "ahead_db": ahead,
        "is_met": is_met,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
    if not is_met:
        raise typer.Exit(1)
