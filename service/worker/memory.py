"""Measures the memory of a loaded worker: bytes in use, and the peak of each stage at two sizes.

The line through the two peaks is published with the heartbeat (`giantleap.service.jobs.devices`), and
`giantleap.service.jobs.capacity` compares jobs with it. On a GPU the figures are those of torch's allocator. On a CPU
they count tensors (`giantleap.models.live_storage`), without the workspace of kernels. What ONNX Runtime, TensorRT and
compiled graphs allocate themselves is not seen on either; running out of memory halves the batch.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import numpy as np
import psutil
import torch
from torch import Tensor

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.bundle.descriptor import DecodeName, Method
from giantleap.models.device import is_emulated, is_out_of_memory, synchronize
from giantleap.models.generation.items import GenerationItem
from giantleap.models.live_storage import LiveStorage
from giantleap.models.pixels.images import to_pixels
from giantleap.models.route import Route
from giantleap.models.worker_role import WorkerRole
from giantleap.service.jobs.capacity import stage_name
from giantleap.service.jobs.devices import Device, DeviceKind, StagePeak, machine_memory_bytes, usable_bytes
from giantleap.service.settings import Settings

log = logging.getLogger(__name__)

_GUIDANCE_SCALE = 2.0  # above 1, so that a pipeline that doubles the batch for guidance does so
Size = tuple[int, int]  # width and height of an image, pixels
Run = Callable[[Size], object]


def measure_device(
    device: torch.device, peaks: Mapping[str, Mapping[str, StagePeak]], settings: Settings, missing_bytes: int = 0
) -> Device:
    """The device of a worker whose bundles were measured.

    Args:
        device: Where they are.
        peaks: Of each bundle (`measure_stages`).
        settings: All settings.
        missing_bytes: Of the bundles that are not loaded now and may be later, beside those that are.
    """
    kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
    memory_bytes = settings.device_memory_bytes or usable_bytes(kind, _total_bytes(device))
    reserved_bytes = 0 if settings.lora_dir is None else settings.lora_memory_bytes
    loaded_bytes = _used_bytes(device) + reserved_bytes + missing_bytes
    log.info("worker measured memory", extra={"fields": {"memory_bytes": memory_bytes, "loaded_bytes": loaded_bytes}})
    is_slow = settings.dtype == "bfloat16" and is_emulated(torch.bfloat16, device)
    return Device(
        kind,
        memory_bytes,
        loaded_bytes,
        peaks,
        settings.role,
        version=version("giantleap"),
        emulated_dtype="bfloat16" if is_slow else None,
    )


def measure_stages(route: Route, bundle: Bundle) -> dict[str, StagePeak]:
    """The peak of each stage of a route, by name (`giantleap.service.jobs.capacity.Workload.stages`)."""
    small, base, large = measured_sizes(bundle)
    tile_px = 0 if route.pixel is None else route.pixel.tile_px
    peaks = {}
    for name, run in _stages(route):
        try:
            peaks[name] = _measure(route, run, base, large)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            route.free_cache()
            peaks[name] = _measure(route, run, small, base)
    if route.role is WorkerRole.ALL and route.generator.family.refines:
        peaks["refine"] = peaks["generate"]  # the same network, for one image
    for scale in route.scales_of("swinir")[1:]:
        run = partial(_upscale_pixels, route, scale)
        side_px = min(tile_px, *base) // 2
        peak = _measure(route, run, (side_px // 2, side_px // 2), (side_px, side_px))
        peaks[stage_name("swinir", scale)] = replace(peak, tile_px=(tile_px // bundle.latent_space.stride_px) ** 2)
    route.free_cache()
    return peaks


def measure_peak(device: torch.device, run: Callable[[], object]) -> int:
    """The peak bytes of a call beyond those in use before it."""
    if device.type != "cuda":
        with _one_thread(), LiveStorage() as live:
            run()
        peak_bytes: int = live.peak_bytes
        return peak_bytes
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before_bytes = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before_bytes


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run the many small operators of a measurement on one thread, where none waits for the others at a barrier."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measured_sizes(bundle: Bundle) -> tuple[Size, Size, Size]:
    """Half of the default base size, that size, and up to twice that size as far as the bundle allows."""
    defaults, unit_px = bundle.defaults, bundle.limits.multiple_px
    base = (defaults.base_width_px, defaults.base_height_px)
    growth = max(1 + unit_px / min(base), min(2.0, bundle.limits.max_base_px / max(base)))

    def scaled(factor: float) -> Size:
        width_px, height_px = (max(1, round(side_px * factor / unit_px)) * unit_px for side_px in base)
        return width_px, height_px

    return scaled(0.5), base, scaled(growth)


def _stages(route: Route) -> Iterator[tuple[str, Run]]:
    """The stages of a route that torch can see, but for SwinIR, and how to run each for one image."""
    if route.role.loads_pipeline:
        yield "generate", partial(_generate, route)
    yield "encode", partial(_encode, route)
    if not route.role.loads_decoder:
        return
    if route.device.type == "cuda" or route.engine == "torch":
        for scale in route.scales_of("lua")[1:]:
            yield stage_name("lua", scale), partial(_upscale, route, scale, "lua")
    for scale in route.scales_of("bicubic")[1:]:
        yield stage_name("bicubic", scale), partial(_upscale, route, scale, "bicubic")
    yield "exact", partial(_decode, route, "exact")
    if "tiny" in route.vae.decodes:
        yield "tiny", partial(_decode, route, "tiny")


def _measure(route: Route, run: Run, small: Size, large: Size) -> StagePeak:
    stride_px = route.vae.latent_space.stride_px

    def measured(size: Size) -> tuple[int, int]:
        return size[0] * size[1] // stride_px**2, measure_peak(route.device, partial(run, size))

    return StagePeak.through(measured(small), measured(large))


def _generate(route: Route, size: Size) -> None:
    route.generate([GenerationItem("", "", 0, *size, steps=1, guidance_scale=_GUIDANCE_SCALE)])


def _encode(route: Route, size: Size) -> None:
    route.encode_image(np.zeros((size[1], size[0], 3), np.uint8))


def _latents(route: Route, size: Size) -> Tensor:
    space = route.vae.latent_space
    width, height = (side_px // space.stride_px for side_px in size)
    return torch.zeros(1, space.channels, height, width, device=route.device)


def _upscale(route: Route, scale: float, method: Method, size: Size) -> None:
    route.upscale(_latents(route, size), scale, method)


def _decode(route: Route, how: DecodeName, size: Size) -> None:
    """Decode in the way that uses less memory at large sizes: a job fits if that way fits."""
    latents = _latents(route, size)
    decoded = route.vae.decode_in_strips(latents) if how == "exact" else route.vae.decode(latents, how)
    to_pixels(decoded / 2 + 0.5)


def _upscale_pixels(route: Route, scale: float, size: Size) -> None:
    route.upscale_pixels([torch.zeros(size[1], size[0], 3, dtype=torch.uint8)], scale)


def _total_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_memory_bytes()


def _used_bytes(device: torch.device) -> int:
    """Bytes in use: of torch's allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
