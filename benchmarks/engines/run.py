"""Measure LUA on this CPU against the published SwinIR forward with the same weights.

`python -m benchmarks.engines` takes the preset `medium` with random weights: a 64x64 latent of 4 channels on one thread
and on two, a 128x128 one of 16, and the pixel-space SwinIR (3 channels) on 64x64 px. Each variant runs in a separate
process, and the processes take turns. Ratios compare runs of the same turn: processor time on one thread (least
disturbed by other processes), wall time on several (waiting threads use processor time). On the pocket bundle, decoded
images in bfloat16 and float32 are compared. The command line is in `benchmarks/engines/__main__.py`.
"""

import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.engines.published_swinir import PublishedForward
from benchmarks.engines.report import (
    CASES,
    MAX_ERROR,
    MIN_PSNR_DB,
    TARGETS,
    VARIANTS,
    Case,
    Row,
    choose_variants,
    line,
)
from benchmarks.machine import read_machine
from giantleap.export.graphs import LuaGraph, trace
from giantleap.export.manifest import INPUT, OUTPUTS
from giantleap.export.onnx_files import write_onnx
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.engines.artifacts import ArtifactEngine
from giantleap.models.engines.base import Artifact
from giantleap.models.engines.eager import TorchEngine
from giantleap.models.engines.swinir import RGB_CHANNELS
from giantleap.models.generation.items import GenerationItem
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.network import Lua, preset
from giantleap.models.pixels.images import psnr_db
from giantleap.models.route import Route
from giantleap.service.settings import POCKET_BUNDLE

CPU = torch.device("cpu")
SCALE = 2
Run = Callable[[Tensor], Tensor]


class Sample(NamedTuple):
    """One run: wall and processor seconds, and minor page faults."""

    wall_s: float
    cpu_s: float
    page_faults: int


def random_net(channels: int) -> Lua:
    """Return the preset `medium` at scale 2 with fixed random weights."""
    torch.manual_seed(0)
    return Lua(replace(preset("medium", channels), scales=(SCALE,))).eval()


def graph_path(folder: Path, channels: int) -> Path:
    """Return the path of an exported graph."""
    return folder / f"lua_{channels}.onnx"


def write_graph(folder: Path, channels: int) -> None:
    """Export the network at full depth."""
    net, path = random_net(channels), graph_path(folder, channels)
    write_onnx(trace(LuaGraph(net, SCALE, "fp32"), channels, net.spec.window), path, OUTPUTS["lua"])


def open_variant(variant: str, channels: int, folder: Path) -> Run:
    """Open one way to run the network.

    Raises:
        ValueError: The variant is unknown, or onnxruntime is missing.
    """
    net = random_net(channels)
    if variant.startswith("published"):
        published = PublishedForward(net)
        if variant.endswith("float32"):
            return lambda x: published(x, SCALE)

        def published_half(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                output: Tensor = published(x, SCALE)
            return output.float()

        return published_half
    if variant == "onnx float32":
        artifact = Artifact(graph_path(folder, channels), INPUT, OUTPUTS["lua"])
        return partial(ArtifactEngine.open("onnx", net.spec, {SCALE: artifact}, CPU).run, scale=SCALE)
    if variant == "module float32":
        return partial(TorchEngine(net, CPU, torch.float32).run, scale=SCALE)
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; expected one of {VARIANTS}")
    return partial(TorchEngine.open(net, CPU, getattr(torch, variant.split()[1])).run, scale=SCALE)


@torch.inference_mode()
def serve_variant(pipe: Connection, variant: str, case: Case, folder: Path) -> None:
    """Serve one variant over a pipe: the first reply is the output latent, every further one a `Sample`."""
    torch.set_num_threads(case.threads)
    run = open_variant(variant, case.channels, folder)
    latent = torch.randn(1, case.channels, case.side, case.side, generator=torch.Generator().manual_seed(1))
    pipe.recv()
    pipe.send(run(latent).numpy())
    while pipe.recv():
        faults, wall_s, cpu_s = _page_faults(), time.perf_counter(), time.process_time()
        run(latent)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        pipe.send(Sample(wall_s, cpu_s, _page_faults() - faults))


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def measure_case(name: str, variants: Sequence[str], folder: Path, warmups: int, runs: int) -> list[Row]:
    """Measure one case, the variants in turns; the first is the baseline.

    Raises:
        EOFError: A variant's process died.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for variant in variants:
        pipes[variant], far = context.Pipe()
        arguments = (far, variant, CASES[name], folder)
        processes.append(context.Process(target=serve_variant, args=arguments, daemon=True))
        processes[-1].start()
        far.close()
    outputs = {variant: _request(pipe) for variant, pipe in pipes.items()}
    samples: dict[str, list[Sample]] = {variant: [] for variant in variants}
    for number in range(warmups + runs):
        for variant, pipe in pipes.items():
            sample = _request(pipe)
            if number >= warmups:
                samples[variant].append(sample)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    first = variants[0]
    return [
        _to_row(name, variant, samples[variant], samples[first], outputs[variant], outputs[first])
        for variant in variants
    ]


def _to_row(
    name: str, variant: str, samples: Sequence[Sample], baseline: Sequence[Sample], output: Any, expected: Any
) -> Row:
    """Summarize a variant; ratios are medians over runs of the same turn."""
    pairs = list(zip(samples, baseline, strict=True))
    target = TARGETS.get((name, variant))
    cpu_ratio = statistics.median(first.cpu_s / own.cpu_s for own, first in pairs)
    wall_ratio = statistics.median(first.wall_s / own.wall_s for own, first in pairs)
    ratio = cpu_ratio if CASES[name].threads == 1 else wall_ratio
    max_error = float(abs(output - expected).max())
    close = variant.endswith("bfloat16") or max_error <= MAX_ERROR
    return Row(
        case=name,
        variant=variant,
        runs=len(samples),
        median_ms=1e3 * statistics.median(sample.wall_s for sample in samples),
        median_cpu_ms=1e3 * statistics.median(sample.cpu_s for sample in samples),
        page_faults=int(statistics.median(sample.page_faults for sample in samples)),
        ratio=ratio,
        cpu_ratio=cpu_ratio,
        wall_ratio=wall_ratio,
        max_error=max_error,
        std=float(expected.std()),
        target=target,
        met=None if target is None else ratio >= target and close,
    )


def _request(pipe: Connection) -> Any:
    pipe.send(True)
    return pipe.recv()


@torch.inference_mode()
def measure_pocket() -> list[dict[str, Any]]:
    """Return the PSNR of the pocket bundle's decoded images, LUA in bfloat16 against float32, on generated latents."""
    bundle = read_bundle(POCKET_BUNDLE)
    assert bundle.lua is not None
    route, net = Route.open(bundle, CPU, torch.float32), read_lua(bundle.lua)
    prompts = ("a red sphere on a green floor", "a blue cube and a yellow cone")
    steps, guidance_scale = bundle.defaults.steps, bundle.defaults.guidance_scale
    items = [GenerationItem(prompt, "", seed, 128, 128, steps, guidance_scale) for seed, prompt in enumerate(prompts)]
    latents = torch.stack([each for each in route.generate(items) if each is not None])
    rows = []
    for scale in net.spec.scales:
        expected = route.vae.decode(net(latents, scale))
        for name, dtype in (("torch float32", torch.float32), ("torch bfloat16", torch.bfloat16)):
            output = TorchEngine.open(net, CPU, dtype).run(latents, scale)
            worst = min(
                psnr_db(route.vae.decode(one[None]), image[None]) for one, image in zip(output, expected, strict=True)
            )
            rows.append({"scale": scale, "variant": name, "psnr_db": worst, "met": worst >= MIN_PSNR_DB})
    return rows


def measure(
    cases: Sequence[str],
    precisions: Sequence[str],
    runs: int,
    warmups: int,
    onnx: bool,
    pocket: bool,
    report_line: Callable[[str], None],
) -> dict[str, Any]:
    """Measure these cases and the pocket bundle.

    Args:
        cases: Names from `CASES`.
        precisions: Some of `PRECISIONS`.
        runs: Counted runs per variant.
        warmups: Runs per variant that are thrown away first.
        onnx: Whether to export and run ONNX graphs at full depth, which takes minutes.
        pocket: Whether to compare images of the pocket bundle.
        report_line: Receives each printed line as soon as it is known.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in cases:
            channels = CASES[name].channels
            variants = choose_variants(precisions, has_graph=onnx and channels != RGB_CHANNELS)
            if VARIANTS[-1] in variants and not graph_path(folder, channels).exists():
                _run_in_process(write_graph, folder, channels)
            measured = measure_case(name, variants, folder, warmups, runs)
            rows += measured
            for row in measured:
                report_line(line(row))
    torch.set_num_threads(1)
    images = measure_pocket() if pocket else []
    for image in images:
        report_line(f"pocket x{image['scale']} {image['variant']:<16} decoded image {image['psnr_db']:.1f} dB")
    machine = read_machine() | {
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "onnx")},
        "bfloat16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "load_average": os.getloadavg(),
        "warmups": warmups,
        "preset": "medium",
    }
    return {"machine": machine, "rows": [asdict(row) for row in rows], "pocket": images}


def _run_in_process(work: Callable[..., None], *arguments: object) -> None:
    """Run a function in a separate process.

    Raises:
        RuntimeError: It failed; its output is above.
    """
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{work.__name__} ended with status {process.exitcode}")
