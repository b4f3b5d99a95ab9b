"""Applies the modes of a bundle (`giantleap.models.bundle.modes`) to its pipeline while it is loaded."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import GGUFQuantizationConfig, attention_backend
from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
from torch import nn

from giantleap.models.bundle.bundle import Bundle, BundleError
from giantleap.models.bundle.modes import INDEX, Modes, Quantization, read_misfit
from giantleap.models.device import compiler_fault
from giantleap.models.messages import install_hint

_PACKAGES: Mapping[str, str] = {
    "bnb4": "bitsandbytes",
    "bnb8": "bitsandbytes",
    "int8": "torchao",
    "fp8": "torchao",
    "gguf": "gguf",
    "flash": "flash_attn",
    "_flash_3": "flash_attn_interface",
    "sage": "sageattention",
    "xformers": "xformers",
}


def check_modes(bundle: Bundle, device: torch.device) -> None:
    """Check that the pipeline can have its modes and that this machine can run them.

    Raises:
        BundleError: It cannot, in one line.
    """
    modes = bundle.modes
    if isinstance(bundle.pipeline, str) and modes.named:
        raise BundleError(f"bundle {bundle.name}: modes need its files: run `giantleap bundle pull {bundle.name}`")
    fault = read_misfit(modes, bundle.pipeline, bundle.vae_directory) or machine_fault(modes, device)
    if fault:
        raise BundleError(f"bundle {bundle.name}: modes.{fault}")


def machine_fault(modes: Modes, device: torch.device) -> str:
    """Why this machine or device cannot run these modes; empty if it can."""
    for name, value in modes.named.items():
        on_gpu = value.startswith("bnb") or name == "offload" or (name == "attention" and value != "_native_math")
        if on_gpu and device.type != "cuda":
            return f"{name} {value} needs a GPU; the device is {device}: leave it out there"
        package = _PACKAGES.get(value) if name.startswith(("quantize.", "attention")) else None
        if package is not None and importlib.util.find_spec(package) is None:
            hint = install_hint("quantize") if name.startswith("quantize.") else "install it"
            return f"{name} {value} needs the package {package}; {hint}"
        if name.startswith("compile") and (fault := compiler_fault(device)):
            return f"{name} {fault}"
    return ""


def quantization(bundle: Bundle, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of `DiffusionPipeline.from_pretrained` that quantize components."""
    quantized = bundle.modes.quantized
    if not quantized or isinstance(bundle.pipeline, str):
        return {}
    index = json.loads((bundle.pipeline / INDEX).read_text("utf-8"))
    arguments: dict[str, Any] = {
        name: _read_gguf(bundle.pipeline / name, index[name][1], dtype)
        for name, how in quantized.items()
        if how == "gguf"
    }
    configs = {name: _config(how, index[name][0], dtype) for name, how in quantized.items() if how != "gguf"}
    return arguments | ({"quantization_config": PipelineQuantizationConfig(quant_mapping=configs)} if configs else {})


def _config(how: Quantization, library: str, dtype: torch.dtype) -> Any:
    """A configuration of the library that loads the component: diffusers and transformers each have their own."""
    module: Any = diffusers if library == "diffusers" else transformers
    if how == "bnb4":
        return module.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if how == "bnb8":
        return module.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return module.TorchAoConfig(Int8WeightOnlyConfig() if how == "int8" else Float8WeightOnlyConfig())


def _read_gguf(directory: Path, class_name: str, dtype: torch.dtype) -> Any:
    files = sorted(directory.glob("*.gguf"))
    if len(files) != 1:
        raise BundleError(f"{directory}: quantize gguf needs one .gguf file there; found {len(files)}")
    return getattr(diffusers, class_name).from_single_file(
        str(files[0]),
        config=str(directory),
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
        local_files_only=True,
    )


def apply_modes(pipeline: Any, modes: Modes, dtype: torch.dtype) -> None:
    """Give the denoiser of a loaded pipeline its modes."""
    denoiser: Any = denoiser_of(pipeline)
    if modes.storage == "fp8":
        denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    if modes.attention != "native":
        with attention_backend("native"):  # it puts back the default of the other pipelines in this process
            denoiser.set_attention_backend(modes.attention)
    if modes.cache == "first_block":
        denoiser.enable_cache(diffusers.FirstBlockCacheConfig(threshold=modes.cache_threshold))
    if modes.compile == "blocks":
        denoiser.compile_repeated_blocks()
    elif modes.compile == "full":
        denoiser.compile()


def denoiser_of(pipeline: Any) -> nn.Module:
    """The network that denoises."""
    network: nn.Module = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
    return network


def place(pipeline: Any, modes: Modes, device: torch.device) -> Any:
    """Put a pipeline on its device, or have its weights come there; the VAE stays there in any mode."""
    if modes.offload == "none":
        return pipeline.to(device)
    if modes.offload == "group":
        pipeline.enable_group_offload(
            device, offload_type="leaf_level", use_stream=device.type == "cuda", exclude_modules=["vae"]
        )
        return pipeline
    # The decodes of models/vae call parts of the VAE, which the hooks of a moved model do not see.
    sequence = pipeline.model_cpu_offload_seq.split("->")
    pipeline.model_cpu_offload_seq = "->".join(name for name in sequence if name != "vae")
    pipeline._exclude_from_cpu_offload = [*pipeline._exclude_from_cpu_offload, "vae"]
    pipeline.enable_model_cpu_offload(device=device)
    return pipeline
