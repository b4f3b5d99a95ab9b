"""The plan of `giantleap bench paper`: cells of the table, captions, and their common conditions."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from giantleap.cli.paper.scores import ScorePlan
from giantleap.models.bundle.bundle import Bundle
from giantleap.models.bundle.descriptor import METHODS, Method, to_toml
from giantleap.models.generation.refinement import Refinement
from giantleap.models.lua.spec import scaled_size
from giantleap.models.route import Route
from giantleap.service.worker.timing import device_name


class PaperBenchError(ValueError):
    """Captions or results that cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Conditions of all cells of a table; a cell measured under others is not reused.

    Args:
        bundle: Name.
        bundle_sha256: Of the descriptor, which has the digests of the weights.
        refine: Strength and steps of the refine pass; empty for a cell without it.
        scores: What pictures are compared with, and by which networks.
    """

    bundle: str
    bundle_sha256: str
    steps: int
    guidance_scale: float
    seed: int
    warmups: int
    runs: int
    captions_sha256: str
    device: str
    dtype: str
    refine: str
    scores: Mapping[str, int | str | None]


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table."""

    method: Method
    scale: float
    is_refined: bool = False

    @property
    def name(self) -> str:
        """The stem of its files."""
        return f"{self.method}_x{self.scale:g}{'_refined' if self.is_refined else ''}"


BASE = Cell("direct", 1)
"""The images at the base size, which larger ones are compared with."""


@dataclass(frozen=True, slots=True)
class TablePlan:
    """A table to measure.

    Args:
        cells: From `plan_cells`.
        captions: Prompts, used in turn.
        steps: Denoising steps.
        seed: Of the first image; the next ones follow.
        warmups: Runs of each cell that are discarded first.
        runs: Runs that count.
        refine: The pass of refined cells; None for a table without them.
        scores: What pictures are compared with.
    """

    cells: Sequence[Cell]
    captions: Sequence[str]
    steps: int
    seed: int
    warmups: int
    runs: int
    refine: Refinement | None = None
    scores: ScorePlan = field(default_factory=ScorePlan)

    @property
    def images(self) -> int:
        """Images of each cell: those of the runs that count, and those that are only compared."""
        return max(self.runs, self.scores.images)

    def conditions(self, route: Route, bundle: Bundle, cell: Cell) -> Conditions:
        """Those of a cell."""
        refine = self.refine if cell.is_refined else None
        return Conditions(
            bundle=bundle.name,
            bundle_sha256=hashlib.sha256(to_toml(bundle.descriptor).encode()).hexdigest(),
            steps=self.steps,
            guidance_scale=bundle.defaults.guidance_scale,
            seed=self.seed,
            warmups=self.warmups,
            runs=self.runs,
            captions_sha256=hashlib.sha256("\0".join(self.captions).encode()).hexdigest(),
            device=device_name(route.device),
            dtype=str(route.dtype).removeprefix("torch."),
            refine="" if refine is None else f"{refine.strength:g}:{refine.steps}",
            scores=self.scores.summary(),
        )


def plan_cells(bundle: Bundle, names: Sequence[str], scales: Sequence[float], refines: bool = False) -> list[Cell]:
    """The cells that the bundle can fill, by scale; at scale 1 all methods are the plain pipeline, which is `direct`.

    Without names all methods count. With a refine pass every cell above scale 1 has a refined twin.

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
    plain = [Cell(method, scale) for scale in sorted(scales) for method in methods if _is_filled(bundle, method, scale)]
    twins = [replace(cell, is_refined=True) for cell in plain if refines and cell.scale > 1]
    return sorted([*plain, *twins], key=lambda cell: (cell.scale, plain.index(replace(cell, is_refined=False))))


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
