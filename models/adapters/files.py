"""LoRA files: what a directory holds, and whether one fits a pipeline, from the headers of safetensors files alone.

Nothing here imports torch: the API process refuses what cannot fit before a job is queued.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from pydantic import ConfigDict

NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
SUFFIX: Final = ".safetensors"
NO_ADAPTERS: Final = frozenset({"PRXPipeline", "DiffusionPipeline"})
"""Pipelines of `giantleap.models.generation.families.FAMILIES` into which diffusers loads no LoRA."""
_MAX_HEADER_BYTES: Final = 16 << 20
_DENOISERS: Final = ("unet", "transformer")
_DOWN: Final = re.compile(r"\.(lora_A|lora_down|lora\.down)(\.default)?\.weight$")
_UP: Final = re.compile(r"\.(lora_B|lora_up|lora\.up)(\.default)?\.weight$")
# The start of what trainers write for the base model (`modelspec.architecture`, `ss_base_model_version`), in small
# letters, and the pipelines that it fits.
_BASES: Final[Mapping[str, tuple[str, ...]]] = {
    "stable-diffusion-v1": ("StableDiffusionPipeline",),
    "stable-diffusion-v2": ("StableDiffusionPipeline",),
    "sd_v": ("StableDiffusionPipeline",),
    "stable-diffusion-xl": ("StableDiffusionXLPipeline",),
    "sdxl": ("StableDiffusionXLPipeline",),
    "stable-diffusion-3": ("StableDiffusion3Pipeline",),
    "sd3": ("StableDiffusion3Pipeline",),
    "flux-1": ("FluxPipeline", "FluxKontextPipeline"),
    "flux1": ("FluxPipeline", "FluxKontextPipeline"),
    "flux-2": ("Flux2Pipeline", "Flux2KleinPipeline"),
    "flux2": ("Flux2Pipeline", "Flux2KleinPipeline"),
    "qwen-image": ("QwenImagePipeline", "QwenImage21Pipeline"),
    "z-image": ("ZImagePipeline",),
    "zimage": ("ZImagePipeline",),
    "sana": ("SanaPipeline", "SanaSprintPipeline"),
}

Shape = tuple[int, ...]


class AdapterError(ValueError):
    """A LoRA that cannot be read, or that does not fit the pipeline."""


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One LoRA of a job: the file that the API read, by its digest, and its weight."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: str
    weight: float
    sha256: str

    @property
    def key(self) -> str:
        """Its name within a pipeline, where a name may hold no dot."""
        return f"a{self.sha256[:24]}"

    @property
    def at_full_weight(self) -> Self:
        """The same file at weight 1: a loaded adapter serves every weight."""
        return replace(self, weight=1.0)


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A LoRA file as its header describes it.

    Args:
        name: The file's name without its suffix.
        sha256: Of the whole file.
        size_bytes: Of the file.
        rank: The largest of its layers.
        base: The base model as the trainer named it; None where the file does not say.
        layers: Input and output features of each layer, as the file names it.
    """

    name: str
    sha256: str
    size_bytes: int
    rank: int
    base: str | None
    layers: Mapping[str, tuple[int, int]]

    def use(self, weight: float) -> AdapterUse:
        """The file as a job names it."""
        return AdapterUse(self.name, weight, self.sha256)


def read_directory(directory: Path) -> dict[str, AdapterFile]:
    """The LoRA files of a directory, by name.

    Raises:
        AdapterError: There is no such directory, or a safetensors file in it is no LoRA or is named otherwise.
    """
    return {name: read_file(path) for name, path in find_files(directory).items()}


def find_files(directory: Path) -> dict[str, Path]:
    """The safetensors files of a directory, by name without the suffix.

    Raises:
        AdapterError: There is no such directory.
    """
    if not directory.is_dir():
        raise AdapterError(f"lora_dir: {directory} is no directory; create it, or name another one")
    return {path.name.removesuffix(SUFFIX): path for path in sorted(directory.glob(f"*{SUFFIX}"))}


def read_file(path: Path) -> AdapterFile:
    """Read the header and the digest of one file.

    Raises:
        AdapterError: It is no LoRA, or its name has other characters than letters, digits, dots, dashes, underscores.
    """
    name = path.name.removesuffix(SUFFIX)
    if not re.fullmatch(NAME_PATTERN, name):
        raise AdapterError(f"{path}: a LoRA's name has 1 to 64 letters, digits, dots, dashes, underscores; rename it")
    header = _read_header(path)
    metadata = header.pop("__metadata__", {})
    shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
    downs = _downs(shapes)
    ups = {_UP.sub("", key): shape for key, shape in shapes.items() if _UP.search(key)}
    if not downs or downs.keys() != ups.keys() or any(len(shape) < 2 for shape in (*downs.values(), *ups.values())):
        raise AdapterError(
            f"{path}: no LoRA in safetensors: it has no pairs of lora_A and lora_B, or lora_down and _up"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return AdapterFile(
        name=name,
        sha256=digest,
        size_bytes=path.stat().st_size,
        rank=max(shape[0] for shape in downs.values()),
        base=metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version"),
        layers={layer: (downs[layer][1], ups[layer][0]) for layer in downs},
    )


def largest_rank(paths: Iterable[Path]) -> int:
    """The largest rank of any layer of some LoRA files.

    Raises:
        AdapterError: One is no safetensors file.
    """
    headers = [_read_header(path) for path in paths]
    shapes = [{key: tuple(entry["shape"]) for key, entry in each.items() if key != "__metadata__"} for each in headers]
    return max((shape[0] for each in shapes for shape in _downs(each).values()), default=1)


def _downs(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {_DOWN.sub("", key): shape for key, shape in shapes.items() if _DOWN.search(key)}


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_MAX_HEADER_BYTES, path.stat().st_size):
                raise AdapterError(f"{path}: no safetensors file; convert it, or remove it")
            header = json.loads(file.read(length))
    except OSError as error:
        raise AdapterError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise AdapterError(f"{path}: no safetensors file; convert it, or remove it") from error
    if not isinstance(header, dict):
        raise AdapterError(f"{path}: no safetensors file; convert it, or remove it")
    return header


def read_denoiser(pipeline: Path) -> dict[str, Shape]:
    """Shapes of the denoiser's weights in a pipeline's directory, by name; empty where it has no safetensors files."""
    shapes: dict[str, Shape] = {}
    for folder in _DENOISERS:
        for path in sorted((pipeline / folder).glob(f"*{SUFFIX}")):
            header = _read_header(path)
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def misfit(adapter: AdapterFile, pipeline_class: str, denoiser: Mapping[str, Shape]) -> str:
    """Why a LoRA cannot run in a pipeline, as far as its file says; empty if there is no reason.

    Layers are compared where they are named as in diffusers, or as by kohya for diffusers' names. Others are loaded by
    diffusers, which renames them, and are refused there.
    """
    if pipeline_class in NO_ADAPTERS:
        return f"diffusers loads no LoRA into {pipeline_class}"
    if adapter.base is not None:
        start = next((each for each in _BASES if adapter.base.lower().startswith(each)), None)
        if start is not None and pipeline_class not in _BASES[start]:
            return f"it is made for {adapter.base[:40]}, not for {pipeline_class}"
    if not denoiser:
        return ""
    dotted = {name.removesuffix(".weight"): shape for name, shape in denoiser.items() if len(shape) >= 2}
    flat = {name.replace(".", "_"): shape for name, shape in dotted.items()}
    by_diffusers = _compare(adapter, [f"{each}." for each in _DENOISERS], dotted)
    by_kohya = _compare(adapter, ["lora_unet_", "lora_transformer_"], flat)
    if by_kohya.startswith("none"):
        by_kohya = ""  # the names of another code base
    return by_diffusers or by_kohya


def _compare(adapter: AdapterFile, starts: list[str], modules: Mapping[str, Shape]) -> str:
    layers = {
        layer.removeprefix(start): features
        for layer, features in adapter.layers.items()
        for start in starts
        if layer.startswith(start)
    }
    known = layers.keys() & modules.keys()
    if layers and not known:
        return "none of its layers is in this model"
    for layer in sorted(layers):
        if layer not in modules:
            return f"its layer {layer[:80]} is not in this model"
        expected = (modules[layer][1], modules[layer][0])
        if layers[layer] != expected:
            return f"its layer {layer[:80]} is for {layers[layer]} features in and out, and this model's has {expected}"
    return ""
