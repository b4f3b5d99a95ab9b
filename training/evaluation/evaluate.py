"""Measure LUA weights against bicubic, on pictures or on held-out pairs: `giantleap train evaluate`.

`evaluate` iterates once over the cases of `training/evaluation/cases.py`: `Findings.add` upscales each by every method,
compares it with its target and keeps features, channel statistics and a crop for the sheet. See
`training/evaluation/metrics.py`, `training/evaluation/distributions.py` and `training/evaluation/report.py`.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.bundle.digests import file_hash
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.network import Lua
from giantleap.models.vae.autoencoder import Vae
from giantleap.training.data.frozen_vae import read_vae, vae_hash
from giantleap.training.evaluation.cases import (
    Case,
    EvaluationError,
    list_pictures,
    open_pairs,
    read_pairs,
    read_pictures,
)
from giantleap.training.evaluation.distributions import Pool, compare, pool
from giantleap.training.evaluation.metrics import (
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    Networks,
    psnr_db,
    ssim,
    to_levels,
)
from giantleap.training.evaluation.picture_sets import PictureSet, SetSettings, Value, not_available
from giantleap.training.evaluation.report import read_machine, to_markdown, write_distributions, write_sheet

BICUBIC_PIXELS, BICUBIC_LATENT, ROUND_TRIP = "bicubic pixels", "bicubic latent", "VAE round trip"
SHEET_ROWS = 8


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of an evaluation.

    Attributes:
        bundle: Directory of the bundle whose VAE encodes and decodes.
        out: Directory for report, sheet and plots.
        images: Folder of pictures; a `.txt` of the same name has the caption. Alternative to `pairs`.
        pairs: Output of `giantleap train prepare`; the target is then the decoded large latent.
        lua: Weights to measure; empty: the bundle's own.
        limit: Maximum number of cases.
        crop_px: Side of a center square that pictures are cut to first.
        patch_px: Side of the random crops of patch FID and KID.
        patches: Crops per picture.
        kid_subsets: Number of KID subsets.
        kid_subset_size: Samples per subset.
        seed: Seed of crops and subsets.
    """

    bundle: Path
    out: Path
    images: Path | None = None
    pairs: Path | None = None
    lua: tuple[Path, ...] = ()
    limit: int | None = None
    crop_px: int | None = None
    patch_px: int = 1024
    patches: int = 1
    kid_subsets: int = KID_SUBSETS
    kid_subset_size: int = KID_SUBSET_SIZE
    seed: int = 0

    @property
    def sets(self) -> SetSettings:
        """How FID and KID are measured."""
        return SetSettings(self.patch_px, self.patches, self.kid_subsets, self.kid_subset_size, self.seed)


@dataclass
class Tally:
    """Results of one method at one scale, per case; the pictures for FID and KID."""

    pictures: PictureSet
    psnr_db: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)
    clip_score: list[float] = field(default_factory=list)


@dataclass
class Statistics:
    """One pool per case for each kind of latents or pictures; merged at the end."""

    pools: dict[str, list[Pool]] = field(default_factory=dict)

    def add(self, kind: str, values: Tensor) -> None:
        """Add one pool."""
        self.pools.setdefault(kind, []).append(pool([values]))

    def merged(self) -> dict[str, Pool]:
        """Return the merged pool of each kind."""
        return {
            kind: Pool(np.concatenate([p.means for p in pools]), np.concatenate([p.deviations for p in pools]))
            for kind, pools in self.pools.items()
        }


@torch.inference_mode()
def evaluate(config: EvaluateConfig, device: torch.device, networks: Networks | None = None) -> dict[str, Any]:
    """Measure all weights; write `evaluation.json`, `evaluation.md`, `sheet.png` and the plots into `config.out`.

    Args:
        config: The settings.
        device: Where LUA and VAE run, in float32.
        networks: Networks of the perceptual metrics.

    Returns:
        The content of `evaluation.json`.

    Raises:
        EvaluationError: There is nothing to measure, weights do not match the bundle, or an output is not finite.
        BundleError: The bundle cannot be read.
        CheckpointError: Weights cannot be read.
        PairsError: The pairs cannot be read.
        VaeError: The VAE cannot be read.
        OSError: A file cannot be read.
    """
    networks = networks or Networks()
    bundle = read_bundle(config.bundle)
    nets = _read_nets(config, bundle, device)
    scales = sorted({scale for net in nets.values() for scale in net.spec.scales})
    vae = read_vae(bundle, device, torch.float32)
    judge = Judge(config, networks)
    findings = Findings(judge, judge.open_set())
    count, cases = _cases(config, bundle, vae, scales)
    for case in tqdm(cases, total=count, desc="evaluate", unit="picture"):
        findings.add(case, vae, nets, scales)
    latents, pixels = findings.latents.merged(), findings.pixels.merged()
    report = {
        **_origin(config, bundle, nets, networks, findings.count, device),
        "scores": _scores(findings.tallies, findings.targets, judge.missing),
        "latent_statistics": _gaps(latents),
        "pixel_statistics": _gaps(pixels),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "evaluation.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (config.out / "evaluation.md").write_text(to_markdown(report), encoding="utf-8")
    write_sheet(findings.rows, config.out / "sheet.png")
    for scale in scales:
        write_distributions(latents, pixels, scale, config.out / f"distributions_x{scale}.png")
    return report


def _read_nets(config: EvaluateConfig, bundle: Bundle, device: torch.device) -> dict[str, Lua]:
    """Read the networks by label: the file name, or the path where two are equal."""
    paths = config.lua or ((bundle.lua,) if bundle.lua is not None else ())
    if not paths:
        raise EvaluationError(f"bundle {bundle.name} has no LUA weights: name some with --lua")
    labels = [path.stem for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    nets = {label: read_lua(path, device) for label, path in zip(labels, paths, strict=True)}
    if len(nets) < len(paths) or {BICUBIC_LATENT, BICUBIC_PIXELS} & nets.keys():
        raise EvaluationError("the same weights are named twice, or have the name of a baseline")
    for label, net in nets.items():
        if net.spec.channels != bundle.latent_space.channels:
            raise EvaluationError(
                f"{label}: {net.spec.channels} channels; latent space {bundle.latent_space.name} "
                f"has {bundle.latent_space.channels}"
            )
    return nets


def _cases(config: EvaluateConfig, bundle: Bundle, vae: Vae, scales: Sequence[int]) -> tuple[int, Iterator[Case]]:
    """Return the cases and how many there are."""
    if (config.images is None) == (config.pairs is None):
        raise EvaluationError("give either pictures (--images) or pairs (--pairs)")
    if config.pairs is not None:
        store = open_pairs(config.pairs, bundle)
        tiles = min(len(store), config.limit or len(store))
        return tiles, read_pairs(store, tiles, vae)
    assert config.images is not None
    paths = list_pictures(config.images)[: config.limit]
    return len(paths), read_pictures(paths, bundle, vae, scales, config.crop_px)


def _enlarge(vae: Vae, nets: Mapping[str, Lua], case: Case, scale: int) -> dict[str, tuple[Tensor | None, Tensor]]:
    """Return, by method, the large latent if there is one, and its picture in [-1, 1], not clamped."""
    small = case.latents[scale]
    size = (case.target.shape[-2], case.target.shape[-1])
    bicubic = F.interpolate(small, scale_factor=float(scale), mode="bicubic")
    by_method: dict[str, tuple[Tensor | None, Tensor]] = {
        BICUBIC_PIXELS: (None, F.interpolate(vae.decode(small).clamp(-1.0, 1.0), size=size, mode="bicubic")),
        BICUBIC_LATENT: (bicubic, vae.decode(bicubic)),
    }
    for label, net in nets.items():
        if scale in net.spec.scales:
            upscaled = net(small, scale)
            if not bool(upscaled.isfinite().all()):
                raise EvaluationError(f"{label} x{scale}, {case.name}: the latent has values that are not finite")
            by_method[label] = (upscaled, vae.decode(upscaled))
    return by_method


class Judge:
    """Compare pictures with their targets, and record why a metric is unavailable.

    Args:
        config: Settings of the crops.
        networks: Networks of the perceptual metrics.
    """

    def __init__(self, config: EvaluateConfig, networks: Networks) -> None:
        self.config = config
        self.networks = networks
        self.missing: dict[str, str] = {}

    def add(self, tally: Tally, index: int, case: Case, image: Tensor, target: Tensor) -> None:
        """Add one uint8 picture and its target, both [1, 3, height_px, width_px], of case `index`."""
        image, target = image.cpu(), target.cpu()
        tally.psnr_db.append(min(psnr_db(image, target), 100.0))  # keeps the mean finite
        tally.ssim.append(ssim(image, target))
        if isinstance(self.networks.distance, str):
            self.missing["lpips"] = self.networks.distance
        else:
            tally.lpips.append(float(self.networks.distance(image, target)[0]))
        if isinstance(self.networks.text, str):
            self.missing["clip_score"] = self.networks.text
        elif case.caption is None:
            self.missing["clip_score"] = f"{case.name} has no caption (.txt beside the picture)"
        else:
            tally.clip_score.append(float(self.networks.text(image, [case.caption])[0]))
        tally.pictures.add(index, image)

    def open_set(self) -> PictureSet:
        """An empty set of pictures."""
        return PictureSet(self.networks.features, self.config.sets)


@dataclass
class Findings:
    """Results of all cases; only one case is in memory at a time.

    Attributes:
        judge: Compares pictures with targets.
        targets: The targets, for FID and KID.
        tallies: Results by scale and method.
        latents: Statistics of the latents, by kind.
        pixels: Statistics of the pictures in [0, 1], by kind.
        rows: Names and pictures of the first cases, for the sheet.
        count: Number of cases so far.
    """

    judge: Judge
    targets: PictureSet
    tallies: dict[tuple[int, str], Tally] = field(default_factory=dict)
    latents: Statistics = field(default_factory=Statistics)
    pixels: Statistics = field(default_factory=Statistics)
    rows: list[tuple[str, dict[str, Tensor]]] = field(default_factory=list)
    count: int = 0

    def add(self, case: Case, vae: Vae, nets: Mapping[str, Lua], scales: Sequence[int]) -> None:
        """Upscale a case by every method and compare with its target."""
        target = to_levels(case.target)
        self.latents.add("target", case.latents[1])
        self.pixels.add("target", target.float() / 255.0)
        self.targets.add(self.count, target)
        shown = {"target": target}
        if case.is_photo:
            round_trip = to_levels(vae.decode(case.latents[1]))
            self.judge.add(self._tally(1, ROUND_TRIP), self.count, case, round_trip, target)
        for scale in scales:
            self.latents.add(f"x{scale} small", case.latents[scale])
            for method, (latent, picture) in _enlarge(vae, nets, case, scale).items():
                levels = to_levels(picture)
                if latent is not None:
                    self.latents.add(f"x{scale} {method}", latent)
                self.pixels.add(f"x{scale} {method}", levels.float() / 255.0)
                self.judge.add(self._tally(scale, method), self.count, case, levels, target)
                if method != BICUBIC_LATENT:
                    shown[f"x{scale} {method}"] = levels
        if len(self.rows) < SHEET_ROWS:
            self.rows.append((case.name, shown))
        self.count += 1

    def _tally(self, scale: int, method: str) -> Tally:
        return self.tallies.setdefault((scale, method), Tally(self.judge.open_set()))


def _scores(
    tallies: Mapping[tuple[int, str], Tally], targets: PictureSet, missing: Mapping[str, str]
) -> dict[str, dict[str, dict[str, Value]]]:
    """Return every metric by scale ("x1" for the round trip) and method."""
    scores: dict[str, dict[str, dict[str, Value]]] = {}
    for (scale, method), tally in sorted(tallies.items(), key=lambda item: item[0][0]):
        row: dict[str, Value] = {"psnr_db": _mean(tally.psnr_db), "ssim": _mean(tally.ssim)}
        for name, values in (("lpips", tally.lpips), ("clip_score", tally.clip_score)):
            row[name] = not_available(missing[name]) if name in missing else _mean(values)
        row |= tally.pictures.compare(targets)
        scores.setdefault(f"x{scale}", {})[method] = row
    return scores


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _gaps(pools: Mapping[str, Pool]) -> dict[str, dict[str, float]]:
    """Compare every kind with the targets."""
    return {kind: asdict(compare(pool, pools["target"])) for kind, pool in pools.items() if kind != "target"}


def _origin(
    config: EvaluateConfig,
    bundle: Bundle,
    nets: Mapping[str, Lua],
    networks: Networks,
    count: int,
    device: torch.device,
) -> dict[str, Any]:
    """Describe settings, weights and machine."""
    paths = config.lua or (bundle.lua,)
    return {
        "machine": read_machine(device),
        "bundle": bundle.name,
        "vae_sha256": vae_hash(bundle),
        "weights": {
            label: {"file": path.name, "sha256": file_hash(path)}
            for label, path in zip(nets, paths, strict=True)
            if path is not None
        },
        "source": "pictures" if config.images is not None else "pairs",
        "cases": count,
        "networks": networks.names(),
        "settings": {
            "crop_px": config.crop_px,
            "patch_px": config.patch_px,
            "patches_per_picture": config.patches,
            "kid_subsets": config.kid_subsets,
            "kid_subset_size": config.kid_subset_size,
            "seed": config.seed,
            "guard": "off: networks are measured without it",
        },
    }
