"""The paper's timing protocol: batch 1, one device, mixed precision where the device has it, median after warm-ups.

It never sees traffic and its figures never mix with traffic's: they have a gauge of their own
(`giantleap.service.telemetry.metrics`). Used by the worker when asked at start and by `giantleap bench protocol`.
"""

import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from giantleap.models.bundle.descriptor import Method
from giantleap.models.generator import GenerationItem
from giantleap.models.lua.spec import scaled_size
from giantleap.models.route import Route, run_once

WARMUPS = 20
_GUIDANCE_SCALE = 3.0
_SEED = 42


@dataclass(frozen=True, slots=True)
class Statistics:
    """Seconds of one stage over all runs."""

    median_s: float
    p95_s: float
    mean_s: float

    def to_labels(self) -> dict[str, float]:
        """The figures by the names that the metric's label `statistic` takes."""
        return {"median": self.median_s, "p95": self.p95_s, "mean": self.mean_s}


@dataclass(frozen=True, slots=True)
class ProtocolResult:
    """One measurement, with all that is needed to read it. `stages` includes `total`, the sum per run."""

    bundle: str
    method: Method
    scale: float
    image_px: str
    steps: int
    warmups: int
    runs: int
    engine: str
    device: str
    dtype: str
    torch_version: str
    machine: str
    stages: Mapping[str, Statistics]

    def to_json(self) -> str:
        """The result as one JSON object."""
        return json.dumps(asdict(self))


def measure_protocol(
    route: Route,
    scale: float,
    width_px: int,
    height_px: int,
    steps: int,
    method: Method = "lua",
    warmups: int = WARMUPS,
    runs: int = 20,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ProtocolResult:
    """Time generate, upscale, decode and their sum, device synchronised.

    Args:
        route: A loaded bundle.
        scale: One of the method's scales.
        width_px: Of the base image; the final one is `scale` times that.
        height_px: As `width_px`.
        steps: Denoising steps.
        method: How the image becomes large.
        warmups: Runs that are thrown away first.
        runs: Runs that count.
        on_progress: Called after each run with (runs done, runs in all), warm-ups included.

    **Ref** arXiv 2511.10629, section 4.2; it reports medians in one place and means in another, so both are given.

    Raises:
        ValueError: there is no such scale, or no run to count.
    """
    if scale not in route.scales_of(method):
        raise ValueError(f"scale {scale}: this bundle has {route.scales_of(method)} by method {method}")
    if runs < 1 or warmups < 0:
        raise ValueError(f"runs is {runs} and warmups {warmups}; at least one run counts")
    item = GenerationItem("", "", _SEED, width_px, height_px, steps, _GUIDANCE_SCALE)
    times_s: dict[str, list[float]] = {}
    for run in range(warmups + runs):
        stages_s = run_once(route, item, scale, method).stages_s
        if run >= warmups:
            for stage, duration_s in {**stages_s, "total": sum(stages_s.values())}.items():
                times_s.setdefault(stage, []).append(duration_s)
        on_progress(run + 1, warmups + runs)
    return ProtocolResult(
        bundle=route.name,
        method=method,
        scale=scale,
        image_px=f"{scaled_size(width_px, scale)}x{scaled_size(height_px, scale)}",
        steps=steps,
        warmups=warmups,
        runs=runs,
        engine=route.engine,
        device=_device_name(route.device),
        dtype=str(route.dtype).removeprefix("torch."),
        torch_version=torch.__version__,
        machine=f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        stages={stage: to_statistics(values_s) for stage, values_s in times_s.items()},
    )


def to_statistics(values_s: Sequence[float]) -> Statistics:
    """Median, 95th percentile (nearest rank) and mean."""
    ordered = sorted(values_s)
    rank = -(-95 * len(ordered) // 100)
    return Statistics(statistics.median(ordered), ordered[rank - 1], statistics.fmean(ordered))


def to_table(results: Sequence[ProtocolResult]) -> str:
    """The results as lines of text: one row per result and stage, seconds."""
    lines = [
        f"{'bundle':<12} {'method':<7} {'scale':>5} {'image px':>11} {'stage':<10} "
        f"{'median s':>10} {'p95 s':>10} {'mean s':>10}"
    ]
    for result in results:
        for stage, figures in result.stages.items():
            lines.append(
                f"{result.bundle:<12} {result.method:<7} {result.scale:>5} {result.image_px:>11} {stage:<10} "
                f"{figures.median_s:>10.4f} {figures.p95_s:>10.4f} {figures.mean_s:>10.4f}"
            )
    if results:
        last = results[-1]
        lines.append(
            f"batch 1, {last.steps} steps, {last.warmups} warm-ups, {last.runs} runs, engine {last.engine}, "
            f"{last.device}, {last.dtype}, torch {last.torch_version}, {last.machine}"
        )
    return "\n".join(lines)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
