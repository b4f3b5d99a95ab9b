"""Describe the machine that figures were measured on; part of every file in `benchmarks/results/`."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

PACKAGES = ("torch", "diffusers")
PHOTO_PACKAGES = (*PACKAGES, "scikit-image", "scikit-learn")  # the last two contain the photographs


def read_machine(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Return processor, load, system and the versions of these packages."""
    import torch  # not at the top: `--help` of a benchmark must not load torch

    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
