"""`[modes]` of `bundle.toml`: how a pipeline trades memory, time and exactness, and which modes exclude each other.

Nothing here imports torch: an API process refuses what cannot work before a job is queued.
`giantleap.models.generation.modes` applies the modes and checks what depends on the machine.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from giantleap.models.constraints import explain

Quantization = Literal["none", "bnb4", "bnb8", "int8", "fp8", "gguf"]
Attention = Literal[
    "native",
    "_native_math",
    "_native_efficient",
    "_native_flash",
    "_native_cudnn",
    "flash",
    "_flash_3",
    "sage",
    "xformers",
]

# As the classes are in diffusers 0.42; tests/models/generation/test_modes.py compares each list with them.
STEP_CACHED: Final = frozenset({"FluxPipeline", "QwenImagePipeline"})
CHOOSES_ATTENTION: Final = STEP_CACHED | {
    "FluxKontextPipeline",
    "Flux2Pipeline",
    "Flux2KleinPipeline",
    "QwenImage21Pipeline",
    "ZImagePipeline",
    "PRXPipeline",
}
HAS_BLOCKS: Final = (CHOOSES_ATTENTION - {"PRXPipeline"}) | {"StableDiffusionPipeline", "StableDiffusionXLPipeline"}
COMPILED_VAES: Final = frozenset({"AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC"})
"""The others decode frames with Python lists as state, which the compiler follows badly: they become slower."""
INDEX: Final = "model_index.json"
_DENOISERS: Final = ("transformer", "unet")
_HOOKED: Final[Mapping[str, tuple[str, ...]]] = {
    "none": (),
    "blocks": ("hidiffusion",),  # in the attention of the blocks; those of scalecrafter are between them
    "full": ("hidiffusion", "scalecrafter"),
}


class Modes(BaseModel):
    """`[modes]`. Without it nothing is quantized, moved, compiled or skipped.

    Args:
        quantize: Precision of the weights of components: bitsandbytes (`bnb4`, `bnb8`), torchao (`int8`, `fp8`), or a
            `.gguf` file in the component's directory.
        storage: `fp8` stores the denoiser's weights in 8 bits and computes each layer in the pipeline's dtype.
        offload: Keeps weights in host memory: `model` moves one component at a time to the GPU, `group` one layer.
        attention: A backend of diffusers.
        compile: The denoiser's repeated `blocks`, or all of it (`full`).
        compile_vae: Compiles the VAE's decoder.
        cache: `first_block` skips the other blocks of a step whose first block changed by less than `cache_threshold`.
        cache_threshold: A share of the first block's change in the step before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    quantize: dict[str, Quantization] = Field(default_factory=dict)
    storage: Literal["none", "fp8"] = "none"
    offload: Literal["none", "model", "group"] = "none"
    attention: Attention = "native"
    compile: Literal["none", "blocks", "full"] = "none"
    compile_vae: bool = False
    cache: Literal["none", "first_block"] = "none"
    cache_threshold: float = Field(default=0.05, gt=0, lt=1)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        quantized = [name for name in _DENOISERS if name in self.quantized]
        if quantized and self.storage != "none":
            raise ValueError(f"storage {self.storage} excludes quantize.{quantized[0]}; choose one")
        if self.compile != "none" and self.offload == "group":
            raise ValueError("offload group moves layers inside compiled ones; choose offload model, or compile none")
        if self.compile == "full" and self.offload != "none":
            raise ValueError("compile full excludes offload; choose compile blocks")
        if self.compile == "full" and self.cache != "none":
            raise ValueError("compile full excludes a cache, which skips blocks; choose compile blocks")
        return self

    @property
    def quantized(self) -> dict[str, Quantization]:
        """The quantized components."""
        return {name: how for name, how in self.quantize.items() if how != "none"}

    @property
    def named(self) -> dict[str, str]:
        """The modes that are on, by name, such as `quantize.transformer`."""
        plain = {name: str(getattr(self, name)) for name in ("storage", "offload", "attention", "compile")}
        plain = {name: value for name, value in plain.items() if value not in ("none", "native")}
        components = {f"quantize.{name}": str(how) for name, how in self.quantized.items()}
        vae = {"compile_vae": "true"} if self.compile_vae else {}
        cache = {} if self.cache == "none" else {"cache": self.cache, "cache_threshold": f"{self.cache_threshold:g}"}
        return components | plain | vae | cache

    @property
    def cache_note(self) -> str:
        """The warning for clients about a cache, which changes images; empty without one."""
        if self.cache == "none":
            return ""
        return (
            f"generated with the step cache {self.cache} at threshold {self.cache_threshold:g}, which changes the image"
        )

    def with_values(self, given: Mapping[str, str]) -> Self:
        """These modes with other values, named as in `named`.

        Raises:
            ValueError: A name or a value is unknown, or values exclude each other.
        """
        values: dict[str, Any] = self.model_dump(exclude_unset=True)
        for name, value in given.items():
            mode, dot, component = name.partition(".")
            values[mode] = {**values.get(mode, {}), component: value} if dot else value
        try:
            return self.model_validate(values, strict=False)
        except ValidationError as error:
            raise ValueError("; ".join(_to_line(each["loc"], explain(each)) for each in error.errors())) from None

    def misfit(self, index: Mapping[str, Any], vae_class: str) -> str:
        """Why a pipeline cannot have these modes; empty if it can.

        Args:
            index: The content of its `model_index.json`.
            vae_class: Class of the VAE that decodes.
        """
        pipeline = str(index.get("_class_name", ""))
        for name in self.quantized:
            part = index.get(name)
            if not isinstance(part, list) or name in ("vae", "scheduler") or part[0] is None:
                return f"quantize.{name}: {pipeline} has no such network; name its transformer or a text encoder"
            if self.quantized[name] == "gguf" and part[0] != "diffusers":
                return f"quantize.{name}: diffusers reads gguf for a transformer only; choose bnb4 or int8"
        known = {"cache": STEP_CACHED, "attention": CHOOSES_ATTENTION}
        known |= {"compile": HAS_BLOCKS} if self.compile == "blocks" else {}
        for mode, classes in known.items():
            if mode in self.named and pipeline not in classes:
                value = self.named[mode]
                return f"{mode} {value}: diffusers has it for {', '.join(sorted(classes))}; this is a {pipeline}"
        if self.compile_vae and vae_class not in COMPILED_VAES:
            return f"compile_vae: a compiled {vae_class} is slower; leave it out"
        return ""

    def method_misfit(self, method: str) -> str:
        """Why a method cannot run in these modes; empty if it can."""
        if method in _HOOKED[self.compile]:
            return f"{method} hooks into the UNet, which compile {self.compile} ignores: set modes.compile to none"
        return ""

    @property
    def lora_misfit(self) -> str:
        """Why LoRAs cannot act in these modes; empty if they can."""
        if self.storage == "none":
            return ""
        return f"weights stored as {self.storage} take no LoRA; with modes.quantize they do"


def _to_line(place: Sequence[int | str], reason: str) -> str:
    """An invalid mode. The message does not repeat unknown text, because a setting may hold a secret by mistake."""
    if place and place[0] not in Modes.model_fields:
        return f"a name is not that of a mode; there are {', '.join(Modes.model_fields)}"
    return f"{place[0]} {reason}" if place else reason


PLAIN: Final = Modes()


def read_misfit(modes: Modes, pipeline: Path | str, vae: Path | None) -> str:
    """Why the pipeline in a directory cannot have these modes; empty if it can (`Modes.misfit`).

    Args:
        modes: The modes.
        pipeline: Its directory; a hub id for one that was not pulled, of which nothing is known yet.
        vae: The directory of the VAE that decodes.
    """
    if isinstance(pipeline, str) or vae is None or not modes.named:
        return ""
    index, config = (json.loads(path.read_text("utf-8")) for path in (pipeline / INDEX, vae / "config.json"))
    return modes.misfit(index, str(config.get("_class_name", "")))
