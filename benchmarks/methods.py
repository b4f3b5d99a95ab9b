"""Generate one prompt by every method of a bundle at each scale, side by side, and time the stages.

`python -m benchmarks.methods` writes `docs/methods.png` and `benchmarks/results/methods.json`. `lua`, `bicubic` and
`swinir` start from the same base latent; `direct` generates another image at the final size. The times follow the
protocol of `giantleap.service.worker.timing` with fewer runs, one method after another.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from benchmarks.machine import PHOTO_PACKAGES, read_machine
from giantleap.cli.paper.sheet import write_sheet
from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.bundle.descriptor import REDIFFUSION, Method
from giantleap.models.device import choose_device, choose_dtype
from giantleap.models.generation.generator import GenerationItem
from giantleap.models.route import Route, run_once
from giantleap.service.worker.timing import ProtocolPlan, ProtocolResult, time_runs, to_result, to_table

PROMPT = "a large red sphere on a green floor under a blue sky, in the centre"


def draw_row(route: Route, bundle: Bundle, prompt: str, seed: int, scale: int) -> dict[str, Image.Image]:
    """Generate one prompt by every method that has the scale, after the base image.

    Returns:
        Images by the name of the method; "base" is the image at scale 1.
    """
    images = {"base": _draw(route, bundle, prompt, seed, 1, "bicubic")}
    for method in enlarging_methods(bundle):
        if scale in bundle.scales_of(method):
            images[method] = _draw(route, bundle, prompt, seed, scale, method)
    return images


def enlarging_methods(bundle: Bundle) -> list[Method]:
    """The methods of a bundle but for those that draw again, to compare with."""
    return [method for method in bundle.methods if method not in REDIFFUSION]


def _draw(route: Route, bundle: Bundle, prompt: str, seed: int, scale: int, method: Method) -> Image.Image:
    defaults = bundle.defaults
    size = (defaults.base_width_px, defaults.base_height_px)
    item = GenerationItem(prompt, "", seed, *size, defaults.steps, defaults.guidance_scale)
    _, image = run_once(route, item, scale, method)
    if image is None:
        raise RuntimeError(f"{method} x{scale} of {prompt!r} has values that are not finite")
    return Image.fromarray(image.numpy())


def time_methods(route: Route, bundle: Bundle, warmups: int, runs: int) -> list[ProtocolResult]:
    """Time every method at every scale above 1."""
    defaults = bundle.defaults
    size = (defaults.base_width_px, defaults.base_height_px)
    plans = [
        ProtocolPlan(scale, *size, defaults.steps, method, warmups, runs)
        for method in enlarging_methods(bundle)
        for scale in bundle.scales_of(method)[1:]
    ]
    return [to_result(route, plan, list(time_runs(route, plan))) for plan in plans]


def main(
    directory: Annotated[Path, typer.Option("--bundle", help="Bundle directory.")] = Path("bundles/pocket"),
    out: Annotated[Path, typer.Option(help="Where the times go.")] = Path("benchmarks/results/methods.json"),
    sheet: Annotated[Path, typer.Option(help="Where the images go.")] = Path("docs/methods.png"),
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    warmups: Annotated[int, typer.Option(help="Uncounted runs.")] = 2,
    runs: Annotated[int, typer.Option(help="Counted runs.")] = 7,
    times: Annotated[bool, typer.Option(help="Also time the methods (minutes).")] = True,
) -> None:
    """Generate, time, print the table, write the files."""
    torch.set_num_threads(threads)
    bundle = read_bundle(directory)
    device = choose_device("auto")
    route = Route.open(bundle, device, choose_dtype("auto", device))
    write_sheet([(f"x{scale}", draw_row(route, bundle, PROMPT, 0, scale)) for scale in (2, 4)], sheet)
    if not times:
        return
    results = time_methods(route, bundle, warmups, runs)
    typer.echo(to_table(results))
    record = {"machine": read_machine(PHOTO_PACKAGES), "results": [asdict(result) for result in results]}
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
