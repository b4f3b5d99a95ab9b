"""Time the encoding of PNG files, against Pillow at the level that was used before, in turns.

`python -m benchmarks.images.encode` enlarges a photograph, adds grain to a copy, and draws a prompt with the pocket
bundle; it prints CPU seconds and megabytes and writes `benchmarks/results/encode.json`.
"""

import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import skimage.data
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

from benchmarks.machine import read_machine
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.generation.items import GenerationItem
from giantleap.models.pixels.png import to_png
from giantleap.models.route import Route
from giantleap.models.runs import run_once

RESULTS = Path("benchmarks/results/encode.json")
PILLOW_LEVEL = 3
GRAIN = 4.0  # deviation, in levels of 255
PROMPT = "a large green cone on a purple floor under an orange sky, in the centre"


def with_pillow(pixels: NDArray[np.uint8]) -> bytes:
    """Encode with zlib and a filter per row."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=PILLOW_LEVEL)
    return buffer.getvalue()


def make_images(side_px: int, bundle: Path) -> dict[str, NDArray[np.uint8]]:
    """A photograph, the same with grain, and a generated picture, enlarged to this side."""
    read_photograph: Callable[[], NDArray[np.uint8]] = skimage.data.astronaut
    opened = read_bundle(bundle)
    route, defaults = Route.open(opened, torch.device("cpu"), torch.float32), opened.defaults
    size = (defaults.base_width_px, defaults.base_height_px)
    item = GenerationItem(PROMPT, "", 0, *size, defaults.steps, defaults.guidance_scale)
    _, drawn = run_once(route, item, 4, "lua")
    if drawn is None:
        raise RuntimeError(f"{PROMPT!r} has values that are not finite")
    enlarged = {
        name: np.asarray(Image.fromarray(image).resize((side_px, side_px), Image.Resampling.BICUBIC))
        for name, image in (("photograph", read_photograph()), ("generated", drawn.numpy()))
    }
    noise = np.random.default_rng(0).normal(0.0, GRAIN, enlarged["photograph"].shape)
    grain = (enlarged["photograph"] + noise).round().clip(0, 255).astype(np.uint8)
    return enlarged | {"photograph with grain": grain}


def measure(pixels: NDArray[np.uint8], runs: int) -> dict[str, float]:
    """Median CPU seconds and sizes of both encoders, run in turns, and how many times as fast the own one is."""
    encoders: dict[str, Callable[[NDArray[np.uint8]], bytes]] = {"pillow": with_pillow, "own": to_png}
    times: dict[str, list[float]] = {name: [] for name in encoders}
    sizes: dict[str, float] = {}
    for _ in range(runs):
        for name, encode in encoders.items():
            start_s = time.process_time()
            file = encode(pixels)
            times[name].append(time.process_time() - start_s)
            sizes[f"{name}_mb"] = round(len(file) / 1e6, 3)
    seconds = {f"{name}_s": round(statistics.median(each), 4) for name, each in times.items()}
    return seconds | sizes | {"times_as_fast": round(seconds["pillow_s"] / seconds["own_s"], 1)}


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle that draws.")] = Path("bundles/pocket"),
    side_px: Annotated[list[int] | None, typer.Option(help="Side of the images; repeatable.")] = None,
    runs: Annotated[int, typer.Option(help="Runs of each encoder.", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="The report.")] = RESULTS,
) -> None:
    """Measure, print, write the JSON."""
    torch.set_num_threads(1)
    report: dict[str, Any] = {"machine": read_machine(("isal", "pillow")), "pillow_level": PILLOW_LEVEL, "images": {}}
    for side in side_px or (1024, 2048, 4096):
        for name, pixels in make_images(side, bundle).items():
            report["images"][f"{name} {side} px"] = row = measure(pixels, runs)
            typer.echo(f"{name} {side} px: {row}")
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
