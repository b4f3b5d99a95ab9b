"""Time how image files are written: every format and option of a request, against Pillow's PNG, in turns.

`python -m benchmarks.images.encode` draws a prompt with the pocket bundle and enlarges it, and enlarges a photograph
and adds grain; it prints CPU seconds, megabytes and the PSNR of lossy files, and writes
`benchmarks/results/encode.json`. `times_as_fast` is relative to Pillow's PNG at the level that was used before.
`--others` also measures settings that a request cannot choose, AVIF among them.
`python -m benchmarks.readme_figures` writes the report into `docs/lab/encode.md`.
"""

import io
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from benchmarks.machine import describe_cpu, read_machine

if TYPE_CHECKING:  # `--help` loads neither torch nor numpy
    import numpy as np
    from numpy.typing import NDArray

    Encoders = Mapping[str, Callable[[NDArray[np.uint8]], bytes]]

RESULTS = Path("benchmarks/results/encode.json")
PILLOW_LEVEL = 3
BASELINE = f"png, Pillow level {PILLOW_LEVEL}"
SERVED_PNG = "png, fast"
SIDES_PX = (512, 2048, 4096)
AIM_PX, AIM_SHARE = 4096, 0.2  # encoding takes at most this share of the time before
GRAIN = 4.0  # deviation, in levels of 255
PROMPT = "a large green cone on a purple floor under an orange sky, in the centre"
# Settings of Pillow that the options of a request could have had.
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "png, Pillow level 9": {"format": "PNG", "optimize": True},
    "jpeg 95, 4:2:0": {"format": "JPEG", "quality": 95, "subsampling": 2},
    **{f"webp 95, method {method}": {"format": "WEBP", "quality": 95, "method": method} for method in (0, 1, 4, 5)},
    "avif 90, speed 8": {"format": "AVIF", "quality": 90, "speed": 8, "max_threads": 1},
}


def with_pillow(pixels: "NDArray[np.uint8]", options: Mapping[str, Any]) -> bytes:
    """Encode with Pillow."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()


def make_encoders(with_others: bool) -> "Encoders":
    """What was used before, what a request can choose, and with the others what it could be."""
    import torch

    from giantleap.models.pixels.image_formats import CONTENT_TYPES, Compression, FileOptions, ImageFormat
    from giantleap.models.pixels.images import to_image_bytes

    def encode(pixels: "NDArray[np.uint8]", name: ImageFormat, options: FileOptions) -> bytes:
        return to_image_bytes(torch.from_numpy(pixels), name, options=options)

    served = {
        f"{name}, {compression}": partial(encode, name=name, options=FileOptions(compression))
        for name in CONTENT_TYPES
        for compression in get_args(Compression)
    }
    pillow = {BASELINE: {"format": "PNG", "compress_level": PILLOW_LEVEL}, **(OTHERS if with_others else {})}
    return {name: partial(with_pillow, options=options) for name, options in pillow.items()} | served


def make_images(side_px: int, bundle: Path) -> "dict[str, NDArray[np.uint8]]":
    """A generated picture and a photograph with grain, enlarged to this side."""
    import numpy as np
    import skimage.data
    import torch
    from PIL import Image

    from giantleap.models.bundle.bundle import read_bundle
    from giantleap.models.generation.items import GenerationItem
    from giantleap.models.route import Route
    from giantleap.models.runs import run_once

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
    return {"generated": enlarged["generated"], "photograph with grain": grain}


def measure(pixels: "NDArray[np.uint8]", encoders: "Encoders", runs: int) -> dict[str, dict[str, float | None]]:
    """Median CPU seconds, megabytes and PSNR of each encoder, run in turns; no PSNR where every pixel is kept."""
    times: dict[str, list[float]] = {name: [] for name in encoders}
    files: dict[str, bytes] = {}
    for _ in range(runs):
        for name, encode in encoders.items():
            start_s = time.process_time()
            files[name] = encode(pixels)
            times[name].append(time.process_time() - start_s)
    cpu_s = {name: statistics.median(each) for name, each in times.items()}
    return {
        name: {
            "cpu_s": round(cpu_s[name], 4),
            "mb": round(len(file) / 1e6, 3),
            "psnr_db": _psnr_db(pixels, file),
            "times_as_fast": round(cpu_s[BASELINE] / cpu_s[name], 1),
        }
        for name, file in files.items()
    }


def _psnr_db(pixels: "NDArray[np.uint8]", file: bytes) -> float | None:
    import numpy as np
    import torch
    from PIL import Image

    from giantleap.models.pixels.images import psnr_db, to_signed

    with Image.open(io.BytesIO(file)) as image:
        found = np.array(image.convert("RGB"))
    if np.array_equal(found, pixels):
        return None
    return round(psnr_db(to_signed(torch.from_numpy(found)), to_signed(torch.from_numpy(pixels))), 2)


def to_markdown(report: Mapping[str, Any]) -> str:
    """The tables of a report, and what they say of the aim."""
    about = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    lines = [
        f"{describe_cpu(about)}, one thread, load {about['load_1min']:.1f}, {versions}, {about['measured_at'][:10]}."
    ]
    for title, rows in report["images"].items():
        lines += ["", f"| {title} | CPU ms | MB | PSNR, dB | times as fast |", "|---|---|---|---|---|"]
        for name, row in rows.items():
            psnr = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
            lines.append(
                f"| {name} | {1e3 * row['cpu_s']:.1f} | {row['mb']:.2f} | {psnr} | {row['times_as_fast']:.1f} |"
            )
    shares = [
        rows[SERVED_PNG]["cpu_s"] / rows[BASELINE]["cpu_s"]
        for title, rows in report["images"].items()
        if title.endswith(f" {AIM_PX} px")
    ]
    if shares:
        verdict = "met" if max(shares) <= AIM_SHARE else "missed"
        found = f"{100 * max(shares):.0f} %"
        lines += [
            "",
            f"A PNG of {AIM_PX} px takes {found} of the time before; aim: {100 * AIM_SHARE:.0f} %, {verdict}.",
        ]
    return "\n".join(lines) + "\n"


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle that draws.")] = Path("bundles/pocket"),
    side_px: Annotated[list[int] | None, typer.Option(help="Side of the images; repeatable.")] = None,
    runs: Annotated[int, typer.Option(help="Runs of each encoder.", min=1)] = 5,
    others: Annotated[bool, typer.Option(help="Also settings that a request cannot choose.")] = False,
    out: Annotated[Path, typer.Option(help="The report.")] = RESULTS,
) -> None:
    """Measure, print, write the JSON."""
    import torch

    torch.set_num_threads(1)
    encoders = make_encoders(others)
    images: dict[str, Any] = {}
    for side in side_px or SIDES_PX:
        for name, pixels in make_images(side, bundle).items():
            images[f"{name}, {side} px"] = rows = measure(pixels, encoders, runs)
            for encoder, row in rows.items():
                typer.echo(f"{name}, {side} px, {encoder}: {row}")
    report = {"machine": read_machine(("isal", "pillow")), "runs": runs, "images": images}
    out.write_text(json.dumps(report, indent=1) + "\n")
    typer.echo(to_markdown(report))


if __name__ == "__main__":
    typer.run(main)
