"""LoRA files for tests: random pairs of low-rank factors for layers of a real network, named as trainers name them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
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
        down = torch.randn(rank, weight.shape[1], generator=random)
        tensors |= _kohya_layer(start, down, torch.randn(weight.shape[0], rank, generator=random) * 0.3)
    save_file(tensors, path)
    return path


def write_sgm_copy(source: Path, target: Path, layers_per_block: int) -> Path:
    """Copy a LoRA of SDXL's UNet with the names that kohya's trainer takes from the original code (sgm)."""

    def rename(name: str) -> str:
        per_block = layers_per_block + 1
        name = re.sub(
            r"^down_blocks\.(\d)\.attentions\.(\d)",
            lambda found: f"input_blocks.{int(found[1]) * per_block + int(found[2]) + 1}.1",
            name.removeprefix("unet."),
        )
        name = re.sub(
            r"^up_blocks\.(\d)\.attentions\.(\d)",
            lambda found: f"output_blocks.{int(found[1]) * per_block + int(found[2])}.1",
            name,
        )
        return "lora_unet_" + name.replace("mid_block.attentions.0", "middle_block.1").replace(".", "_")

    tensors = {}
    for name, tensor in load_file(source).items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        tensors[f"{rename(layer)}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor
        if part == "lora_A":
            tensors[f"{rename(layer)}.alpha"] = torch.tensor(float(len(tensor)))
    save_file(tensors, target)
    return target


def write_flux_in_both_layouts(
    directory: Path, pipeline: Any, seed: int, rank: int = 4, *, fused_single: bool = False
) -> dict[str, Path]:
    """Write one LoRA of FLUX.1's first double block twice: `plain` in diffusers' names, `kohya` in kohya's.

    `fused_single` adds the fused layer of a single block to the second.
    """
    random = torch.Generator().manual_seed(seed)
    width = pipeline.transformer.inner_dim
    plain: dict[str, Tensor] = {}
    kohya: dict[str, Tensor] = {}
    layers = {
        "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn_proj": ("attn.to_out.0",),
        "img_mlp_2": ("ff.net.2",),
    }
    for name, parts in layers.items():
        features = 4 * width if "mlp" in name else width
        down = torch.randn(rank, features, generator=random)
        ups = [torch.randn(width, rank, generator=random) * 0.3 for _ in parts]
        for part, up in zip(parts, ups, strict=True):
            plain[f"transformer.transformer_blocks.0.{part}.lora_A.weight"] = down.clone()
            plain[f"transformer.transformer_blocks.0.{part}.lora_B.weight"] = up
        kohya |= _kohya_layer(f"lora_unet_double_blocks_0_{name}", down, torch.cat(ups))
    if fused_single:
        down, up = torch.randn(rank, width, generator=random), torch.randn(7 * width, rank, generator=random)
        kohya |= _kohya_layer("lora_unet_single_blocks_0_linear1", down, up)
    paths = {"plain": directory / "plain.safetensors", "kohya": directory / "kohya.safetensors"}
    save_file(plain, paths["plain"])
    save_file(kohya, paths["kohya"])
    return paths


def _kohya_layer(name: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    alpha = torch.tensor(float(len(down)))
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
