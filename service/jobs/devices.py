"""What a worker publishes about its device: memory, bundles, and the measured peak of each stage.

A worker writes it as JSON with its heartbeat (`giantleap.service.jobqueue.consumer`). An API process reads the devices
of live workers every few seconds (`giantleap.service.jobqueue.producer`), so `giantleap.service.jobs.capacity` can
refuse a job that fits none of them without a round trip to Redis. Nothing here imports torch.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Self

from pydantic import TypeAdapter

from giantleap.models.worker_role import WorkerRole

DeviceKind = Literal["cpu", "cuda"]

# Share of the total. On a GPU the driver and the libraries take about half a gigabyte and the allocator fragments; a
# machine's memory also holds Redis with its blobs and the API.
USABLE_SHARE: Mapping[DeviceKind, float] = MappingProxyType({"cuda": 0.95, "cpu": 0.75})
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, slots=True)
class StagePeak:
    """Peak memory of one stage for one image, as a line through measured points: `fixed_bytes + bytes_per_px * px`.

    Args:
        fixed_bytes: The part that does not depend on the size.
        bytes_per_px: Per pixel of the latent that enters the stage.
        tile_px: Latent pixels of the largest tile, if the stage works in tiles.
    """

    fixed_bytes: int
    bytes_per_px: float
    tile_px: int | None = None

    @classmethod
    def through(cls, small: tuple[int, int], large: tuple[int, int], tile_px: int | None = None) -> Self:
        """The line through two points (latent pixels, peak bytes), with neither part below zero."""
        (small_px, small_bytes), (large_px, large_bytes) = small, large
        if large_px <= small_px:
            raise ValueError(f"a peak needs a small and a large size; found {small_px} and {large_px} latent pixels")
        slope = max(0.0, (large_bytes - small_bytes) / (large_px - small_px))
        return cls(max(0, int(large_bytes - slope * large_px)), slope, tile_px)

    def peak_bytes(self, latent_px: int) -> int:
        """Peak memory for a latent of this many pixels."""
        return self.fixed_bytes + int(self.bytes_per_px * min(latent_px, self.tile_px or latent_px))


@dataclass(frozen=True, slots=True)
class Device:
    """A worker's device.

    Args:
        kind: A CPU or a GPU.
        memory_bytes: What weights and activations may use.
        loaded_bytes: In use once all bundles are loaded, or as many of them as may be at once.
        bundles: Measured stages of each bundle, by bundle and stage (`giantleap.service.jobs.capacity`).
        role: Role of the worker.
        loaded: The bundles that are in memory now.
        version: Of Giantleap in the worker; None: older than this field.
        emulated_dtype: The compute type, where it is one that the processor only emulates, far slower than float32.
    """

    kind: DeviceKind
    memory_bytes: int
    loaded_bytes: int
    bundles: Mapping[str, Mapping[str, StagePeak]] = field(default_factory=dict)
    role: WorkerRole = WorkerRole.ALL
    loaded: tuple[str, ...] = ()
    version: str | None = None
    emulated_dtype: str | None = None

    def to_json(self) -> str:
        """One line of JSON."""
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> "Device":
        """Reads the output of `to_json`.

        Raises:
            ValueError: the text is something else, such as the output of another version.
        """
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(Device)


def missing_roles(devices: Iterable[Device]) -> list[str]:
    """Why jobs of a bundle cannot finish: no worker that serves it generates, or none decodes."""
    roles: dict[str, list[WorkerRole]] = {}
    for device in devices:
        for name in device.bundles:
            roles.setdefault(name, []).append(device.role)
    missing = [(name, WorkerRole.GENERATE) for name, each in roles.items() if not any(r.loads_pipeline for r in each)]
    missing += [(name, WorkerRole.DECODE) for name, each in roles.items() if not any(r.loads_decoder for r in each)]
    return [f"no worker of role {role} serves bundle {name}" for name, role in sorted(missing)]


def usable_bytes(kind: DeviceKind, total_bytes: int) -> int:
    """The part of a device's memory that weights and activations may use."""
    return int(total_bytes * USABLE_SHARE[kind])


def machine_memory_bytes() -> int:
    """Memory of this machine, or of the control group (container) of the process if that is smaller."""
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            limit = path.read_text().strip()
        except OSError:
            continue
        if limit.isdigit():  # "max" means no limit
            total_bytes = min(total_bytes, int(limit))
    return total_bytes
