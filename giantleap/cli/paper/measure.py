"""Measures each cell by the paper's protocol and keeps its result in a file, so that a run that ended can go on.

Ref: arXiv 2511.10629, section 4.2: batch 1, 20 warm-ups, then the median.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from giantleap.cli.paper.plan import BASE, Cell, Conditions, PaperBenchError, TablePlan
from giantleap.cli.paper.report import to_markdown
from giantleap.cli.paper.scores import NO_BASE, CellScores, Scorer
from giantleap.cli.paper.sheet import write_sheet
from giantleap.models.atomic_file import replace_file, replacing
from giantleap.models.bundle.bundle import Bundle
from giantleap.models.device import PeakMemory
from giantleap.models.generation.items import GenerationItem, image_seed
from giantleap.models.lua.spec import scaled_size
from giantleap.models.route import Route
from giantleap.service.worker.timing import to_statistics

_IS_BASE = "this is the base image"


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


@dataclass
class _Row:
    """A cell in progress."""

    cell: Cell
    conditions: Conditions
    scores: CellScores
    stages_s: list[dict[str, float]] = field(default_factory=list)
    peak: PeakMemory | None = None
    first: Image.Image | None = None

    def write(self, out: Path) -> None:
        """Write the first image, then the record, each in one step."""
        assert self.first is not None and self.peak is not None
        statistics = {stage: to_statistics([each[stage] for each in self.stages_s]) for stage in self.stages_s[0]}
        record = {
            "method": self.cell.method,
            "scale": self.cell.scale,
            "is_refined": self.cell.is_refined,
            "image_px": f"{self.first.width}x{self.first.height}",
            "median_s": {stage: each.median_s for stage, each in statistics.items()},
            "mean_s": {stage: each.mean_s for stage, each in statistics.items()},
            "peak_bytes": self.peak.size_bytes,
            "peak_source": self.peak.source,
            "scores": self.scores.result(),
            "conditions": asdict(self.conditions),
        }
        write_image(self.first, out / f"{self.cell.name}.png")
        replace_file(out / f"{self.cell.name}.json", (json.dumps(record, indent=2) + "\n").encode())


class Table:
    """A table in progress.

    Args:
        route: Of the bundle.
        bundle: What is measured.
        plan: Which cells, and how.
        out: Directory of the results.
    """

    def __init__(self, route: Route, bundle: Bundle, plan: TablePlan, out: Path) -> None:
        self._route = route
        self._bundle = bundle
        self._plan = plan
        self._out = out

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """As `read_cell`."""
        return read_cell(self._out, cell, self._plan.conditions(self._route, self._bundle, cell))

    def measure_missing(self) -> None:
        """Measure missing cells. A refined cell shares the generation of its plain twin.

        Raises:
            PaperBenchError: The directory holds results of other conditions.
            RuntimeError: An image has values that are not finite.
        """
        missing: dict[Cell, list[Cell]] = {}
        for cell in self._plan.cells:
            if self.read(cell) is None:
                missing.setdefault(replace(cell, is_refined=False), []).append(cell)
        if not missing:
            return
        scores = self._plan.scores
        scorer = Scorer(scores, scores.open_networks(), self._plan.seed)
        with tqdm(total=len(missing) * (self._plan.warmups + self._plan.images), unit="run") as bar:
            for shared, cells in missing.items():
                bar.set_description(shared.name)
                for _ in self._measure(shared, cells, scorer):
                    bar.update()

    def _measure(self, shared: Cell, cells: Sequence[Cell], scorer: Scorer) -> Iterator[None]:
        """Measure cells that differ in refinement, image by image, each with the next caption and seed."""
        plan = self._plan
        has_bases = shared != BASE and BASE in plan.cells
        reason = _IS_BASE if shared == BASE else NO_BASE
        rows = [
            _Row(cell, plan.conditions(self._route, self._bundle, cell), CellScores(scorer, reason)) for cell in cells
        ]
        self._route.reset_peak_memory()
        for run in range(-plan.warmups, plan.images):
            number = max(run, 0)
            base = self._read_base(number) if has_bases and 0 <= run < plan.runs else None
            for row, stages_s, image in self._measure_rows(shared, rows, number):
                if 0 <= run < plan.runs:
                    row.stages_s.append(stages_s | {"total": sum(stages_s.values())})
                    row.peak = self._route.peak_memory()
                    row.first = row.first or Image.fromarray(image.numpy())
                    if shared == BASE:
                        write_image(Image.fromarray(image.numpy()), self._base_path(number))
                if run >= 0:
                    row.scores.add(number, image, self._caption(number), base)
            yield
        for row in rows:
            row.write(self._out)

    def _measure_rows(
        self, cell: Cell, rows: Sequence[_Row], number: int
    ) -> Iterator[tuple[_Row, dict[str, float], Tensor]]:
        """Generate once, and run the other stages for every row."""
        defaults, route, plan = self._bundle.defaults, self._route, self._plan
        factor = cell.scale if cell.method == "direct" else 1
        item = GenerationItem(
            prompt=self._caption(number),
            negative_prompt="",
            seed=image_seed(plan.seed, number),
            width_px=scaled_size(defaults.base_width_px, factor),
            height_px=scaled_size(defaults.base_height_px, factor),
            steps=plan.steps,
            guidance_scale=defaults.guidance_scale,
            refine=plan.refine,
        )
        generation = route.clock()
        latents = route.generate_latents(item, generation, cell.method, cell.scale)
        for row in rows:
            clock, refine = route.clock(), [item] if row.cell.is_refined else []
            _, (image,) = route.upscale_and_decode(latents, cell.scale, cell.method, "exact", clock, refine)
            if image is None:
                raise RuntimeError(f"{row.cell.name}: the image has values that are not finite")
            yield row, generation.stages_s | clock.stages_s, image

    def _caption(self, number: int) -> str:
        return self._plan.captions[number % len(self._plan.captions)]

    def _base_path(self, number: int) -> Path:
        return self._out / "base" / f"{number}.png"

    def _read_base(self, number: int) -> Tensor:
        return torch.from_numpy(np.array(Image.open(self._base_path(number)).convert("RGB")))


def write_image(image: Image.Image, path: Path) -> None:
    """Write an image atomically; create its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        image.save(file, format="PNG")


def measure_table(route: Route, bundle: Bundle, plan: TablePlan, out: Path) -> str:
    """Measure missing cells, and write `paper.json`, `paper.md` and `sheet.png`.

    Returns:
        The page in Markdown.

    Raises:
        PaperBenchError: The directory holds results of other conditions.
    """
    out.mkdir(parents=True, exist_ok=True)
    table = Table(route, bundle, plan, out)
    table.measure_missing()
    cells = [record for cell in plan.cells if (record := table.read(cell)) is not None]
    machine = {
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }
    page = to_markdown(cells, machine)
    report = {"machine": machine, "cells": cells}
    replace_file(out / "paper.json", (json.dumps(report, indent=2) + "\n").encode())
    replace_file(out / "paper.md", page.encode())
    write_sheet(list(_sheet_rows(plan.cells, out)), out / "sheet.png")
    return page


def _sheet_rows(cells: Sequence[Cell], out: Path) -> Iterator[tuple[str, dict[str, Image.Image]]]:
    """A row per scale, and one of refined images; the base image stands first in each."""
    base = {"base": BASE} if BASE in cells and len(cells) > 1 else {}
    for scale, is_refined in dict.fromkeys((cell.scale, cell.is_refined) for cell in cells if cell != BASE or not base):
        row = base | {cell.method: cell for cell in cells if (cell.scale, cell.is_refined) == (scale, is_refined)}
        images = {name: Image.open(out / f"{cell.name}.png").convert("RGB") for name, cell in row.items()}
        yield f"x{scale:g}{' refined' if is_refined else ''}", images
