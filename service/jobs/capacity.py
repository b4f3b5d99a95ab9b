"""Whether a job fits a device that serves its bundle, and the largest size that does.

`giantleap.service.jobs.planning` asks before a job is enqueued, with the devices of the live workers; a worker asks
again for its own device before it runs a batch. Pure functions of values. A stage's peak comes from a measurement that
the worker took at warm-up (`giantleap.service.worker.memory`); a stage that was not measured is not refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.bundle.descriptor import NEEDS_DECODER, REDIFFUSION, DecodeName, Method, nearest_sides
from giantleap.models.lua.spec import scaled_size
from giantleap.models.worker_role import WorkerRole
from giantleap.service.errors import DoesNotFit
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.job import GenerateParams, JobParams

_IMAGE_BYTES_PER_PX = 48  # four float32 copies of three channels exist while an image becomes bytes
_ROUNDING = 1e-6  # of a pixel
_SEQUENTIAL = ("encode", "swinir", "refine")  # stages that run one image at a time


@dataclass(frozen=True, slots=True)
class Workload:
    """One image of a job.

    Args:
        width_px: Of the final image.
        height_px: Of the final image.
        scale: Of the final image over the base image.
        method: How the image is enlarged; "direct" generates at the final size.
        decode: How the latent becomes an image; None leaves it a latent.
        source: What the job starts from.
        stride_px: Image pixels per latent pixel.
        refine_side_px: Longest side of a window of the refine pass; None without that pass.
    """

    width_px: int
    height_px: int
    scale: float
    method: Method
    decode: DecodeName | None
    source: Literal["prompt", "prompt and image", "latent", "image"]
    stride_px: int
    refine_side_px: int | None = None

    def stages(self, role: WorkerRole) -> dict[str, int]:
        """The stages that a worker of this role runs, each with the pixels of the latent that enters it."""
        factor = 1 if self.method == "direct" else self.scale
        base_px, final_px = self._latent_px(factor), self._latent_px(1)
        enlarges = factor > 1
        refines = self.refine_side_px is not None
        enlarges_pixels = self.method == "swinir" and enlarges
        pixels_only = self.source == "image" and enlarges_pixels and not refines
        stages: dict[str, int] = {}
        if self.source in ("prompt", "prompt and image") and role.loads_pipeline:
            stages["generate"] = final_px if self.samples_again else base_px
        encodes_here = role.loads_pipeline if self.source == "prompt and image" else role.loads_decoder
        if self.source in ("image", "prompt and image") and encodes_here and not pixels_only:
            stages["encode"] = base_px
        if self.samples_again and self.method in NEEDS_DECODER and role.loads_pipeline:
            stages["encode"] = final_px
        if not role.loads_decoder:
            return stages
        if enlarges and not self.samples_again:
            stages[stage_name(self.method, self.scale)] = base_px
        if self.refine_side_px is not None:
            stages["refine"] = self._latent_px(1, self.refine_side_px)
            if enlarges_pixels:
                stages["encode"] = final_px
        if self.decode is not None and not pixels_only:
            stages[self.decode] = base_px if self.method == "swinir" and not refines else final_px
        return stages

    @property
    def samples_again(self) -> bool:
        """Whether generation ends at the final size, one image at a time."""
        return self.method in REDIFFUSION and self.scale > 1

    def _latent_px(self, factor: float, max_side_px: float = math.inf) -> int:
        width, height = (
            math.ceil(math.ceil(min(side_px, max_side_px) / factor - _ROUNDING) / self.stride_px)
            for side_px in (self.width_px, self.height_px)
        )
        return width * height


def stage_name(method: Method, scale: float) -> str:
    """The name under which a worker publishes the peak of an upscaler."""
    return f"{method} x{scale:g}"


def to_workload(params: JobParams, bundle: Bundle) -> Workload:
    """One image of a job."""
    stride_px = bundle.latent_space.stride_px
    refine_side_px = None if params.refine is None else bundle.max_side_px
    if isinstance(params, GenerateParams):
        return Workload(
            width_px=params.width_px,
            height_px=params.height_px,
            scale=params.scale,
            method=params.method,
            decode=params.decode,
            source="prompt" if params.strength is None else "prompt and image",
            stride_px=stride_px,
            refine_side_px=refine_side_px,
        )
    if params.image_width_px is not None and params.image_height_px is not None:
        sides, from_image = (params.image_width_px, params.image_height_px), True
    else:
        sides, from_image = (stride_px * params.latent_width, stride_px * params.latent_height), False
    return Workload(
        width_px=scaled_size(sides[0], params.scale),
        height_px=scaled_size(sides[1], params.scale),
        scale=params.scale,
        method=params.method,
        decode=params.decode if params.output == "image" else None,
        source="image" if from_image else "latent",
        stride_px=stride_px,
        refine_side_px=refine_side_px,
    )


def required_bytes(work: Workload, bundle: str, device: Device, items: int = 1) -> int:
    """Memory in use at the worst moment of a batch, weights included; stages run one after the other."""
    peaks, needed_bytes = device.bundles[bundle], 0
    for stage, latent_px in work.stages(device.role).items():
        peak = peaks.get(stage)
        if peak is None:
            continue
        one_by_one = (
            stage.startswith(_SEQUENTIAL)
            or (stage == work.decode and device.kind == "cpu")
            or (stage == "generate" and work.samples_again)
        )
        stage_bytes = peak.peak_bytes(latent_px if one_by_one else latent_px * items)
        if peak.tile_px is not None and latent_px > peak.tile_px:
            stage_bytes += _IMAGE_BYTES_PER_PX * work.width_px * work.height_px
        needed_bytes = max(needed_bytes, stage_bytes)
    return device.loaded_bytes + needed_bytes


def fits(work: Workload, bundle: str, device: Device, items: int = 1) -> bool:
    """Whether a batch of this many images fits the device."""
    return required_bytes(work, bundle, device, items) <= device.memory_bytes


def too_small(work: Workload, bundle: str, devices: Sequence[Device]) -> list[Device]:
    """The devices that all refuse one half of the route; empty if each half fits a device or has no known device."""
    generating = [device for device in devices if device.role.loads_pipeline]
    decoding = [device for device in devices if device.role.loads_decoder]
    for half in (generating, decoding):
        if half and not any(fits(work, bundle, device) for device in half):
            return half
    return []


def largest_size(
    work: Workload, bundle: Bundle, devices: Sequence[Device], max_image_px: int
) -> tuple[int, int] | None:
    """Width and height of the largest final image of about this aspect ratio that is allowed and fits; None if none."""
    longest = max(work.width_px, work.height_px)

    def at(side_px: int) -> tuple[int, int]:
        width_px = _side_on_grid(work.width_px * side_px // longest, work, bundle)
        return width_px, _side_on_grid(work.height_px * side_px // longest, work, bundle)

    def is_possible(side_px: int) -> bool:
        width_px, height_px = at(side_px)
        smaller = replace(work, width_px=width_px, height_px=height_px)
        return width_px * height_px <= max_image_px and not too_small(smaller, bundle.name, devices)

    small, large = 0, longest + 1  # small fits, large does not
    while large - small > 1:
        middle = (small + large) // 2
        small, large = (middle, large) if is_possible(middle) else (small, middle)
    return at(small) if small else None


def _side_on_grid(side_px: int, work: Workload, bundle: Bundle) -> int:
    factor = 1 if work.method == "direct" else work.scale
    if work.source in ("prompt", "prompt and image"):
        limits = bundle.limits_at(work.scale, work.method)
        return scaled_size(nearest_sides(side_px / factor, limits, work.method)[0], factor)
    base_px = work.stride_px if work.source == "latent" else 1
    if not isinstance(work.scale, int):
        base_px = bundle.whole_px(bundle.latent_space.multiple_px, work.scale)
    unit_px = scaled_size(base_px, work.scale)
    return max(side_px // unit_px, 1) * unit_px


def largest_note(work: Workload, bundle: Bundle, devices: Sequence[Device], max_image_px: int) -> str:
    """The end of a refusal: the largest size that is allowed and fits; empty if there is none."""
    size = largest_size(work, bundle, devices, max_image_px)
    return "" if size is None else f"; the largest size that fits is {size[0]}x{size[1]} px"


def check_capacity(params: JobParams, bundle: Bundle, devices: Sequence[Device], max_image_px: int) -> None:
    """Accepts a job if one image at a time fits a device, or if no device of the bundle is known.

    Raises:
        DoesNotFit: no device is large enough.
    """
    work = to_workload(params, bundle)
    refusing = too_small(work, bundle.name, devices)
    if not refusing:
        return
    size = largest_size(work, bundle, devices, max_image_px)
    best = max(refusing, key=lambda device: device.memory_bytes - device.loaded_bytes)
    needed_bytes = required_bytes(work, bundle.name, best)
    advice = (
        f"the largest size that fits is {size[0]}x{size[1]} px"
        if size is not None
        else f"no size fits beside the {best.loaded_bytes} bytes in use once the bundles are loaded"
    )
    raise DoesNotFit(
        f"an image of {work.width_px}x{work.height_px} px by method {work.method} needs about {needed_bytes} bytes of "
        f"memory; the device has {best.memory_bytes}: {advice}",
        needed_bytes=needed_bytes,
        device_bytes=best.memory_bytes,
        largest_px=size,
    )


def max_items(params: JobParams, bundle: Bundle, device: Device, items: int) -> int:
    """How many images of a job fit the device at once, at most `items` and at least one."""
    work = to_workload(params, bundle)
    return next((n for n in range(items, 1, -1) if fits(work, bundle.name, device, n)), 1)
