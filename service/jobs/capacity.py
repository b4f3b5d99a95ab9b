"""Whether a job fits a device that serves its bundle, and the largest size that does.

`giantleap.service.jobs.planning` asks before anything is enqueued, with the devices of the live workers; a worker asks
again for its own before it runs a batch. Pure functions of values, apart from `read_plans`; what a job needs is in
`models/memory/plan.py`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.bundle.descriptor import nearest_sides
from giantleap.models.lua.spec import LuaSpec, scaled_size
from giantleap.models.memory.activations import lua_kept_bytes
from giantleap.models.memory.from_bundle import read_memory_plan
from giantleap.models.memory.plan import DeviceKind, MemoryPlan, UnknownMemoryError, Workload, largest_fit
from giantleap.models.vae.strip_plan import ELEMENT_BYTES
from giantleap.service.errors import DoesNotFit
from giantleap.service.jobs.devices import Device, LoadedBundle
from giantleap.service.jobs.job import GenerateParams, JobParams
from giantleap.service.settings import Settings

log = logging.getLogger(__name__)

_NONE: Mapping[str, LuaSpec | None] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class BundleMemory:
    """What of a served bundle is needed to plan memory.

    Args:
        plans: For each dtype; none where the bundle's memory cannot be told.
        dtype: The one that the bundle names for itself.
    """

    plans: Mapping[str, MemoryPlan]
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class DeviceShare:
    """A device on which jobs of one bundle run, or the stages of them that its plan names.

    Args:
        plan: Of the bundle, there.
        memory_bytes: Of the device.
        others_bytes: What other bundles take of it.
    """

    plan: MemoryPlan
    memory_bytes: int
    others_bytes: int = 0

    @property
    def own_bytes(self) -> int:
        """What is left for the bundle, its weights included."""
        return self.memory_bytes - self.others_bytes

    def fits(self, work: Workload) -> bool:
        """Raises: UnknownMemoryError: there is no estimate."""
        return self.plan.fits(work, self.own_bytes)


def read_memory(bundle: Bundle) -> BundleMemory:
    """Read a bundle's configurations and the headers of its weights.

    Where its memory cannot be told, a line in the log says why; its jobs are accepted, and a worker that knows more
    decides.
    """
    try:
        return BundleMemory({dtype: read_memory_plan(bundle, "cpu", dtype) for dtype in ELEMENT_BYTES}, bundle.dtype)
    except UnknownMemoryError as error:
        log.info("memory of jobs is not planned: %s", error)
        return BundleMemory({}, bundle.dtype)


def with_lua(plan: MemoryPlan, lua: LuaSpec | None) -> MemoryPlan:
    """The plan with the LUA that a worker found in a file which does not tell its shape without torch."""
    if lua is None or plan.lua is not None:
        return plan
    return replace(plan, lua=lua, weights_bytes=plan.weights_bytes + lua_kept_bytes(lua))


def find_places(
    name: str, bundles: Mapping[str, BundleMemory], devices: Sequence[Device], settings: Settings
) -> tuple[DeviceShare, ...]:
    """Where jobs of a bundle may run; none where that is not known.

    Args:
        name: Of the bundle.
        bundles: All that are served.
        devices: Of the live workers; without any, the settings say what there is once they name a size.
        settings: `device_memory_bytes` counts instead of what a worker found.
    """
    given_bytes = settings.device_memory_bytes
    if not devices and given_bytes is not None:
        devices = [_supposed(kind, given_bytes, bundles, settings) for kind in _kinds(settings.device)]
    places = []
    for device in devices:
        loaded = device.bundles.get(name)
        if loaded is not None and loaded.dtype in bundles[name].plans:
            plan = with_lua(bundles[name].plans[loaded.dtype], loaded.lua)
            plan = replace(plan, device=device.kind, prepared=loaded.prepared).of_role(device.role)
            places.append(DeviceShare(plan, given_bytes or device.memory_bytes, loaded.others_bytes))
    return tuple(places)


def _kinds(device: str) -> tuple[DeviceKind, ...]:
    if device == "auto":
        return ("cuda", "cpu")
    return ("cpu",) if device == "cpu" else ("cuda",)


def _supposed(kind: DeviceKind, memory_bytes: int, bundles: Mapping[str, BundleMemory], settings: Settings) -> Device:
    """The device that the settings describe, with every bundle loaded as `giantleap.models.device.choose_dtype`
    says."""
    free = settings.dtype == "auto"
    dtypes = {
        name: settings.dtype if not free else "float32" if kind == "cpu" else memory.dtype or "bfloat16"
        for name, memory in bundles.items()
    }
    return Device(kind, memory_bytes, share_device(dtypes, {name: memory.plans for name, memory in bundles.items()}))


def share_device(
    dtypes: Mapping[str, str], plans: Mapping[str, Mapping[str, MemoryPlan]], luas: Mapping[str, LuaSpec | None] = _NONE
) -> dict[str, LoadedBundle]:
    """What each of the bundles on one device leaves to the others.

    Args:
        dtypes: Of each bundle.
        plans: Of each bundle, by dtype; one without counts nothing.
        luas: What a worker knows of each bundle's LUA.
    """
    weights_bytes = {
        name: with_lua(plans[name][dtype], luas.get(name)).weights_bytes if dtype in plans[name] else 0
        for name, dtype in dtypes.items()
    }
    all_bytes = sum(weights_bytes.values())
    return {
        name: LoadedBundle(dtype, all_bytes - weights_bytes[name], luas.get(name)) for name, dtype in dtypes.items()
    }


def to_workload(params: JobParams, bundle: Bundle) -> Workload:
    """One image of a job."""
    if isinstance(params, GenerateParams):
        return Workload(
            params.width_px,
            params.height_px,
            params.scale,
            params.method,
            params.decode,
            source="prompt" if params.strength is None else "prompt and image",
            guidance_scale=params.guidance_scale,
        )
    decode = params.decode if params.output == "image" else None
    if params.image_width_px is not None and params.image_height_px is not None:
        width_px, height_px = params.image_width_px, params.image_height_px
        width_px, height_px = scaled_size(width_px, params.scale), scaled_size(height_px, params.scale)
        return Workload(width_px, height_px, params.scale, params.method, decode, source="image")
    stride_px = bundle.latent_space.stride_px
    return Workload(
        scaled_size(stride_px * params.latent_width, params.scale),
        scaled_size(stride_px * params.latent_height, params.scale),
        params.scale,
        params.method,
        decode,
        source="latent",
    )


def insufficient(work: Workload, places: Sequence[DeviceShare]) -> list[DeviceShare]:
    """The places that all refuse a half of the work's stages; none where each half fits one, or no place is known.

    Raises:
        UnknownMemoryError: there is no estimate.
    """
    halves = (
        [place for place in places if place.plan.role.loads_pipeline],
        [place for place in places if place.plan.role.loads_decoder],
    )
    for able in halves:
        if able and not any(place.fits(work) for place in able):
            return able
    return []


def largest_size(
    work: Workload, bundle: Bundle, places: Sequence[DeviceShare], max_image_px: int
) -> tuple[int, int] | None:
    """Final width and height of the largest image of about this aspect that is allowed and fits a device.

    Raises:
        UnknownMemoryError: there is no estimate for this way.
    """

    def on_grid(width_px: int, height_px: int) -> tuple[int, int]:
        width_px, height_px = (_side_on_grid(side_px, work, bundle) for side_px in (width_px, height_px))
        return width_px, height_px

    def fits(smaller: Workload) -> bool:
        if smaller.width_px * smaller.height_px > max_image_px:
            return False
        return not insufficient(smaller, places)

    return largest_fit(work, on_grid, fits)


def _side_on_grid(side_px: int, work: Workload, bundle: Bundle) -> int:
    factor = 1 if work.method == "direct" else work.scale
    if work.source in ("prompt", "prompt and image"):
        limits = bundle.limits_at(work.scale, work.method)
        return scaled_size(nearest_sides(side_px / factor, limits, work.method)[0], factor)
    base_px = bundle.latent_space.stride_px if work.source == "latent" else 1
    if not isinstance(work.scale, int):
        base_px = bundle.whole_px(bundle.latent_space.multiple_px, work.scale)
    unit_px = scaled_size(base_px, work.scale)
    return max(side_px // unit_px, 1) * unit_px


def largest_note(work: Workload, bundle: Bundle, places: Sequence[DeviceShare], max_image_px: int) -> str:
    """What a refusal adds: the largest size that is allowed and fits; empty where there is none."""
    try:
        size = largest_size(work, bundle, places, max_image_px)
    except UnknownMemoryError:
        size = largest_size(work, bundle, (), max_image_px)
    return "" if size is None else f"; the largest size that fits is {size[0]}x{size[1]} px"


def check_capacity(params: JobParams, bundle: Bundle, places: Sequence[DeviceShare], max_image_px: int) -> None:
    """Accepts a job of which one image at a time fits a device, and a job of which that cannot be told.

    Raises:
        DoesNotFit: no device is large enough.
    """
    work = to_workload(params, bundle)
    try:
        small = insufficient(work, places)
        if not small:
            return
        size = largest_size(work, bundle, places, max_image_px)
    except UnknownMemoryError:
        return
    best = max(small, key=lambda place: place.own_bytes - place.plan.weights_bytes)
    needed_bytes = best.others_bytes + best.plan.estimate(work, best.own_bytes).peak_bytes
    advice = (
        f"the largest size that fits is {size[0]}x{size[1]} px"
        if size is not None
        else f"no size fits beside {best.others_bytes + best.plan.weights_bytes} bytes of weights"
    )
    raise DoesNotFit(
        f"an image of {work.width_px}x{work.height_px} px by method {work.method} needs about {needed_bytes} bytes of "
        f"memory; the device has {best.memory_bytes}: {advice}",
        needed_bytes=needed_bytes,
        device_bytes=best.memory_bytes,
        largest_px=size,
    )


def max_items(params: JobParams, bundle: Bundle, place: DeviceShare, items: int) -> int:
    """How many images of a job run at once in a place, up to `items`; at least one."""
    try:
        return place.plan.max_items(replace(to_workload(params, bundle), items=items), place.own_bytes)
    except UnknownMemoryError:
        return items
