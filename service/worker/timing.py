"""The paper's timing protocol: batch 1, one device, mixed precision where the device has it, median after warm-ups.

Its figures have their own gauge (`giantleap.service.telemetry.metrics`), apart from those of traffic. A worker runs it
at start if the settings ask for it; `giantleap bench protocol` runs it from the command line.

Ref: arXiv 2511.10629, section 4.2. It reports medians in one place and means in another, so both are given.
"""

import json
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from giantleap.models.bundle.descriptor import Method
from giantleap.models.generation.items import GenerationItem
from giantleap.models.generation.refinement import Refinement
from giantleap.models.lua.spec import scaled_size
from giantleap.models.route import Route
from giantleap.models.runs import run_once

WARMUPS = 20
RUNS = 20
_SEED = 42


@dataclass(frozen=True, slots=True)
class ProtocolPlan:
    """What is timed.

    Args:
        scale: A scale of the method.
        width_px: Of the base image; the final one is `scale` times as wide.
        height_px: Of the base image.
        steps: Denoising steps.
        guidance_scale: Of the bundle; above 1 many pipelines take twice as long.
        method: How the image is enlarged.
        warmups: Runs that are discarded first.
        runs: Runs that count.
        refine: The refine pass; None leaves it out.
    """

    scale: float
    width_px: int
    height_px: int
    steps: int
    guidance_scale: float
    method: Method = "lua"
    warmups: int = WARMUPS
    runs: int = RUNS
    refine: Refinement | None = None

    def __post_init__(self) -> None:
        if self.runs < 1 or self.warmups < 0:
            raise ValueError(f"runs is {self.runs} and warmups {self.warmups}; at least one run must count")


@dataclass(frozen=True, slots=True)
class Statistics:
    """Seconds of one stage over all runs."""

    median_s: float
    p95_s: float
    mean_s: float

    def to_labels(self) -> dict[str, float]:
        """The figures by value of the metric's label `statistic`."""
        return {"median": self.median_s, "p95": self.p95_s, "mean": self.mean_s}


@dataclass(frozen=True, slots=True)
class ProtocolResult:
    """One measurement and its conditions. `stages` includes `total`, the sum per run."""

    bundle: str
    method: Method
    scale: float
    image_px: str
    steps: int
    guidance_scale: float
    warmups: int
    runs: int
    refine: Refinement | None
    engine: str
    device: str
    dtype: str
    torch_version: str
    machine: str
    stages: Mapping[str, Statistics]

    def to_json(self) -> str:
        """The result as one JSON object."""
        return json.dumps(asdict(self))


def time_runs(route: Route, plan: ProtocolPlan) -> Iterator[Mapping[str, float]]:
    """Run the plan and yield the seconds of each stage after every run, warm-ups included.

    Raises:
        ValueError: The bundle does not have the scale.
    """
    if plan.scale not in route.scales_of(plan.method):
        raise ValueError(f"scale {plan.scale}: this bundle has {route.scales_of(plan.method)} by method {plan.method}")
    size_px = (plan.width_px, plan.height_px)
    item = GenerationItem("", "", _SEED, *size_px, plan.steps, plan.guidance_scale, refine=plan.refine)
    for _ in range(plan.warmups + plan.runs):
        yield run_once(route, item, plan.scale, plan.method)[0].stages_s


def to_result(route: Route, plan: ProtocolPlan, runs_s: Sequence[Mapping[str, float]]) -> ProtocolResult:
    """The statistics of all runs that `time_runs` yielded, without the warm-ups."""
    counted = [{**stages_s, "total": sum(stages_s.values())} for stages_s in runs_s[plan.warmups :]]
    return ProtocolResult(
        bundle=route.name,
        method=plan.method,
        scale=plan.scale,
        image_px=f"{scaled_size(plan.width_px, plan.scale)}x{scaled_size(plan.height_px, plan.scale)}",
        steps=plan.steps,
        guidance_scale=plan.guidance_scale,
        warmups=plan.warmups,
        runs=plan.runs,
        refine=plan.refine,
        engine=route.engine,
        device=device_name(route.device),
        dtype=str(route.dtype).removeprefix("torch."),
        torch_version=torch.__version__,
        machine=f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        stages={stage: to_statistics([each[stage] for each in counted]) for stage in counted[0]},
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


def device_name(device: torch.device) -> str:
    """The name of a GPU; `cpu` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
