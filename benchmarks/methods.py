"""Generate one prompt by every method of a bundle at each scale, side by side, and time the stages.

`python -m benchmarks.methods` writes `docs/methods.png` and `benchmarks/results/methods.json`. `lua`, `bicubic` and
`swinir` start from the same base latent; `direct` generates another image at the final size. The times follow the
protocol of `giantleap.service.worker.timing` with fewer runs, one method after another.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.machine import PHOTO_PACKAGES, read_machine
from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.bundle.descriptor import REDIFFUSION, Method
from giantleap.models.device import choose_device, choose_dtype
from giantleap.models.generation.generator import GenerationItem
from giantleap.models.route import Route
from giantleap.service.worker.timing import ProtocolPlan, ProtocolResult, time_runs, to_result, to_table

PROMPT = "a large red sphere on a green floor under a blue sky, in the centre"
HEAD_PX = 20
CELL_PX = 256


def draw_row(route: Route, bundle: Bundle, prompt: str, seed: int, scale: int) -> dict[str, Tensor]:
    """Generate one prompt by every method that has the scale, after the base image.

    Returns:
        Pixels [height_px, width_px, 3], uint8, by the name of the method; "base" is the image at scale 1.
    """
    images = {"base": _draw(route, bundle, prompt, seed, 1, "bicubic")}
    for method in enlarging_methods(bundle):
        if scale in bundle.scales_of(method):
            images[method] = _draw(route, bundle, prompt, seed, scale, method)
    return images


def enlarging_methods(bundle: Bundle) -> list[Method]:
    """The methods of a bundle but for those that draw again, to compare with."""
    return [method for method in bundle.methods if method not in REDIFFUSION]


def _draw(route: Route, bundle: Bundle, prompt: str, seed: int, scale: int, method: Method) -> Tensor:
    defaults = bundle.defaults
    factor = scale if method == "direct" else 1
    width_px, height_px = factor * defaults.base_width_px, factor * defaults.base_height_px
    item = GenerationItem(prompt, "", seed, width_px, height_px, defaults.steps, defaults.guidance_scale)
    latents = [latent for latent in route.generate([item], method, scale) if latent is not None]
    _, (image,) = route.upscale_and_decode(latents, scale, method, "exact", route.clock())
    if image is None:
        raise RuntimeError(f"{method} x{scale} of {prompt!r} has values that are not finite")
    return image


def write_sheet(rows: Sequence[tuple[str, dict[str, Tensor]]], path: Path) -> None:
    """Write one row per scale and one column per method, all of the same central crop."""
    columns = list(dict.fromkeys(name for _, images in rows for name in images))
    sheet = Image.new("RGB", (len(columns) * CELL_PX, len(rows) * (HEAD_PX + CELL_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (title, images) in enumerate(rows):
        top = row * (HEAD_PX + CELL_PX)
        largest_px = max(image.shape[1] for image in images.values())
        for name, image in images.items():
            left = columns.index(name) * CELL_PX
            label = (
                f"{title}: base, pixels repeated" if name == "base" else f"{name} {image.shape[1]}x{image.shape[0]} px"
            )
            pen.text((left + 4, top + 4), label, fill="black")
            sheet.paste(to_cell(Image.fromarray(image.numpy()), largest_px), (left, top + HEAD_PX))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def to_cell(image: Image.Image, largest_px: int) -> Image.Image:
    """Return the central crop at `CELL_PX`; pixels of images smaller than the row's largest are repeated."""
    side = min(image.width, CELL_PX * image.width // largest_px)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((CELL_PX, CELL_PX), Image.Resampling.NEAREST)


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
