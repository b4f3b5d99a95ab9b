"""Reads what a compiled artifact depends on: processor, GPU and the versions of the libraries."""

import importlib.metadata

import torch

from giantleap.export.manifest import Machine, this_platform

PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt", "diffusers", "numpy")


def read_versions() -> dict[str, str]:
    """Versions of the installed packages that take part in an export."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def read_machine(device: torch.device) -> Machine:
    """This machine, with one of its devices."""
    versions = read_versions()
    gpu, capability = None, None
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return Machine(
        platform=this_platform(),
        device="cuda" if device.type == "cuda" else "cpu",
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        gpu=gpu,
        compute_capability=capability,
        torch=versions.get("torch"),
        tensorrt=versions.get("tensorrt"),
    )
