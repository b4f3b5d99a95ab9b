"""Measures one method at one scale by the paper's protocol, and keeps each result in a file, so that a run can go on.

Ref: arXiv 2511.10629, section 4.2: batch 1, 20 warm-ups, then the median.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from giantleap.cli.paper.report import to_markdown
from giantleap.cli.paper.sheet import write_sheet
from giantleap.models.bundle.bundle import Bundle
from giantleap.models.bundle.descriptor import METHODS, Method
from giantleap.models.generation.items import GenerationItem, image_seed
from giantleap.models.lua.spec import scaled_size
from giantleap.models.route import Route
from giantleap.models.runs import run_once
from giantleap.service.worker.timing import device_name, to_statistics


class PaperBenchError(ValueError):
    """Captions or results that cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What all cells of a table share; a cell measured under others is not used again."""

    bundle: str
    steps: int
    guidance_scale: float
    seed: int
    warmups: int
    runs: int
    captions_sha256: str
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the table."""

    method: Method
    scale: float

    @property
    def name(self) -> str:
        """The stem of its files."""
        return f"{self.method}_x{self.scale:g}"


@dataclass(frozen=True, slots=True)
class TablePlan:
    """What is measured.

    Args:
        cells: From `plan_cells`.
        captions: Prompts, used in turn.
        steps: Denoising steps.
        seed: Of the first image; the next ones follow.
        warmups: Runs of each cell that are discarded first.
        runs: Runs that count.
    """

    cells: Sequence[Cell]
    captions: Sequence[str]
    steps: int
    seed: int
    warmups: int
    runs: int


def plan_cells(bundle: Bundle, names: Sequence[str], scales: Sequence[float]) -> list[Cell]:
    """The cells that the bundle can fill, by scale; at scale 1 all methods are the plain pipeline, which is `direct`.

    Without names all methods count.

    Raises:
        PaperBenchError: A named method or scale is not available.
    """
    if unknown := sorted(set(names) - set(METHODS)):
        raise PaperBenchError(f"method {unknown[0]}: unknown; choose from {', '.join(METHODS)}")
    methods = [method for method in METHODS if method in (names or bundle.methods)]
    for method in methods:
        if reason := bundle.unavailable_reason(method):
            raise PaperBenchError(f"method {method}: {reason}; choose from {', '.join(bundle.methods)}")
    for scale in scales:
        if scale not in bundle.scales:
            raise PaperBenchError(f"scale {scale:g}: bundle {bundle.name} has {', '.join(map(str, bundle.scales))}")
    return [Cell(method, scale) for scale in scales for method in methods if _is_filled(bundle, method, scale)]


def _is_filled(bundle: Bundle, method: Method, scale: float) -> bool:
    defaults = bundle.defaults
    longest_px = scaled_size(max(defaults.base_width_px, defaults.base_height_px), scale)
    if method == "direct":
        return longest_px <= (bundle.limits.max_direct_px or 0)
    return scale > 1 and scale in bundle.scales_of(method)


def read_captions(path: Path) -> tuple[str, ...]:
    """The captions of a JSON file: a list of texts.

    Raises:
        PaperBenchError: It is none.
    """
    try:
        captions = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PaperBenchError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) and text for text in captions):
        raise PaperBenchError(f'{path}: expected a list of captions, such as ["a red sphere", "a green cone"]')
    return tuple(captions)


def read_cell(out: Path, cell: Cell, conditions: Conditions) -> dict[str, Any] | None:
    """The record of a cell that was measured; None if it was not.

    Raises:
        PaperBenchError: It was measured under other conditions.
    """
    path = out / f"{cell.name}.json"
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record["conditions"] != asdict(conditions):
        raise PaperBenchError(f"{path} was measured under other conditions; name another --out, or delete the file")
    return record


def measure_cell(
    route: Route, bundle: Bundle, cell: Cell, conditions: Conditions, captions: Sequence[str], out: Path
) -> Iterator[None]:
    """Measure a cell, run by run, each with the next caption and seed.

    Effects: writes the image of the first counted run, then the record, each in one step.

    Raises:
        RuntimeError: An image has values that are not finite.
    """
    base_px, stages_s = (bundle.defaults.base_width_px, bundle.defaults.base_height_px), []
    route.reset_peak_memory()
    first: Image.Image | None = None
    for run in range(-conditions.warmups, conditions.runs):
        number = max(run, 0)
        item = GenerationItem(
            captions[number % len(captions)],
            "",
            image_seed(conditions.seed, number),
            *base_px,
            conditions.steps,
            conditions.guidance_scale,
        )
        clock, image = run_once(route, item, cell.scale, cell.method)
        if image is None:
            raise RuntimeError(f"{cell.name}: the image has values that are not finite")
        if run >= 0:
            first = first or Image.fromarray(image.numpy())
            stages_s.append({**clock.stages_s, "total": sum(clock.stages_s.values())})
        yield
    assert first is not None
    peak = route.peak_memory()
    statistics = {stage: to_statistics([each[stage] for each in stages_s]) for stage in stages_s[0]}
    record = {
        "method": cell.method,
        "scale": cell.scale,
        "image_px": f"{first.width}x{first.height}",
        "median_s": {stage: each.median_s for stage, each in statistics.items()},
        "mean_s": {stage: each.mean_s for stage, each in statistics.items()},
        "peak_bytes": peak.size_bytes,
        "peak_source": peak.source,
        "conditions": asdict(conditions),
    }
    first.save(out / f".{cell.name}.png", format="PNG")
    (out / f".{cell.name}.png").replace(out / f"{cell.name}.png")
    write_text(out / f"{cell.name}.json", json.dumps(record, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: it is whole, or as it was."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def measure_table(route: Route, bundle: Bundle, plan: TablePlan, out: Path) -> str:
    """Measure what is not there yet, and write `paper.json`, `paper.md` and `sheet.png`.

    Returns:
        The Markdown table.

    Raises:
        PaperBenchError: The directory holds results of other conditions.
    """
    conditions = Conditions(
        bundle=bundle.name,
        steps=plan.steps,
        guidance_scale=bundle.defaults.guidance_scale,
        seed=plan.seed,
        warmups=plan.warmups,
        runs=plan.runs,
        captions_sha256=hashlib.sha256("\0".join(plan.captions).encode()).hexdigest(),
        device=device_name(route.device),
        dtype=str(route.dtype).removeprefix("torch."),
    )
    out.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in plan.cells if read_cell(out, cell, conditions) is None]
    with tqdm(total=len(missing) * (plan.warmups + plan.runs), unit="run") as bar:
        for cell in missing:
            bar.set_description(cell.name)
            for _ in measure_cell(route, bundle, cell, conditions, plan.captions, out):
                bar.update()
    cells = [record for cell in plan.cells if (record := read_cell(out, cell, conditions)) is not None]
    machine = {
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }
    table = to_markdown(cells, asdict(conditions), machine)
    write_text(out / "paper.json", json.dumps({"machine": machine, "cells": cells}, indent=2) + "\n")
    write_text(out / "paper.md", table)
    write_sheet(list(_sheet_rows(plan.cells, out)), out / "sheet.png")
    return table


def _sheet_rows(cells: Sequence[Cell], out: Path) -> Iterator[tuple[str, dict[str, Image.Image]]]:
    for scale in dict.fromkeys(cell.scale for cell in cells):
        row = [cell for cell in cells if cell.scale == scale]
        yield f"x{scale:g}", {cell.method: Image.open(out / f"{cell.name}.png").convert("RGB") for cell in row}
