"""Loads a whole bundle for use from Python: `load_route`. The service opens routes itself, by the worker's role."""

from pathlib import Path

import torch

from giantleap.models.bundle.bundle import Bundle, BundleError
from giantleap.models.bundle.names import load_bundle
from giantleap.models.device import choose_device, choose_dtype
from giantleap.models.route import Route


def load_route(
    bundle: Bundle | Path | str, *, device: torch.device | str = "auto", dtype: torch.dtype | str = "auto"
) -> Route:
    """Load a bundle: its pipeline, its VAE and its upscalers.

    Args:
        bundle: A bundle, its directory or its name (`load_bundle`).
        device: Where it runs; "auto" is the first GPU, else the CPU.
        dtype: The compute type; "auto" is float32 on a CPU, on a GPU the type that the bundle names, else bfloat16.

    Raises:
        BundleError: The bundle cannot be read, its weights were not pulled, or a file differs from its digest.
        ValueError: The device does not exist or cannot compute in that type, or as `Route.open`.
        OSError: The pipeline lacks a file.
    """
    if not isinstance(bundle, Bundle):
        bundle = load_bundle(bundle)
    if isinstance(bundle.pipeline, str):
        raise BundleError(f"bundle {bundle.name} is on the hub: run `giantleap bundle pull {bundle.name}` first")
    chosen = choose_device(str(device))
    return Route.open(bundle, chosen, choose_dtype(str(dtype).removeprefix("torch."), chosen, bundle.dtype))
