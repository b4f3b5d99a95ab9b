"""Measures batches of each stage on the device that is there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.batching.report import to_batch_seconds, to_row
from benchmarks.batching.simulation import LOW_LOAD, Policy, evaluate
from benchmarks.machine import read_machine
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.device import choose_device, choose_dtype
from giantleap.models.generation.items import GenerationItem
from giantleap.models.route import Route
from giantleap.service.jobs.grid import LatentGrid
from giantleap.service.jobs.job import GenerateParams
from giantleap.service.settings import Settings

PROMPT = "a red sphere on a green floor"
NO_GUIDANCE = 1.0
STEPS = 8
BASE_PX = 128
SCALES = (2, 4)


def time_batch(route: Route, size: int) -> dict[str, float]:
    """Seconds of one batch, by the rows of the report."""
    items = [GenerationItem(PROMPT, "", seed, BASE_PX, BASE_PX, STEPS, NO_GUIDANCE) for seed in range(size)]
    clock = route.clock()
    with clock.measure("generate"):
        latents = [latent for latent in route.generate(items) if latent is not None]
    times_s = {"generate": clock.stages_s["generate"]}
    for scale in SCALES:
        clock, together = route.clock(), route.clock()
        enlarged, _ = route.upscale_and_decode(latents, scale, observer=clock)
        with together.measure("decode"):
            route.decode(torch.stack(enlarged))
        times_s[f"upscale x{scale}"] = clock.stages_s["upscale"]
        times_s[f"decode {BASE_PX * scale} px, one call"] = together.stages_s["decode"]
        times_s[_total(scale)] = times_s["generate"] + sum(clock.stages_s.values())
    return times_s


def _total(scale: int) -> str:
    return f"all, as a worker runs x{scale}"


def time_rounds(
    time_size: Callable[[int], Mapping[str, float]], sizes: Sequence[int], runs: int
) -> dict[str, list[dict[int, float]]]:
    """Per stage and round, the seconds of each size; every other round goes through the sizes backwards."""
    stages: dict[str, list[dict[int, float]]] = {}
    for number in range(runs):
        turn = {size: time_size(size) for size in (sizes if number % 2 == 0 else sizes[::-1])}
        for stage in turn[sizes[0]]:
            stages.setdefault(stage, []).append({size: turn[size][stage] for size in sizes})
    return stages


def simulate_policy(route: Route, row: Mapping[str, Any], scale: int, sizes: Sequence[int]) -> dict[str, float]:
    """The default settings of a worker, by the measured times of all stages."""
    items, budget = (Settings.model_fields[name].default for name in ("batch_items", "batch_budget_latent_px"))
    policy = Policy("cuda" if route.device.type == "cuda" else "cpu", min(items, max(sizes)), budget)
    side_px = BASE_PX * scale
    params = GenerateParams(PROMPT, "", scale, side_px, side_px, STEPS, NO_GUIDANCE, 0, 1, "png")
    grid = LatentGrid(route.vae.latent_space.stride_px, route.window)
    return {
        "scale": scale,
        **asdict(policy),
        "wait_ms": 0,
        "low_load": LOW_LOAD,
        **evaluate(to_batch_seconds(row), policy, params, grid),
    }


def measure(directory: Path, sizes: Sequence[int], runs: int) -> dict[str, Any]:
    """Measure all stages at each size, and simulate the policy; the largest size runs once uncounted."""
    bundle, device = read_bundle(directory), choose_device("auto")
    machine = read_machine()
    route = Route.open(bundle, device, choose_dtype("auto", device))
    time_batch(route, max(sizes))
    rows = [to_row(*each) for each in time_rounds(partial(time_batch, route), sizes, runs).items()]
    by_stage = {row["stage"]: row for row in rows}
    return {
        "machine": machine,
        "bundle": bundle.name,
        "runs": runs,
        "rows": rows,
        "policy": [simulate_policy(route, by_stage[_total(scale)], scale, sizes) for scale in SCALES],
    }
