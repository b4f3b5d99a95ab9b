"""Describe the machine that figures were measured on; part of every file in `benchmarks/results/`."""

import os
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers")
PHOTO_PACKAGES = (*PACKAGES, "scikit-image", "scikit-learn")  # the last two contain the photographs

ISA_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
_EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def read_processor(cpuinfo: str) -> dict[str, Any]:
    """The name of the processor and which extensions that matter to torch it has, from the text of /proc/cpuinfo.

    Virtual machines shorten the name to `AMD EPYC`; family and model tell the generations apart (25, 17: Zen 4).
    """
    lines = dict(re.findall(r"^(model name|cpu family|model|flags)\s*: (.*)$", cpuinfo, re.MULTILINE))
    flags, name = lines.get("flags", "").split(), lines.get("model name", "unknown")
    if "cpu family" in lines and "model" in lines:
        name += f" (family {lines['cpu family']}, model {lines['model']})"
    return {"model": name, "extensions": [extension for extension in _EXTENSIONS if extension in flags]}


def describe_cpu(machine: Mapping[str, Any]) -> str:
    """Processor and instruction set of a report, for a page."""
    shown = [f"{machine['model']} with {machine['cpu_capability']}", *machine.get("extensions", ())]
    limits = [f"limited by {name}={value}" for name, value in machine.get("limits", {}).items()]
    return ", ".join([*shown, *limits])


def read_machine(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Return processor, its instruction set, load, system and the versions of these packages.

    `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2` make torch behave as on a processor without AVX-512; the
    capability and the variables are in the report.
    """
    import torch  # not at the top: `--help` of a benchmark must not load torch

    info = Path("/proc/cpuinfo")
    return {
        "processor": platform.processor() or platform.machine(),
        **read_processor(info.read_text() if info.exists() else ""),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "limits": {name: os.environ[name] for name in ISA_LIMITS if name in os.environ},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
