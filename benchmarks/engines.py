"""How fast LUA runs on this CPU, beside a plain SwinIR forward in the published manner with the same weights.

`python -m benchmarks.engines` takes the preset `medium` with random weights: a 64x64 latent of 4 channels, a 128x128
one of 16, and the pixel-space SwinIR (3 channels) on 64x64 px. Variants run in turns in one process, on one thread
unless told otherwise; ratios are of the medians of processor time, which neighbours on the machine disturb least, and
wall times stand beside them. On the pocket bundle, its decoded images in bfloat16 and float32 are compared. Figures go
to `benchmarks/results/engines.json`; status 1 when a target is missed.
"""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.decode import machine
from benchmarks.published_swinir import PublishedForward
from export.graphs import LuaGraph, trace
from export.manifest import INPUT, OUTPUTS
from export.onnx_files import write_onnx
from models.bundle import read_bundle
from models.checkpoints import read_lua
from models.engines import Artefact, ArtefactEngine, TorchEngine
from models.generator import DrawItem
from models.lua import Lua, preset
from models.route import Route
from service.engine_bench import interleave, psnr_db
from service.settings import POCKET_BUNDLE

CPU = torch.device("cpu")
SCALE = 2
RESULTS = Path("benchmarks/results/engines.json")
MAX_ERROR = 1e-4  # of float32 variants, absolute; the published forward's deviation is printed beside it
LEAST_PSNR_DB = 45.0
TARGETS = {  # least speed over the published forward in float32, by case and variant
    ("latent 64", "torch float32"): 2.3,
    ("latent 128", "torch float32"): 2.0,
    ("latent 64", "torch bfloat16"): 3.5,
    ("latent 128", "torch bfloat16"): 3.5,
    ("latent 64", "onnx float32"): 1.9,
    ("latent 128", "onnx float32"): 1.9,
}
CASES = {"latent 64": (4, 64), "latent 128": (16, 128), "pixels 64": (3, 64)}  # channels, side
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One variant at one size. `ratio` is of processor time, `wall_ratio` by the clock; errors are to the published
    forward in float32, whose answer has the deviation `std`."""

    case: str
    variant: str
    runs: int
    median_ms: float
    median_cpu_ms: float
    ratio: float
    wall_ratio: float
    max_error: float
    std: float
    target: float | None
    met: bool | None


def random_net(channels: int) -> Lua:
    """The preset `medium` with the scale 2, random weights."""
    torch.manual_seed(0)
    return Lua(replace(preset("medium", channels), scales=(SCALE,))).eval()


def open_variants(net: Lua, *, onnx: bool, folder: Path) -> dict[str, Run]:
    """All ways to run one network; the first is the yardstick."""
    published, half = PublishedForward(net), PublishedForward(net)

    def published_half(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            answer: Tensor = half(x, SCALE)
        return answer.float()

    plain = TorchEngine(net, CPU, torch.float32)
    variants: dict[str, Run] = {
        "published float32": lambda x: published(x, SCALE),
        "published bfloat16": published_half,
        "module float32": lambda x: plain.run(x, SCALE),
    }
    for dtype in (torch.float32, torch.bfloat16):
        engine = TorchEngine.open(net, CPU, dtype)
        variants[f"torch {str(dtype).removeprefix('torch.')}"] = partial(engine.run, scale=SCALE)
    if onnx:
        path = folder / f"lua_{net.spec.channels}.onnx"
        write_onnx(trace(LuaGraph(net, SCALE, "fp32"), net.spec.channels, net.spec.window), path, OUTPUTS["lua"])
        artefacts = {SCALE: Artefact(path, INPUT, OUTPUTS["lua"])}
        exported = ArtefactEngine.open("onnx", net.spec, artefacts, CPU)
        variants["onnx float32"] = lambda x: exported.run(x, SCALE)
    return variants


@torch.inference_mode()
def measure_case(case: str, variants: dict[str, Run], latent: Tensor, warmups: int, runs: int) -> list[Row]:
    """Rows of one size."""
    expected = variants["published float32"](latent)
    errors = {name: float((run(latent) - expected).abs().max()) for name, run in variants.items()}
    calls = {name: partial(run, latent) for name, run in variants.items()}
    timings = interleave(calls, warmups, runs, CPU)
    first = timings["published float32"]
    rows = []
    for name, timing in timings.items():
        target = TARGETS.get((case, name))
        ratio = first.median_cpu_s / timing.median_cpu_s
        exact = name.endswith("bfloat16") or errors[name] <= MAX_ERROR
        rows.append(
            Row(
                case,
                name,
                runs,
                1e3 * timing.median_s,
                1e3 * timing.median_cpu_s,
                ratio,
                first.median_s / timing.median_s,
                errors[name],
                float(expected.std()),
                target,
                None if target is None else ratio >= target and exact,
            )
        )
    return rows


@torch.inference_mode()
def measure_pocket() -> list[dict[str, Any]]:
    """PSNR of the pocket bundle's decoded images, LUA in bfloat16 against LUA in float32, on latents that it drew."""
    bundle = read_bundle(POCKET_BUNDLE)
    assert bundle.lua is not None
    route, net = Route.open(bundle, CPU, torch.float32), read_lua(bundle.lua)
    prompts = ("a red sphere on a green floor", "a blue cube and a yellow cone")
    items = [DrawItem(prompt, "", seed, 128, 128, 12, 3.0) for seed, prompt in enumerate(prompts)]
    latents = torch.stack([each for each in route.generate(items, lambda step, steps: None, set) if each is not None])
    rows = []
    for scale in net.spec.scales:
        expected = route.vae.decode(net(latents, scale))
        for name, dtype in (("torch float32", torch.float32), ("torch bfloat16", torch.bfloat16)):
            answer = TorchEngine.open(net, CPU, dtype).run(latents, scale)
            worst = min(
                psnr_db(route.vae.decode(one[None]), image[None]) for one, image in zip(answer, expected, strict=True)
            )
            rows.append({"scale": scale, "variant": name, "psnr_db": worst, "met": worst >= LEAST_PSNR_DB})
    return rows


def line(row: Row) -> str:
    target = "" if row.target is None else f"  asked {row.target:.1f}: {'met' if row.met else 'MISSED'}"
    return (
        f"{row.case:<11}{row.variant:<20}{row.median_ms:>9.1f} ms{row.median_cpu_ms:>9.1f} ms cpu{row.ratio:>7.2f}x"
        f"{row.wall_ratio:>7.2f}x wall  error {row.max_error:.1e}{target}"
    )


def main(
    runs: Annotated[int, typer.Option(help="Runs that count, of every variant.", min=1)] = 9,
    warmups: Annotated[int, typer.Option(help="Runs thrown away first.", min=0)] = 2,
    case: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(CASES)}; may be repeated.")] = None,
    onnx: Annotated[bool, typer.Option(help="Export and run ONNX graphs at full depth, which takes minutes.")] = True,
    threads: Annotated[int, typer.Option(help="Threads of torch and onnxruntime.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Measure, print the table, write the JSON."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in case or list(CASES):
            channels, side = CASES[name]
            variants = open_variants(random_net(channels), onnx=onnx and channels != 3, folder=folder)
            latent = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(1))
            rows += measure_case(name, variants, latent, warmups, runs)
            for row in rows[-len(variants) :]:
                typer.echo(line(row))
    pocket = measure_pocket()
    for each in pocket:
        typer.echo(f"pocket x{each['scale']} {each['variant']:<16} decoded image {each['psnr_db']:.1f} dB")
    versions = {name: version(name) for name in ("torch", "onnxruntime", "onnx")}
    about = machine() | {
        "versions": versions,
        "model": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "threads": threads,
        "load_average": os.getloadavg(),
        "warmups": warmups,
        "preset": "medium",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": about, "rows": [asdict(row) for row in rows], "pocket": pocket}
    out.write_text(json.dumps(record, indent=2) + "\n")
    if any(row.met is False for row in rows) or not all(each["met"] for each in pocket):
        raise typer.Exit(1)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [each for each in info.read_text().splitlines() if each.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else "unknown"


if __name__ == "__main__":
    typer.run(main)
