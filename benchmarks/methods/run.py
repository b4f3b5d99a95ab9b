"""Time the stages of every method of a bundle at each scale.

`python -m benchmarks.methods` writes `benchmarks/results/methods.json`. `lua`, `bicubic` and `swinir` start from a base
latent; `direct` generates at the final size. The times follow the protocol of `giantleap.service.worker.timing` with
fewer runs, one method after another. `benchmarks/pocket_pictures` draws the pictures.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import typer

from benchmarks.machine import PHOTO_PACKAGES, read_machine
from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.bundle.descriptor import REDIFFUSION, Method
from giantleap.models.device import choose_device, choose_dtype
from giantleap.models.route import Route
from giantleap.service.worker.timing import ProtocolPlan, ProtocolResult, time_runs, to_result, to_table


def enlarging_methods(bundle: Bundle) -> list[Method]:
    """The methods of a bundle but for those that draw again, to compare with."""
    return [method for method in bundle.methods if method not in REDIFFUSION]


def time_methods(route: Route, bundle: Bundle, warmups: int, runs: int) -> list[ProtocolResult]:
    """Time every method at every scale above 1."""
    defaults = bundle.defaults
    size = (defaults.base_width_px, defaults.base_height_px)
    plans = [
        ProtocolPlan(scale, *size, defaults.steps, defaults.guidance_scale, method, warmups, runs)
        for method in enlarging_methods(bundle)
        for scale in bundle.scales_of(method)[1:]
    ]
    return [to_result(route, plan, list(time_runs(route, plan))) for plan in plans]


def run(directory: Path, out: Path, threads: int, warmups: int, runs: int) -> None:
    """Time, print the table, write the JSON."""
    torch.set_num_threads(threads)
    bundle = read_bundle(directory)
    device = choose_device("auto")
    route = Route.open(bundle, device, choose_dtype("auto", device))
    results = time_methods(route, bundle, warmups, runs)
    typer.echo(to_table(results))
    record = {"machine": read_machine(PHOTO_PACKAGES), "results": [asdict(result) for result in results]}
    out.write_text(json.dumps(record, indent=2) + "\n")
