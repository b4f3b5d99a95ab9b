"""The device of a GPU check, and what a report says about it."""

import subprocess
from typing import Any

import torch
import typer


def choose_device(name: str) -> torch.device:
    """Return the first GPU for "cuda", or the CPU for "cpu".

    Raises:
        typer.Exit: With status 2 when there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        typer.echo(
            f"gpu_check needs a CUDA device; torch {torch.__version__} finds none here. Nothing was measured.", err=True
        )
        raise typer.Exit(2)
    return torch.device("cuda:0" if name == "cuda" else "cpu")


def describe_device(device: torch.device) -> dict[str, Any]:
    """Describe the card, its driver and its libraries; of a CPU, that these are no figures of a GPU."""
    if device.type == "cpu":
        return {"card": None, "note": "measured on a CPU; no figures of a GPU"}
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return {
        "card": properties.name,
        "memory_bytes": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": torch.backends.cudnn.allow_tf32,
    }
