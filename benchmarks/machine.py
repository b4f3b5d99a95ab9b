"""What figures were measured on: stands in every file of `benchmarks/results/`."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

PACKAGES = ("torch", "diffusers")
PHOTO_PACKAGES = (*PACKAGES, "scikit-image", "scikit-learn")  # the last two hold the photographs


def read_machine(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Processor, load, system and the versions of these packages, at this moment."""
    import torch  # here, so that the help of a benchmark does not load it

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
