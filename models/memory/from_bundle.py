"""Reads from a bundle's files what decides the memory of its jobs: its configurations and the headers of its weights.

No weight is read and no torch is imported: the API process plans with what is found (`models/memory/plan.py`). Where
something cannot be read there is no plan, and the reason is said.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from giantleap.models.bundle.bundle import Bundle, ModelSource
from giantleap.models.lua.released_layouts import CheckpointError, to_own_layout
from giantleap.models.lua.spec import SPEC_KEY, LuaSpec
from giantleap.models.memory.activations import lua_kept_bytes
from giantleap.models.memory.plan import DeviceKind, MemoryPlan, UnknownMemoryError
from giantleap.models.vae.strip_plan import ELEMENT_BYTES

_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_TYPE_BYTES = MappingProxyType(
    {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
)
_MAX_HEADER_BYTES = 100 * 2**20  # the limit of the format
_DENOISERS = ("transformer", "unet")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_PLAIN_NAME = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True, slots=True)
class WeightHeader:
    """One tensor of a safetensors file: its shape and its type there."""

    shape: tuple[int, ...]
    dtype: str

    def size_bytes(self, dtype: str) -> int:
        """Once loaded: floats become `dtype`, the rest stays."""
        element_bytes = ELEMENT_BYTES[dtype] if self.dtype in _FLOAT_TYPES else _TYPE_BYTES.get(self.dtype, 1)
        return math.prod(self.shape) * element_bytes


def read_memory_plan(bundle: Bundle, device: DeviceKind, dtype: str, lua: LuaSpec | None = None) -> MemoryPlan:
    """What decides the memory of a bundle that lies in a directory.

    Args:
        bundle: As read by `read_bundle`.
        device: Where it will run.
        dtype: That the base model computes in there.
        lua: The spec of its LUA, where the caller knows it: a `.pth` file does not tell without torch.

    Raises:
        UnknownMemoryError: the pipeline or a VAE is a hub id, or a file is missing or not understood.
    """
    parts = _find_parts(bundle)
    configs = {name: _read_json(path / "config.json") for name, path in parts.items()}
    space = bundle.latent_space
    vae_dtype = choose_vae_dtype(configs["vae"].get("force_upcast"), space.channels, dtype)
    part_bytes = {
        name: _part_bytes(path, configs[name], vae_dtype if name == "vae" else dtype, bundle.variant)
        for name, path in parts.items()
    }
    weights_bytes = sum(part_bytes.values())
    vae_weights_bytes = part_bytes["vae"]
    base_bytes = weights_bytes - vae_weights_bytes
    tiny = None
    if bundle.tiny_vae is not None:
        directory = _directory(bundle, bundle.tiny_vae, "tiny_vae")
        tiny = _read_json(directory / "config.json")
        weights_bytes += _part_bytes(directory, tiny, dtype, None)
    swinir = {scale: _read_upscaler(path) for scale, path in bundle.swinir.items()}
    weights_bytes += sum(size_bytes for _, size_bytes in swinir.values())
    if bundle.lua is not None:
        lua, lua_size_bytes = _read_upscaler(bundle.lua, lua)
        weights_bytes += lua_size_bytes
    return MemoryPlan(
        name=bundle.name,
        device=device,
        dtype=dtype,
        vae_dtype=vae_dtype,
        weights_bytes=weights_bytes,
        stride_px=space.stride_px,
        side_multiple=space.side_multiple,
        channels=space.channels,
        denoiser=next(configs[name] for name in _DENOISERS if name in configs),
        text_encoders=tuple(configs[name] for name in _TEXT_ENCODERS if name in configs),
        vae=configs["vae"],
        tiny=tiny,
        lua=lua,
        swinir={scale: spec for scale, (spec, _) in swinir.items() if spec is not None},
        base_bytes=base_bytes,
        vae_weights_bytes=vae_weights_bytes,
    )


def choose_vae_dtype(force_upcast: bool | None, latent_channels: int, dtype: str) -> str:
    """As `giantleap.models.vae.autoencoder.choose_vae_dtype`, by name."""
    if dtype != "float16" or force_upcast is False:
        return dtype
    return "float32" if latent_channels == 4 else "bfloat16"


def read_header(path: Path) -> tuple[dict[str, WeightHeader], dict[str, str]]:
    """Names, shapes and types of a safetensors file's tensors, and its metadata; no weight is read.

    Raises:
        UnknownMemoryError: the file is missing or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise UnknownMemoryError(f"{path}: no safetensors file: its header would have {length} bytes")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        return {name: WeightHeader(tuple(said["shape"]), said["dtype"]) for name, said in header.items()}, metadata
    except UnknownMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnknownMemoryError(f"{path}: cannot be read as a safetensors file ({type(error).__name__})") from error


def _find_parts(bundle: Bundle) -> dict[str, Path]:
    """The directories of the pipeline's models by name, among them a denoiser and the VAE that decodes."""
    pipeline = _directory(bundle, ModelSource(bundle.pipeline, bundle.revision), "pipeline")
    index = _read_json(pipeline / "model_index.json")
    parts = {
        name: pipeline / name
        for name, value in index.items()
        if isinstance(value, list) and None not in value and (pipeline / name / "config.json").is_file()
    }
    if bundle.vae is not None:
        parts["vae"] = _directory(bundle, bundle.vae, "vae")
    if "vae" not in parts or not any(name in parts for name in _DENOISERS):
        raise UnknownMemoryError(f"bundle {bundle.name}: {pipeline} has no UNet or transformer, or no VAE")
    return parts


def _directory(bundle: Bundle, source: ModelSource, key: str) -> Path:
    if isinstance(source.place, Path):
        return source.place
    raise UnknownMemoryError(
        f"bundle {bundle.name}: {key} is {source.place} on the hub; `giantleap bundle pull` brings it here"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownMemoryError(f"{path}: cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise UnknownMemoryError(f"{path}: no JSON object")
    return content


def _part_bytes(directory: Path, config: Mapping[str, Any], dtype: str, variant: str | None) -> int:
    """Bytes of one model once loaded in `dtype`."""
    files = [path for path in directory.glob("*.safetensors") if not path.name.startswith(".")]
    marked = [path for path in files if variant and re.search(rf"\.{re.escape(variant)}[.-]", path.name)]
    chosen = marked or [path for path in files if _PLAIN_NAME.fullmatch(path.name)]
    if not chosen:
        raise UnknownMemoryError(f"{directory} holds no weights")
    keeps_full = dtype == "float16" and "d_model" in config  # transformers keeps these of T5 in float32 then
    return sum(
        weight.size_bytes("float32" if keeps_full and ".wo." in name else dtype)
        for path in chosen
        for name, weight in read_header(path)[0].items()
    )


def _read_upscaler(path: Path, known: LuaSpec | None = None) -> tuple[LuaSpec | None, int]:
    """The spec of a LUA or SwinIR, and the bytes that it holds: its weights in float32 and what it keeps between calls.

    Only safetensors files tell their spec; of another one it is `known`, else what is kept counts nothing.
    """
    if path.suffix == ".safetensors":
        found, size_bytes = _read_upscaler_header(path)
    else:
        found, size_bytes = None, path.stat().st_size
    spec = known or found
    return spec, size_bytes + (0 if spec is None else lua_kept_bytes(spec))


def _read_upscaler_header(path: Path) -> tuple[LuaSpec, int]:
    weights, metadata = read_header(path)
    try:
        spec = LuaSpec.from_json(metadata[SPEC_KEY]) if SPEC_KEY in metadata else None
        if spec is None:
            spec, weights = to_own_layout(weights)
    except (CheckpointError, ValueError) as error:
        raise UnknownMemoryError(f"{path}: {error}") from error
    return spec, sum(weight.size_bytes("float32") for weight in weights.values())
