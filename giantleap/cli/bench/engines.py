"""Times every engine that runs a bundle's LUA here, interleaved, and compares their results.

`giantleap bench engines` prints the table. Interleaving keeps ratios valid on a busy machine: what slows one engine
slows the others too. Imports torch.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.device import synchronize
from giantleap.models.engines.base import ENGINES, Engine, EngineName
from giantleap.models.engines.factory import open_engine
from giantleap.models.generation.items import GenerationItem
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.pixels.images import psnr_db
from giantleap.models.route import Route
from giantleap.service.settings import Settings
from giantleap.service.worker.engines import find_artifacts
from giantleap.service.worker.timing import to_statistics

DTYPES = (torch.float32, torch.bfloat16)
SLOW_TO_COMPILE: tuple[EngineName, ...] = ("torch-compile",)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each call."""

    wall_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median of the calls."""
        return statistics.median(self.wall_s)

    @property
    def p95_s(self) -> float:
        """95th percentile of the calls."""
        return to_statistics(self.wall_s).p95_s


def interleave(
    calls: Mapping[str, Callable[[], object]], warmups: int, runs: int, device: torch.device
) -> dict[str, Timing]:
    """Time the calls in turns, with the device synchronized before and after each."""
    walls: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warmups + runs):
        for name, call in calls.items():
            synchronize(device)
            started_s = time.perf_counter()
            call()
            synchronize(device)
            if number >= warmups:
                walls[name].append(time.perf_counter() - started_s)
    return {name: Timing(tuple(wall_s)) for name, wall_s in walls.items()}


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One engine at one scale, or one that does not run here and the reason.

    `ratio` is the speed over `torch` in float32, `max_error` of raw latents and `psnr_db` of the decoded image against
    it; an engine on artifacts computes in their type, whatever `dtype` says.
    """

    engine: str
    dtype: str
    scale: float = 0
    latent: str = ""
    median_ms: float | None = None
    p95_ms: float | None = None
    ratio: float | None = None
    max_error: float | None = None
    psnr_db: float | None = None
    reason: str | None = None

    def to_record(self) -> dict[str, object]:
        """The row as JSON."""
        return asdict(self)


def open_engines(
    bundle: Bundle, settings: Settings, device: torch.device, *, compiled: bool
) -> tuple[dict[str, Engine], dict[str, str]]:
    """All engines that run here, by a name such as `torch bfloat16`, and why the others do not.

    Args:
        bundle: A bundle with a LUA.
        settings: Name the directory of artifacts.
        device: Device of every engine.
        compiled: Whether to include engines that compile at their first latent, which takes minutes.
    """
    engines: dict[str, Engine] = {}
    reasons: dict[str, str] = {}
    assert bundle.lua is not None
    net = read_lua(bundle.lua)
    for name in ENGINES:
        own_dtype = name not in ("torch", "torch-compile")
        for dtype in (torch.float32,) if own_dtype else DTYPES:
            label = name if own_dtype else f"{name} {str(dtype).removeprefix('torch.')}"
            if name in SLOW_TO_COMPILE and not compiled:
                reasons[label] = "skipped; include it with --compile, which takes minutes"
                continue
            try:
                artifacts = find_artifacts(bundle, settings.model_copy(update={"engine": name}), device)
                engines[label] = open_engine(name, net, device, dtype, artifacts)
            except ValueError as error:
                reasons[label] = str(error)
    return engines, reasons


@torch.inference_mode()
def measure_engines(
    bundle: Bundle,
    settings: Settings,
    device: torch.device,
    scales: Sequence[float],
    *,
    compiled: bool,
    warmups: int,
    runs: int,
) -> list[EngineRow]:
    """Generate one latent of the bundle's base size and upscale it with every engine.

    Raises:
        ValueError: the bundle has no LUA, or cannot be loaded.
    """
    if bundle.lua is None:
        raise ValueError(f"bundle {bundle.name} has no LUA: {bundle.unavailable_reason('lua')}")
    engines, reasons = open_engines(bundle, settings, device, compiled=compiled)
    route = Route.open(bundle, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    latent = _generate_latent(route, bundle)
    size = f"{latent.shape[-2]}x{latent.shape[-1]}"
    rows = []
    for scale in scales:
        answers = {name: engine.run(latent, scale) for name, engine in engines.items()}
        calls = {name: partial(engine.run, latent, scale) for name, engine in engines.items()}
        timings = interleave(calls, warmups, runs, device)
        reference = "torch float32"
        expected = answers[reference]
        expected_image = route.vae.decode(expected)
        for name, timing in timings.items():
            answer = answers[name]
            rows.append(
                EngineRow(
                    *_split(name),
                    scale,
                    size,
                    1e3 * timing.median_s,
                    1e3 * timing.p95_s,
                    timings[reference].median_s / timing.median_s,
                    float((answer - expected).abs().max()),
                    None if name == reference else psnr_db(route.vae.decode(answer), expected_image),
                )
            )
    return rows + [EngineRow(*_split(name), reason=reason) for name, reason in reasons.items()]


def to_table(rows: Sequence[EngineRow]) -> str:
    """The rows as text, by scale and fastest first, then the engines that do not run."""
    names = ("engine", "type", "scale", "latent", "median", "p95", "speed", "error", "image")
    lines = ["{:<14}{:<10}{:>5}{:>10}{:>12}{:>12}{:>8}{:>10}{:>8}".format(*names)]
    for row in sorted((row for row in rows if row.reason is None), key=lambda row: (row.scale, row.median_ms)):
        image = "-" if row.psnr_db is None else f"{row.psnr_db:.0f} dB"
        lines.append(
            f"{row.engine:<14}{row.dtype:<10}{f'x{row.scale}':>5}{row.latent:>10}{row.median_ms:>9.1f} ms"
            f"{row.p95_ms:>9.1f} ms{row.ratio:>7.2f}x{row.max_error:>10.1e}{image:>8}"
        )
    return "\n".join([*lines, *(f"{row.engine:<14}{row.dtype:<10}{row.reason}" for row in rows if row.reason)])


def _split(label: str) -> tuple[str, str]:
    engine, _, dtype = label.partition(" ")
    return engine, dtype or "artifact"


def _generate_latent(route: Route, bundle: Bundle) -> Tensor:
    defaults = bundle.defaults
    item = GenerationItem(
        "", "", 0, defaults.base_width_px, defaults.base_height_px, defaults.steps, defaults.guidance_scale
    )
    (latent,) = route.generate([item])
    if latent is None:
        raise ValueError(f"bundle {bundle.name} generated no latent")
    return latent[None].float()
