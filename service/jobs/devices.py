"""What a worker's device holds: how much memory, of what kind, and which bundles in which dtype.

A worker writes it as JSON beside its heartbeat (`giantleap.service.jobqueue.consumer`); an API process reads those of
the live workers every few seconds (`giantleap.service.jobqueue.producer`), so that `giantleap.service.jobs.capacity`
can refuse a job that fits none of them without asking Redis. Nothing here imports torch.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Self, get_args

from giantleap.models.lua.spec import LuaSpec
from giantleap.models.memory.plan import DeviceKind
from giantleap.models.worker_role import WorkerRole

# Of the whole: on a GPU the driver and the libraries keep about half a gigabyte and the allocator some gaps; a
# machine's memory also holds the process itself, Redis with its blobs and the API.
USABLE_SHARE: Mapping[DeviceKind, float] = MappingProxyType({"cuda": 0.95, "cpu": 0.75})
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True, slots=True)
class LoadedBundle:
    """A bundle on a device.

    Args:
        dtype: That its base model computes in.
        others_bytes: What the other bundles of the device take of its memory.
        lua: The spec of its LUA; None where it has none.
        prepared: Whether its upscalers run in the form for a CPU (`models/engines/packed_lua.py`).
    """

    dtype: str
    others_bytes: int
    lua: LuaSpec | None = None
    prepared: bool = False


@dataclass(frozen=True, slots=True)
class Device:
    """A worker's device.

    Args:
        kind: A CPU or a GPU.
        memory_bytes: That weights and feature maps may take.
        bundles: What is loaded, by name.
        role: Of the worker.
    """

    kind: DeviceKind
    memory_bytes: int
    bundles: Mapping[str, LoadedBundle] = field(default_factory=dict)
    role: WorkerRole = WorkerRole.ALL

    def to_json(self) -> str:
        """As one line."""
        bundles = {
            name: {
                "dtype": loaded.dtype,
                "others_bytes": loaded.others_bytes,
                "lua": None if loaded.lua is None else loaded.lua.to_json(),
                "prepared": loaded.prepared,
            }
            for name, loaded in self.bundles.items()
        }
        said = {"kind": self.kind, "memory_bytes": self.memory_bytes, "bundles": bundles, "role": self.role}
        return json.dumps(said)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: it is something else, as a worker of another version may have written.
        """
        try:
            values = json.loads(text)
            bundles = {
                str(name): LoadedBundle(
                    str(said["dtype"]),
                    int(said["others_bytes"]),
                    None if said["lua"] is None else LuaSpec.from_json(said["lua"]),
                    bool(said["prepared"]),
                )
                for name, said in values["bundles"].items()
            }
            if values["kind"] not in get_args(DeviceKind):
                raise ValueError(f"kind {values['kind']!r}")
            return cls(values["kind"], int(values["memory_bytes"]), bundles, WorkerRole(values["role"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no device: {text!r:.200}") from error


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
    """What jobs may take of a device."""
    return int(total_bytes * USABLE_SHARE[kind])


def machine_memory_bytes() -> int:
    """Memory of this machine, or of the control group (a container) that the process is in where that is less."""
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            limit = path.read_text().strip()
        except OSError:
            continue
        if limit.isdigit():  # else "max"
            total_bytes = min(total_bytes, int(limit))
    return total_bytes
