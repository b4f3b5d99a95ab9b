"""What a worker measures of its own memory, on the pocket bundle: each stage is close to a direct measurement."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.generation.items import GenerationItem
from giantleap.models.pixels.images import to_pixels
from giantleap.models.route import Route
from giantleap.models.runs import warm
from giantleap.models.worker_role import WorkerRole
from giantleap.service.jobs.devices import StagePeak, machine_memory_bytes, usable_bytes
from giantleap.service.settings import POCKET_BUNDLE, read_settings
from giantleap.service.worker.memory import measure_device, measure_peak, measure_stages, measured_sizes

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(POCKET_BUNDLE)


@pytest.fixture(scope="module")
def route(bundle: Bundle) -> Route:
    route = Route.open(bundle, CPU, torch.float32)
    warm(route, 64, 64, 1)
    return route


@pytest.fixture(scope="module")
def peaks(route: Route, bundle: Bundle) -> dict[str, StagePeak]:
    return measure_stages(route, bundle)


@pytest.mark.parametrize(
    "directory", sorted(POCKET_BUNDLE.parent.glob("*/bundle.toml")), ids=lambda path: path.parent.name
)
def test_every_shipped_bundle_is_measured_at_growing_sizes(directory: Path) -> None:
    descriptor = read_bundle(directory.parent)
    small, base, large = measured_sizes(descriptor)
    unit_px = descriptor.limits.multiple_px
    assert small[0] * small[1] < base[0] * base[1] < large[0] * large[1]
    assert all(side_px % unit_px == 0 for size in (small, base, large) for side_px in size)


def test_every_stage_of_the_route_has_a_peak(peaks: dict[str, StagePeak]) -> None:
    upscalers = {f"{method} x{scale}" for method in ("lua", "bicubic", "swinir") for scale in (2, 4)}
    assert set(peaks) == {"generate", "refine", "encode", "exact"} | upscalers
    assert all(peak.bytes_per_px > 0 for peak in peaks.values())
    assert {name for name, peak in peaks.items() if peak.tile_px is not None} == {"swinir x2", "swinir x4"}


@pytest.mark.parametrize("stage", ["generate", "lua x2", "lua x4", "exact"])
def test_a_larger_size_is_predicted_within_a_quarter(route: Route, peaks: dict[str, StagePeak], stage: str) -> None:
    side = 80  # 320 px; the largest size that was measured is 192 px
    item, latents = GenerationItem("", "", 0, 320, 320, 1, 2.0), torch.zeros(1, 24, side, side)
    runs: dict[str, Callable[[], object]] = {
        "generate": partial(route.generate, [item]),
        "lua x2": partial(route.upscale, latents, 2),
        "lua x4": partial(route.upscale, latents, 4),
        "exact": lambda: to_pixels(route.vae.decode_in_strips(latents.clone()) / 2 + 0.5),  # the worker counts it too
    }
    measured_bytes = measure_peak(CPU, runs[stage])
    assert peaks[stage].peak_bytes(side * side) == pytest.approx(measured_bytes, rel=0.25)


def test_a_peak_counts_what_is_alive_together_and_not_what_was_there_before() -> None:
    before = torch.zeros(MIB // 4)

    def run() -> None:
        for _ in range(3):
            (before + 1).add_(1)

    assert measure_peak(CPU, run) == before.nbytes


def test_half_a_route_has_the_peaks_of_its_own_stages(route: Route, bundle: Bundle) -> None:
    generating = Route.open(bundle, CPU, torch.float32, role=WorkerRole.GENERATE)
    assert set(measure_stages(generating, bundle)) == {"generate", "encode"}


def test_a_stage_that_runs_out_of_memory_is_measured_at_smaller_sizes(
    route: Route, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides_px, generate = [], route.generate

    def limited(items: list[GenerationItem]) -> list[torch.Tensor | None]:
        sides_px.append(items[0].width_px)
        if items[0].width_px > 128:
            raise torch.OutOfMemoryError("no memory left")
        return generate(items)

    monkeypatch.setattr(route, "generate", limited)
    assert measure_stages(route, bundle)["generate"].bytes_per_px > 0
    assert sides_px == [128, 192, 64, 128]


def test_a_device_is_what_the_settings_say_or_the_usable_part_of_the_machine(peaks: dict[str, StagePeak]) -> None:
    given = measure_device(CPU, {"pocket": peaks}, read_settings(device_memory_bytes=1000 * MIB), 64 * MIB)
    assert (given.kind, given.memory_bytes, given.role) == ("cpu", 1000 * MIB, WorkerRole.ALL)
    assert 128 * MIB < given.loaded_bytes < machine_memory_bytes()
    assert set(given.bundles) == {"pocket"}
    found = measure_device(CPU, {"pocket": peaks}, read_settings())
    assert found.memory_bytes == usable_bytes("cpu", machine_memory_bytes())


@pytest.mark.parametrize("has_units", [True, False])
def test_a_device_says_that_it_computes_in_a_type_that_is_emulated(
    monkeypatch: pytest.MonkeyPatch, has_units: bool
) -> None:
    monkeypatch.setattr("giantleap.models.device.has_fast_bfloat16", lambda: has_units)
    emulated = measure_device(CPU, {}, read_settings(dtype="bfloat16")).emulated_dtype
    assert emulated == (None if has_units else "bfloat16")
    assert measure_device(CPU, {}, read_settings()).emulated_dtype is None
