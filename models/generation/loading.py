"""Loads a bundle's diffusers pipeline."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from giantleap.models.bundle.bundle import Bundle, BundleError, ModelSource
from giantleap.models.bundle.load_errors import load_errors
from giantleap.models.device import on_device
from giantleap.models.generation.modes import apply_modes, check_modes, place, quantization
from giantleap.models.vae.autoencoder import read_vae_model


def load_pipeline(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the bundle's pipeline in its modes, from safetensors or gguf, and from disk only if it is a directory.

    Silences the logs and progress bars of diffusers and transformers, which would print prompts.

    Raises:
        BundleError: There is a VAE and no pipeline, a file or class of it cannot be loaded, or its modes do not work
            here.
    """
    if bundle.pipeline_class == "DiffusionPipeline":
        raise BundleError(f"bundle {bundle.name} holds a VAE alone, to train with: there is no pipeline to serve")
    check_modes(bundle, device)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()  # they log prompts that are cut off
    diffusers_logging.disable_progress_bar()
    with load_errors(bundle, "pipeline"), on_device(device):
        parts: dict[str, Any] = (
            {} if bundle.vae is None else {"vae": read_vae_model(bundle, torch.device("cpu"), dtype)}
        )
        parts |= quantization(bundle, dtype)
        pipeline = _read_pipeline(ModelSource(bundle.pipeline, bundle.revision, bundle.variant), dtype, parts)
        if bundle.scheduler is not None:
            scheduler = _scheduler_class(bundle.scheduler)
            pipeline.register_modules(scheduler=scheduler.from_config(pipeline.scheduler.config))
        apply_modes(pipeline, bundle.modes, dtype)
    pipeline.set_progress_bar_config(disable=True)
    return place(pipeline, bundle.modes, device)


def _scheduler_class(name: str) -> Any:
    found = getattr(diffusers, name, None)
    if found is None:
        alike = difflib.get_close_matches(name, [each for each in dir(diffusers) if each.endswith("Scheduler")], n=3)
        hint = f"; did you mean {' or '.join(alike)}?" if alike else ""
        raise BundleError(f"pipeline.scheduler: diffusers {diffusers.__version__} has no class {name}{hint}")
    return found


def _read_pipeline(source: ModelSource, dtype: torch.dtype, parts: Mapping[str, Any]) -> Any:
    return DiffusionPipeline.from_pretrained(
        str(source.place),
        revision=source.revision,
        variant=source.variant,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=isinstance(source.place, Path),
        **parts,
    )
