"""What the watermark is worth: how often it is found after what happens to images, how often where there is none.

    python -m benchmarks.watermark        writes benchmarks/results/watermark.json; takes half an hour

All pictures are drawn here: rendered scenes, dead leaves (statistics of photographs), and flat drawings. Times are CPU
times, so that other work on the machine counts little.
"""

import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from benchmarks.machine import read_machine
from giantleap.models.provenance.watermark import MAX_NUMBER, THRESHOLD, add_watermark, find_watermark, strongest_match
from giantleap.training.pocket.drawing.leaves import draw_leaves
from giantleap.training.pocket.drawing.scenes import draw_scene, render

Pixels = npt.NDArray[np.uint8]

RESULT = Path(__file__).resolve().parents[1] / "results" / "watermark.json"
SIDES_PX = (256, 512, 1024)


def draw_flat(rng: np.random.Generator, side_px: int) -> Pixels:
    """Shapes of one color each on a ground of one color."""
    image = Image.new("RGB", (side_px, side_px), tuple(int(level) for level in rng.integers(0, 256, 3)))
    canvas = ImageDraw.Draw(image)
    for index in range(8):
        corners = sorted(rng.integers(0, side_px, 2).tolist()), sorted(rng.integers(0, side_px, 2).tolist())
        box = (corners[0][0], corners[1][0], corners[0][1], corners[1][1])
        shape = canvas.ellipse if index % 2 else canvas.rectangle
        shape(box, fill=tuple(int(level) for level in rng.integers(0, 256, 3)))
    return np.asarray(image)


def draw_rendered(rng: np.random.Generator, side_px: int) -> Pixels:
    """A scene of the pocket bundle's training."""
    images, _ = render([draw_scene(rng)], side_px, samples=1)
    return np.ascontiguousarray(((images[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


KINDS: Final[dict[str, Callable[[np.random.Generator, int], Pixels]]] = {
    "scenes": draw_rendered,
    "leaves": draw_leaves,
    "flat": draw_flat,
}


def to_jpeg(image: Pixels) -> Pixels:
    """JPEG of quality 75, the colors subsampled."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=75)
    return np.asarray(Image.open(buffer))


def to_half(image: Pixels) -> Pixels:
    """Half the size."""
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((width // 2, height // 2), Image.Resampling.LANCZOS))


def cut(image: Pixels) -> Pixels:
    """A tenth of each side cut off, from places that are no multiples of anything."""
    top, left = round(0.037 * image.shape[0]), round(0.061 * image.shape[1])
    return image[top : top + round(0.9 * image.shape[0]), left : left + round(0.9 * image.shape[1])]


CHANGES: Final[dict[str, Callable[[Pixels], Pixels]]] = {
    "unchanged": lambda image: image,
    "jpeg 75": to_jpeg,
    "half": to_half,
    "crop": cut,
    "half, jpeg 75": lambda image: to_jpeg(to_half(image)),
    "crop, jpeg 75": lambda image: to_jpeg(cut(image)),
}


def to_psnr(image: Pixels, marked: Pixels) -> float:
    """PSNR of a mark, dB."""
    error = np.mean((image.astype(np.float64) - marked) ** 2)
    return float(10 * np.log10(255**2 / error))


def measure_marked(kind: str, side_px: int, count: int) -> dict[str, object]:
    """One row: marked pictures of a kind and size. A mark of another number counts as not found."""
    rng = np.random.default_rng(1)
    found, psnrs, add_s = dict.fromkeys(CHANGES, 0), [], []
    for _ in range(count):
        image, number = KINDS[kind](rng, side_px), int(rng.integers(0, MAX_NUMBER + 1))
        start_s = time.process_time()
        marked = add_watermark(image, number)
        add_s.append(time.process_time() - start_s)
        psnrs.append(to_psnr(image, marked))
        for name, change in CHANGES.items():
            mark = find_watermark(Image.fromarray(change(marked)))
            found[name] += mark is not None and mark.number == number
    shares = {name: hits / count for name, hits in found.items()}
    return {
        "kind": kind,
        "image_px": side_px,
        "images": count,
        "found": shares,
        "psnr_db": statistics.median(psnrs),
        "psnr_lowest_db": min(psnrs),
        "add_s": statistics.median(add_s),
    }


def draw_unmarked(count: int) -> Iterator[Pixels]:
    """Pictures of all kinds in turn."""
    rng, draws = np.random.default_rng(2), list(KINDS.values())
    for index in range(count):
        yield draws[index % len(draws)](rng, 512)


def measure_unmarked(count: int) -> dict[str, object]:
    """False alarms on pictures without a mark, the highest score, and what a search that finds nothing costs."""
    alarms = 0
    scores: list[float] = []
    find_s: list[float] = []
    for image in draw_unmarked(count):
        start_s = time.process_time()
        scores.append(strongest_match(Image.fromarray(image)))
        find_s.append(time.process_time() - start_s)
        alarms += scores[-1] >= THRESHOLD and find_watermark(Image.fromarray(image)) is not None
    return {
        "images": count,
        "image_px": 512,
        "false_alarms": alarms,
        "highest_score": max(scores),
        "threshold": THRESHOLD,
        "find_s": statistics.median(find_s),
    }


def run(marked: int, unmarked: int) -> None:
    """Measure marked and unmarked pictures, print the rows and store them."""
    rows = []
    for side_px in SIDES_PX:
        for kind in KINDS:
            rows.append(measure_marked(kind, side_px, marked))
            print(rows[-1], flush=True)
    without = measure_unmarked(unmarked)
    print(without)
    machine = read_machine(("numpy", "pillow"))
    RESULT.write_text(json.dumps({"machine": machine, "marked": rows, "unmarked": without}, indent=2) + "\n")
