"""LoRA files for tests: random pairs of low-rank factors for layers of a real network, named as trainers name them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_PARTS = ("to_q", "to_k", "to_v", "to_out.0")


def denoiser_of(pipeline: Any) -> str:
    """Name of the network that denoises."""
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def layers_of(network: Any) -> dict[str, Tensor]:
    """Weights of the attention's linear layers, by name."""
    return {
        name: layer.weight
        for name, layer in network.named_modules()
        if isinstance(layer, torch.nn.Linear) and name.endswith(_PARTS)
    }


def write_lora(
    path: Path,
    pipeline: Any,
    seed: int,
    rank: int = 4,
    *,
    parts: tuple[str, ...] = (),
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a LoRA for the denoiser of a pipeline, and for its `parts`, such as `text_encoder`."""
    tensors: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(seed)
    for part in (denoiser_of(pipeline), *parts):
        network = getattr(pipeline, part)
        layers = layers_of(network) or {
            name: layer.weight
            for name, layer in network.named_modules()
            if isinstance(layer, torch.nn.Linear) and name.endswith(("q_proj", "v_proj"))
        }
        for name, weight in layers.items():
            tensors[f"{part}.{name}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=random)
            tensors[f"{part}.{name}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=random) * 0.3
    save_file(tensors, path, metadata=None if metadata is None else dict(metadata))
    return path


def write_kohya_lora(path: Path, pipeline: Any, seed: int, rank: int = 4) -> Path:
    """Write a LoRA of the denoiser as kohya's trainer names it."""
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, weight in layers_of(getattr(pipeline, denoiser_of(pipeline))).items():
        start = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{start}.lora_down.weight"] = torch.randn(rank, weight.shape[1], generator=random)
        tensors[f"{start}.lora_up.weight"] = torch.randn(weight.shape[0], rank, generator=random) * 0.3
        tensors[f"{start}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)
    return path
