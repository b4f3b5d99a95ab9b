"""Compare LUA with and without the latent clamp, on latents like those of the training and on others.

`python -m benchmarks.quality.clamp` writes `benchmarks/results/clamp.json`. The statistics come from procedural
pictures (`benchmarks/pictures.py`), the latents from the six photographs (`benchmarks/quality/photos.py`) and from
images that the bundle generates. An image is *broken* when a value is not finite or more than 1 % of its pixels have a
channel beyond 1.5, where [-1, 1] is visible. The bicubic latent of the same input is decoded as well: where that is
broken too, the input itself is out of range and no clamp on LUA helps.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import PHOTO_PACKAGES, read_machine
from benchmarks.pictures import draw_picture
from benchmarks.quality.photos import read_photos
from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.generation.items import GenerationItem
from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.clamp import LatentClamp
from giantleap.models.lua.network import Lua
from giantleap.models.lua.statistics import LatentStatistics
from giantleap.models.pixels.images import psnr_db
from giantleap.models.route import Route
from giantleap.models.vae.autoencoder import Vae
from giantleap.training.evaluation.cases import shrink
from giantleap.training.guard_statistics import measure_statistics
from giantleap.training.pocket.drawing.leaves import draw_leaves
from giantleap.training.pocket.pictures import to_images

SCALES = (2, 4)
FAR = 1.5
BROKEN_SHARE = 0.01
MAX_DB = 100.0  # for equal images
SIDE_PX = 256
PROMPTS = ("a red sphere on a green floor under a blue sky", "a large yellow cube on a purple floor")
FOREIGN = ("sdxl", "flux1")  # families whose factors a client may apply by mistake

Change = Callable[[Tensor, torch.Generator], Tensor]


def changes(statistics: LatentStatistics) -> dict[str, Change]:
    """Return the changes that take a latent out of distribution, by name."""
    std = torch.tensor(statistics.std).view(-1, 1, 1)

    def line(factor: float, offset: float = 0.0) -> Change:
        return lambda z, generator: factor * z + offset

    def noise(level: float) -> Change:
        return lambda z, generator: z + level * std * torch.randn(z.shape, generator=generator)

    def permute(z: Tensor, generator: torch.Generator) -> Tensor:
        return z[:, torch.randperm(z.shape[1], generator=generator)]

    by_name = {"as trained": line(1.0)}
    by_name |= {f"scaled {factor:g}": line(factor) for factor in (1.5, 2.0, 4.0, 8.0)}
    by_name |= {f"noisy {level}": noise(level) for level in (0.5, 0.7, 1.0, 2.0)}
    for space in (LATENT_SPACES[name] for name in FOREIGN):
        by_name[f"family {space.name}: scaled as it"] = line(space.scale, -space.shift * space.scale)
        by_name[f"family {space.name}: unscaled twice"] = line(1.0 / space.scale, space.shift)
    return by_name | {"channels permuted": permute}


@dataclass(frozen=True)
class Outcome:
    """One picture of one route: whether it is broken, and its share of far pixels."""

    is_broken: bool
    far_share: float


def judge(picture: Tensor) -> Outcome:
    """Judge one picture [1, 3, height_px, width_px], not clamped."""
    share = float((picture.abs().amax(dim=1) > FAR).float().mean())
    finite = bool(picture.isfinite().all())
    return Outcome(not finite or share > BROKEN_SHARE, share)


@torch.inference_mode()
def measure_procedural(vae: Vae, pictures: int, side_px: int = SIDE_PX) -> LatentStatistics:
    """Measure statistics over pictures like the pocket LUA's training data, with another seed."""
    rng = np.random.default_rng(20)
    pool = np.stack([draw_leaves(rng, 2 * side_px) for _ in range(max(1, pictures // 8))])
    views = (to_images(draw_picture(rng, pool, side_px)[None]) for _ in range(pictures))
    pairs = ({level: vae.encode(shrink(view, level)) for level in (1, *SCALES)} for view in views)
    return measure_statistics(tqdm(pairs, desc="statistics", total=pictures), SCALES)


@torch.inference_mode()
def read_inputs(route: Route, bundle: Bundle, scale: int) -> dict[str, Tensor]:
    """Return typical small latents: reduced centers of photographs, and generated latents."""
    inputs = {}
    for name, photo in read_photos().items():
        top = (photo.shape[-1] - SIDE_PX) // 2
        center = photo[..., top : top + SIDE_PX, top : top + SIDE_PX]
        inputs[name] = route.vae.encode(shrink(center, scale))
    steps, guidance_scale = bundle.defaults.steps, bundle.defaults.guidance_scale
    items = [GenerationItem(words, "", seed, 128, 128, steps, guidance_scale) for seed, words in enumerate(PROMPTS)]
    generated = route.generate(items)
    return inputs | {
        item.prompt: latent[None] for item, latent in zip(items, generated, strict=True) if latent is not None
    }


@torch.inference_mode()
def measure_case(
    vae: Vae, lua: Lua, clamps: Mapping[float, LatentClamp], small: Tensor, scale: int
) -> dict[str, dict[str, float]]:
    """Measure one latent by every route: "bicubic", "off", and each number of sigmas."""
    upscaled = lua(small, scale)
    bicubic = F.interpolate(small, scale_factor=float(scale), mode="bicubic")
    latents = {"bicubic": bicubic, "off": upscaled}
    latents |= {f"{sigmas:g}": clamp.limit(small, upscaled, scale) for sigmas, clamp in clamps.items()}
    shown = {name: vae.decode(latent) for name, latent in latents.items()}
    return {
        name: {
            **asdict(judge(picture)),
            "psnr_to_bicubic_db": psnr_db(picture, shown["bicubic"], MAX_DB),
            "psnr_to_off_db": psnr_db(picture, shown["off"], MAX_DB),
            "changed_share": float((latents[name] != upscaled).float().mean()),
        }
        for name, picture in shown.items()
    }


def reach(statistics: LatentStatistics, small: Tensor, upscaled: Tensor, scale: int) -> dict[str, float]:
    """Return the largest distance from the mean in s, and from the bicubic latent in r."""
    mean, std, rms = (
        torch.tensor(values).view(-1, 1, 1)
        for values in (statistics.mean, statistics.std, statistics.residual_rms[scale])
    )
    base = F.interpolate(small, scale_factor=float(scale), mode="bicubic")
    return {
        "sigmas": float(((torch.stack([base, upscaled]) - mean) / std).abs().max()),
        "residuals": float(((upscaled - base) / rms).abs().max()),
    }


def summarize(cases: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Summarize by route: rate of broken images, means, and the minimum PSNR against no clamp."""
    return {
        name: {
            "broken_rate": float(np.mean([case[name]["is_broken"] for case in cases])),
            "far_share": float(np.mean([case[name]["far_share"] for case in cases])),
            "psnr_to_bicubic_db": float(np.mean([case[name]["psnr_to_bicubic_db"] for case in cases])),
            "min_psnr_to_off_db": min(case[name]["psnr_to_off_db"] for case in cases),
            "changed_share": float(np.mean([case[name]["changed_share"] for case in cases])),
        }
        for name in cases[0]
    }


def to_table(groups: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Format rates of broken images and far pixels by input and route, and the cost of the clamp as trained."""
    routes = list(next(iter(groups.values())))
    lines: list[str] = []
    for title, key in (("broken images, %", "broken_rate"), ("pixels far out, %", "far_share")):
        lines.append(f"{title:<34}" + "".join(f"{route:>9}" for route in routes))
        for name, row in groups.items():
            lines.append(f"{name:<34}" + "".join(f"{100 * row[route][key]:>9.1f}" for route in routes))
    as_trained = groups["as trained"]
    lines.append(f"{'as trained, min dB to off':<34}" + "".join(
        f"{as_trained[route]['min_psnr_to_off_db']:>9.1f}" for route in routes
    ))  # fmt: skip
    return "\n".join(lines)


def run(directory: Path, lua: Path | None, out: Path, pictures: int, sigmas: list[float] | None, threads: int) -> None:
    """Measure, print, write the JSON."""
    torch.set_num_threads(threads)
    bundle = read_bundle(directory)
    device = torch.device("cpu")
    route = Route.open(bundle, device, torch.float32)
    path = lua or bundle.lua
    if path is None:
        raise typer.BadParameter(f"bundle {bundle.name} has no LUA weights")
    net = read_lua(path)
    statistics = measure_procedural(route.vae, pictures)
    clamps = {each: LatentClamp(statistics, each, device) for each in sigmas or [3.0, 6.0, 12.0, 24.0]}
    groups: dict[str, list[dict[str, dict[str, float]]]] = {}
    as_trained: dict[str, dict[str, float]] = {}
    for scale in net.spec.scales:
        inputs = read_inputs(route, bundle, scale)
        with torch.inference_mode():
            as_trained |= {f"x{scale} {name}": reach(statistics, z, net(z, scale), scale) for name, z in inputs.items()}
        for name, change in tqdm(changes(statistics).items(), desc=f"x{scale}"):
            generator = torch.Generator().manual_seed(scale)
            for small in inputs.values():
                case = measure_case(route.vae, net, clamps, change(small, generator), scale)
                groups.setdefault(name, []).append(case)
    table = {name: summarize(cases) for name, cases in groups.items()}
    typer.echo(to_table(table))
    maxima = {unit: max(row[unit] for row in as_trained.values()) for unit in ("sigmas", "residuals")}
    typer.echo(f"as trained, at most {maxima['sigmas']:.1f} s from the mean, {maxima['residuals']:.1f} r from bicubic")
    record: dict[str, Any] = {
        "machine": read_machine(PHOTO_PACKAGES),
        "bundle": bundle.name,
        "rule": {"far": FAR, "broken_share": BROKEN_SHARE},
        "images_per_input": len(groups["as trained"]),
        "statistics": json.loads(statistics.to_json()),
        "reach_as_trained": as_trained,
        "inputs": table,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
