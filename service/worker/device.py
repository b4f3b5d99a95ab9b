"""What a worker finds out of its own device: its memory, and the share of it that each loaded bundle has.

The API reads it beside the heartbeat (`giantleap.service.jobs.devices`); both ask `giantleap.service.jobs.capacity`
whether a job fits.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.engines.eager import TorchEngine
from giantleap.models.memory.plan import DeviceKind
from giantleap.models.route import Route
from giantleap.service.jobs.capacity import DeviceShare, find_places, read_memory, share_device
from giantleap.service.jobs.devices import Device, machine_memory_bytes, usable_bytes
from giantleap.service.settings import Settings

log = logging.getLogger(__name__)


def find_device(
    bundles: Mapping[str, Bundle], routes: Mapping[str, Route], settings: Settings
) -> tuple[Device, dict[str, DeviceShare]]:
    """This worker's device, and the share of it that each bundle has whose memory can be told."""
    memory = {name: read_memory(bundle) for name, bundle in bundles.items()}
    plans = {
        name: {dtype: plan.of_role(settings.role) for dtype, plan in each.plans.items()}
        for name, each in memory.items()
    }
    dtypes = {name: str(route.dtype).removeprefix("torch.") for name, route in routes.items()}
    luas = {name: None if route.lua is None else route.lua.spec for name, route in routes.items()}
    loaded = {
        name: replace(each, prepared=_is_prepared(routes[name]))
        for name, each in share_device(dtypes, plans, luas).items()
    }
    device = Device(*_find_memory(next(iter(routes.values())).device, settings), loaded, settings.role)
    fields = {"device": device.kind, "memory_bytes": device.memory_bytes}
    log.info("worker plans memory", extra={"fields": fields})
    found = {name: find_places(name, memory, [device], settings) for name in bundles}
    return device, {name: places[0] for name, places in found.items() if places}


def _is_prepared(route: Route) -> bool:
    """Whether every upscaler of the bundle runs in the form for a CPU; else the plan takes the one that needs more."""
    latents = route.lua is None or (isinstance(route.lua, TorchEngine) and route.lua.prepared)
    return latents and (route.pixel is None or route.pixel.prepared)


def _find_memory(device: torch.device, settings: Settings) -> tuple[DeviceKind, int]:
    """Kind and bytes of a device, as far as jobs may take them."""
    kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
    if settings.device_memory_bytes is not None:
        return kind, settings.device_memory_bytes
    if kind == "cuda":
        return kind, usable_bytes(kind, torch.cuda.get_device_properties(device).total_memory)
    return kind, usable_bytes(kind, machine_memory_bytes())
