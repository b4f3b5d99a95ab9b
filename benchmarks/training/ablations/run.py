"""Train and compare the variants of the paper's ablation tables at pocket scale, with equal numbers of updates.

`python -m benchmarks.training.ablations` (`make ablations`) draws procedural pictures, makes pairs of them with the
pocket bundle's frozen VAE, trains every variant with every seed through `training/run.py`, and measures each on the
six held-out photographs of `benchmarks/quality/photos.py`. Each result is stored at once in
`benchmarks/results/ablations.json`; a killed run continues with the first missing result. A page of the lab log is
written from that file.

References: arXiv 2511.10629, tables 3 and 4.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
import typer
from skimage.metrics import structural_similarity
from torch import Tensor

from benchmarks.machine import PHOTO_PACKAGES, read_machine
from benchmarks.pictures import read_leaves, write_pictures
from benchmarks.quality.photos import read_photos
from benchmarks.quality.routes import psnr_db
from giantleap.models.atomic_file import replace_file
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.network import Lua
from giantleap.models.vae.autoencoder import Vae
from giantleap.training.data.frozen_vae import read_vae, vae_hash
from giantleap.training.data.pairs_store import PairsStore
from giantleap.training.data.prepare import PrepareConfig, prepare
from giantleap.training.evaluation.cases import shrink
from giantleap.training.run import DistributedContext, train
from giantleap.training.run_config import RunConfig

CPU = torch.device("cpu")
PICTURE_PX = 256
LEAVES = 160
SCALES = (2, 4)
STEPS_SHARED_BY = 6  # a number of updates that one, two or three stages share evenly
NET = {"embed_dim": 24, "depths": [2, 2], "num_heads": 4, "window": 8, "num_feat": 32}
NET |= {"bicubic_skip": True, "latent_norm": True}
BATCH = {"I": 8, "II": 1, "III": 1}
OPTIMIZER = {"rate": 2e-3, "ema_decay": 0.99, "ema_warmup": True}  # the paper's 2e-4 and 0.999 are for 375,000 updates
LATENT_L1_ONLY = {"latent_l1": 1.0}


@dataclass(frozen=True)
class Variant:
    """One row of a table: what is trained, and the paper's result.

    Attributes:
        key: Name in the results file.
        title: Name in the table.
        stages: Names of the curriculum's stages; "L1" is stage I with the latent L1 alone.
        paper: The paper's PSNR in dB by scale.
        scales: Scales of the heads.
        head: `LuaSpec.head`.
        batch: Batch size of every stage; None for `BATCH`.
    """

    key: str
    title: str
    stages: tuple[str, ...]
    paper: Mapping[int, float]
    scales: tuple[int, ...] = SCALES
    head: str = "pixelshuffle"
    batch: int | None = None


FULL = ("I", "II", "III")
VARIANTS = (
    Variant("latent_l1", "latent L1 only", ("L1",), {2: 28.53, 4: 26.16}),
    Variant("latent_l1_alone", "latent L1 only, one tile an update", ("L1",), {}, batch=1),
    Variant("i_ii", "I + II", ("I", "II"), {2: 28.96, 4: 26.67}),
    Variant("i_iii", "I + III", ("I", "III"), {2: 31.05, 4: 27.10}),
    Variant("ii_iii", "II + III", ("II", "III"), {2: 31.60, 4: 27.40}),
    Variant("full", "I + II + III, both heads (joint)", FULL, {2: 32.54, 4: 27.94}),
    Variant("liif", "I + II + III, LIIF head", FULL, {2: 29.10, 4: 26.10}, head="liif"),
    Variant("only_x2", "I + II + III, x2 alone", FULL, {2: 31.92}, scales=(2,)),
    Variant("only_x4", "I + II + III, x4 alone", FULL, {4: 27.71}, scales=(4,)),
)
STAGES = ("latent_l1", "latent_l1_alone", "i_ii", "i_iii", "ii_iii", "full")  # the paper's table 3
HEADS = ("liif", "only_x2", "only_x4", "full")  # and 4


def config_of(variant: Variant, updates: int, seed: int, bundle: Path, pairs: Path) -> RunConfig:
    """Return the run configuration of a variant: `updates` in total, shared evenly by its stages."""
    stages = []
    for name in variant.stages:
        stage: dict[str, Any] = {"name": "I", "weights": LATENT_L1_ONLY} if name == "L1" else {"name": name}
        batch = variant.batch or BATCH[stage["name"]]
        stages.append(
            {**stage, "steps": updates // len(variant.stages), "effective_batch": batch, "micro_batch": batch}
        )
    values = {
        "bundle": bundle,
        "pairs": pairs,
        "lua": {"spec": {**NET, "scales": list(variant.scales), "head": variant.head}},
        "stages": stages,
        "optimizer": OPTIMIZER,
        "held_out_tiles": 0,
        "seed": seed,
        "checkpoints": False,  # one picture's feature maps fit
        "save_every": 10**6,
        "keep": 1,
    }
    return RunConfig.model_validate(values)


def make_pairs(out: Path, bundle: Path, pool: Path, count: int) -> None:
    """Draw and encode the pictures unless that is finished already.

    Copies the bundle to `out/bundle`, so that all variants use one VAE; writes `out/pictures` and `out/pairs`.
    """
    if (out / "pairs" / "summary.json").is_file():
        return
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(bundle, out / "bundle")
    write_pictures(out / "pictures", read_leaves(pool, LEAVES, seed=0), range(count), PICTURE_PX)
    prepare(PrepareConfig(out / "pictures", out / "bundle", out / "pairs", PICTURE_PX, PICTURE_PX), CPU)


@dataclass(frozen=True)
class Photo:
    """A photograph in [-1, 1], its reductions as latents by scale, and its VAE round trip."""

    original: Tensor
    small: Mapping[int, Tensor]
    round_trip: Tensor


@torch.no_grad()
def encode_photos(vae: Vae) -> dict[str, Photo]:
    """Encode the six photographs, by name."""
    return {
        name: Photo(
            photo,
            {scale: vae.encode(shrink(photo, scale)) for scale in SCALES},
            decode_picture(vae, vae.encode(photo)),
        )
        for name, photo in read_photos().items()
    }


@torch.no_grad()
def decode_picture(vae: Vae, latent: Tensor) -> Tensor:
    """Decode [1, channels, h, w] to [1, 3, height, width], clamped to [-1, 1]."""
    return vae.decode(latent).clamp(-1.0, 1.0)


def enlarge(maps: Tensor, scale: int) -> Tensor:
    """Upscale latents or pictures bicubically."""
    return F.interpolate(maps, scale_factor=float(scale), mode="bicubic")


def ssim(picture: Tensor, original: Tensor) -> float:
    """Return the SSIM of pictures in [-1, 1] (Wang et al. 2004, Gaussian windows), mean over channels."""
    one, two = (x[0].permute(1, 2, 0).double().numpy() for x in (picture, original))
    return float(
        structural_similarity(
            one, two, data_range=2.0, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def score(picture: Tensor, photo: Photo) -> dict[str, float]:
    """Return PSNR in dB and SSIM against the photograph, and PSNR against its VAE round trip."""
    return {
        "psnr_db": psnr_db(picture, photo.original),
        "ssim": ssim(picture, photo.original),
        "round_trip_psnr_db": psnr_db(picture, photo.round_trip),
    }


def mean_of(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each figure."""
    return {name: mean(each[name] for each in scores) for name in scores[0]}


@torch.no_grad()
def measure_net(net: Lua, vae: Vae, photos: Mapping[str, Photo]) -> dict[str, dict[str, float]]:
    """Return the mean of `score` over the photographs, by scale."""
    return {
        f"x{scale}": mean_of([score(decode_picture(vae, net(p.small[scale], scale)), p) for p in photos.values()])
        for scale in net.spec.scales
    }


@torch.no_grad()
def measure_untrained(vae: Vae, photos: Mapping[str, Photo]) -> dict[str, Any]:
    """Return the baselines (both bicubic upscales) and the ceiling (the round trip of the large photograph)."""
    result: dict[str, Any] = {
        "round_trip": mean_of([{**score(p.round_trip, p), "round_trip_psnr_db": 100.0} for p in photos.values()])
    }
    for scale in SCALES:
        pixel = [score(enlarge(decode_picture(vae, p.small[scale]), scale), p) for p in photos.values()]
        latent = [score(decode_picture(vae, enlarge(p.small[scale], scale)), p) for p in photos.values()]
        result[f"x{scale}"] = {"decode_then_bicubic": mean_of(pixel), "bicubic_latent": mean_of(latent)}
    return result


def run_one(
    variant: Variant, updates: int, seed: int, out: Path, vae: Vae, photos: Mapping[str, Photo]
) -> dict[str, Any]:
    """Train and measure one variant with one seed; an unfinished earlier run is discarded first."""
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    started_s, started_wall_s = time.process_time(), time.monotonic()
    weights = train(config_of(variant, updates, seed, out / "bundle", out / "pairs"), folder, DistributedContext(CPU))
    cpu_s, wall_s = time.process_time() - started_s, time.monotonic() - started_wall_s
    net = read_lua(weights)
    parameters = sum(weight.numel() for weight in net.parameters())
    scores = measure_net(net, vae, photos)
    return {"variant": variant.key, "seed": seed, "cpu_s": cpu_s, "wall_s": wall_s, "parameters": parameters, **scores}


def settings_of(updates: int, bundle: Path, pairs: Path) -> dict[str, Any]:
    """Return the settings that all results of one file share."""
    return {
        "updates": updates,
        "net": NET,
        "batch": BATCH,
        "optimizer": OPTIMIZER,
        "tiles": len(PairsStore.open(pairs)),
        "tile_px": PICTURE_PX,
        "vae_sha256": vae_hash(read_bundle(bundle)),
    }


def read_results(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results measured so far with these settings; an empty record if there is no file.

    Raises:
        ValueError: The file was made with other settings.
    """
    if not path.is_file():
        return {"machine": read_machine(PHOTO_PACKAGES), "settings": dict(settings), "runs": []}
    record: dict[str, Any] = json.loads(path.read_text())
    if record["settings"] != settings:
        raise ValueError(f"{path} holds results of other settings; move it away to start again")
    return record


def spread(values: Sequence[float], digits: int) -> str:
    """Format mean and sample deviation over the seeds."""
    if not values:
        return "-"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def to_markdown(record: Mapping[str, Any]) -> str:
    """Return the text of the page."""
    lines = [
        PAGE_HEAD.format(**record["settings"], **record["settings"]["net"], **_words(record)),
        *_table(record, STAGES),
    ]
    lines += ["", "## Heads (the paper's table 4)", "", *_table(record, HEADS)]
    return "\n".join([*lines, "", PAGE_TAIL.format(**record["settings"])])


def _words(record: Mapping[str, Any]) -> dict[str, Any]:
    seeds = {run["seed"] for run in record["runs"]}
    base = record["untrained"]
    about = record["machine"]
    return {
        "seeds": len(seeds),
        "runs": len(record["runs"]),
        "cpu_min": sum(run["cpu_s"] for run in record["runs"]) / 60,
        "ceiling": base["round_trip"]["psnr_db"],
        "pixel_2": base["x2"]["decode_then_bicubic"]["psnr_db"],
        "pixel_4": base["x4"]["decode_then_bicubic"]["psnr_db"],
        "latent_2": base["x2"]["bicubic_latent"]["psnr_db"],
        "latent_4": base["x4"]["bicubic_latent"]["psnr_db"],
        "where": f"{about['processor']}, {about['cores']} cores, torch {about['versions']['torch']}, one thread",
    }


def _values(record: Mapping[str, Any], key: str, scale: int, figure: str) -> list[float]:
    return [run[f"x{scale}"][figure] for run in record["runs"] if run["variant"] == key and f"x{scale}" in run]


def _table(record: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    head = ["variant", "x2 PSNR", "paper", "x4 PSNR", "paper", "CPU s", "weights"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for variant in (v for key in keys for v in VARIANTS if v.key == key):
        cells = [variant.title]
        for scale in SCALES:
            cells.append(spread(_values(record, variant.key, scale, "psnr_db"), 2))
            cells.append(f"{variant.paper[scale]:.2f}" if scale in variant.paper else "-")
        own = [run for run in record["runs"] if run["variant"] == variant.key]
        cells += [spread([run["cpu_s"] for run in own], 0), f"{own[0]['parameters']:,}" if own else "-"]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


PAGE_HEAD = """# Ablations at pocket scale

Written by `python -m benchmarks.training.ablations` (`make ablations`); figures in `benchmarks/results/ablations.json`.

{runs} runs: each variant with {seeds} seeds, {updates} updates in all, shared evenly by its stages, and nothing else
changed: {tiles} procedural tiles of {tile_px} px, the pocket bundle's frozen VAE, a network of width {embed_dim} with
depths {depths} and a bicubic skip, Adam at 2e-3 with the paper's milestones, EMA decay 0.99, batches of 8 (stage I) and
1 (II, III), bfloat16. PSNR in dB is the mean over the six held-out photographs; ± is the sample deviation over seeds
(SSIM is in the JSON). {cpu_min:.0f} CPU minutes on {where}. LPIPS is not measured: its weights were not available.

| without training | x2 PSNR | x4 PSNR |
|---|---|---|
| bicubic latent, where every run starts | {latent_2:.2f} | {latent_4:.2f} |
| decode, then bicubic | {pixel_2:.2f} | {pixel_4:.2f} |
| ceiling: VAE round trip of the photograph | {ceiling:.2f} | {ceiling:.2f} |

## Stages (the paper's table 3)
"""
PAGE_TAIL = """## Interpretation

The paper trains 125,000 updates per stage on 3.8 million pairs of photographs. These are {updates} updates of a very
small network on procedural pictures, under a VAE whose round trip is below the paper's figures. Absolute values do not
compare; the order is one of learning speed from a bicubic start, not of where training would end. Updates are equal;
seconds are not (stages II and III decode), nor are tiles: an update of stage I sees 8, of II and III one (the paper's:
2048 and 32). The row with one tile per update isolates that effect. Each stage restarts Adam at the full rate. A
specialist's head is trained in every update, each joint head in four of five. Differences within ± are not significant.
"""


def run(
    out: Path, bundle: Path, pool: Path, results: Path, page: Path, updates: int, seeds: int, pictures: int
) -> None:
    """Train the missing variants, store each result, write the page."""
    if updates % STEPS_SHARED_BY:
        raise typer.BadParameter(f"{updates} updates cannot be shared evenly by two and by three stages")
    torch.set_num_threads(1)
    make_pairs(out, bundle, pool, pictures)
    record = read_results(results, settings_of(updates, out / "bundle", out / "pairs"))
    vae = read_vae(read_bundle(out / "bundle"), CPU, torch.float32)
    photos = encode_photos(vae)
    if "untrained" not in record:
        record["untrained"] = measure_untrained(vae, photos)
    for seed in range(seeds):
        for variant in VARIANTS:
            if any(run["variant"] == variant.key and run["seed"] == seed for run in record["runs"]):
                continue
            result = run_one(variant, updates, seed, out, vae, photos)
            record["runs"].append(result)
            replace_file(results, (json.dumps(record, indent=1) + "\n").encode())
            line = [f"{name} {result[name]['psnr_db']:.2f} dB" for name in ("x2", "x4") if name in result]
            typer.echo(
                f"{variant.key} seed {seed}: {', '.join(line)}, {result['cpu_s']:.0f} CPU s, {result['wall_s']:.0f} s"
            )
    replace_file(page, to_markdown(record).encode())
