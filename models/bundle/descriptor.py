"""The form of `bundle.toml`: one frozen model per section, and the rules within and between sections.

`models/bundle/bundle.py` reads the file and checks it against the files beside it.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from giantleap.models.bundle.modes import Modes
from giantleap.models.constraints import explain
from giantleap.models.latent_space import LATENT_SPACES, LatentSpace, Packing
from giantleap.models.lua.spec import is_whole, scaled_size, to_scale
from giantleap.models.messages import toml_fault

Rediffusion = Literal["rectifiedhr", "hidiffusion", "demofusion", "lsrna", "scalecrafter"]
REDIFFUSION: tuple[Rediffusion, ...] = get_args(Rediffusion)
# One flat list, so that a refusal of pydantic names all of them once.
Method = Literal[
    "lua", "direct", "bicubic", "swinir", "rectifiedhr", "hidiffusion", "demofusion", "lsrna", "scalecrafter"
]
NEEDS_DECODER: tuple[Rediffusion, ...] = ("rectifiedhr", "lsrna")  # within generation
METHODS: tuple[Method, ...] = get_args(Method)
BICUBIC_SCALES = (2, 4)
DecodeName = Literal["exact", "tiled", "tiny"]
DtypeName = Literal["float32", "bfloat16", "float16"]

# What the API must know of a pipeline class unloaded; `FAMILIES` in `models/generation/families.py` has the rest.
NO_NEGATIVE_PROMPT = frozenset(
    {"FluxPipeline", "FluxKontextPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "SanaSprintPipeline"}
)
HAS_UNET = frozenset({"StableDiffusionPipeline", "StableDiffusionXLPipeline"})
SAMPLES_AGAIN = HAS_UNET | {"SanaPipeline"}
IMAGE_TO_IMAGE = frozenset(
    {
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "QwenImagePipeline",
        "SanaSprintPipeline",
        "ZImagePipeline",
    }
)
UNET_INPAINT_CHANNELS = 4  # the inpaint pipelines of diffusers take no other latents for a UNet
# The most pixels of a base image with a mask; None for any.
INPAINTING: dict[str, int | None] = {
    "StableDiffusionPipeline": None,
    "StableDiffusionXLPipeline": None,
    "StableDiffusion3Pipeline": None,
    "FluxPipeline": None,
    "Flux2KleinPipeline": 1024 * 1024,
    "QwenImagePipeline": None,
    "ZImagePipeline": None,
}
# The most reference images.
REFERENCES = {"FluxKontextPipeline": 1, "Flux2Pipeline": 8, "Flux2KleinPipeline": 8}
SHORT_SCHEDULES = frozenset({"LCMScheduler", "TCDScheduler"})  # they run at most 50 steps
REFINING = frozenset(
    {
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "QwenImagePipeline",
        "QwenImage21Pipeline",
        "ZImagePipeline",
        "PRXPipeline",
        "SanaPipeline",
    }
)

Side = Annotated[int, Field(ge=1)]
Scale = Annotated[float, AfterValidator(to_scale), PlainSerializer(to_scale, return_type=Any)]  # a float would say 2.0
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(min_length=1)]
Floats = Annotated[tuple[float, ...], Field(strict=False)]


class DescriptorError(ValueError):
    """A `bundle.toml` that cannot be read; the message names every key that is wrong."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class About(_Section):
    """`[bundle]`: `provenance` states where the weights come from and what they were trained on.

    `license_notes` states what the licenses require of whoever serves the bundle, beyond their names.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    title: Text
    license: Text
    provenance: Text
    license_notes: Text | None = None


class Source(_Section):
    """A directory inside the bundle, or a hub id with a revision (commit or branch) that `bundle pull` resolves.

    `variant` selects weight files as in `from_pretrained`.
    """

    path: Text | None = None
    hub_id: Text | None = None
    revision: Text | None = None
    variant: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_]+$")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("give either path or hub_id")
        if (self.hub_id is None) != (self.revision is None):
            raise ValueError("revision is required with hub_id, and only there")
        return self


class PipelineSource(Source):
    """`[pipeline]`: the diffusers pipeline.

    `dtype` is the base model's type on a GPU, unless the settings name one. `scheduler` is a scheduler class of
    diffusers to use in place of the pipeline's own, with the same configuration.
    """

    dtype: DtypeName | None = None
    scheduler: str | None = Field(default=None, pattern=r"^[A-Z][A-Za-z0-9]*Scheduler$")


class VaeSource(Source):
    """`[vae]`, used in place of the pipeline's own VAE, and `[tiny_vae]`, an AutoencoderTiny for previews."""


class LatentSpaceSource(_Section):
    """`[latent_space]`: the name of a known family alone, or a new name with all numbers."""

    name: Text
    channels: int | None = None
    stride_px: int | None = None
    scale: float | None = None
    shift: float = 0.0
    packing: Packing = "none"
    mean: Floats | None = None
    std: Floats | None = None
    side_multiple: int = 1
    statistics_in_vae: bool = False

    @model_validator(mode="after")
    def _known_or_complete(self) -> Self:
        self.to_latent_space()
        return self

    def to_latent_space(self) -> LatentSpace:
        """The latent space of the section.

        Raises:
            ValueError: The name is unknown and numbers are missing, or it is known and has numbers as well.
        """
        if self.name in LATENT_SPACES:
            if self.model_fields_set != {"name"}:
                raise ValueError(f"{self.name} is a known family: leave its numbers out, or choose another name")
            return LATENT_SPACES[self.name]
        if self.channels is None or self.stride_px is None or self.scale is None:
            raise ValueError(
                f"{self.name} is none of the known families {sorted(LATENT_SPACES)}: give channels, stride_px and scale"
            )
        return LatentSpace(**self.model_dump())


class LuaFile(_Section):
    """`[lua]`: the weights inside the bundle, the scale heads that they must have, and their digest.

    With a LIIF head, `scales` are the scales to serve, whole or not. `clamp_sigmas` bounds outputs by the statistics in
    the weights' header (`models/lua/clamp.py`); without it there is no bound.
    """

    file: Text
    scales: Annotated[tuple[Scale, ...], Field(strict=False, min_length=1)]
    sha256: Digest
    clamp_sigmas: float | None = Field(default=None, gt=0)


class LuaSource(_Section):
    """`[lua_source]`: the origin of LUA weights that are not in the bundle: a file on the hub, or training.

    `train` names the commands that train them.
    """

    hub_id: Text | None = None
    revision: Text | None = None
    file: Text | None = None
    scales: Annotated[tuple[int, ...], Field(strict=False, min_length=1)] | None = None
    train: Text | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        present = [value is not None for value in (self.hub_id, self.revision, self.file, self.scales)]
        if any(present) if self.train is not None else not all(present):
            raise ValueError("give either train, or all of hub_id, revision, file and scales")
        return self


class SwinirFiles(_Section):
    """`[swinir]`: pixel upscalers inside the bundle, one file per scale, in SwinIR's single-head layout."""

    x2: Text | None = None
    x4: Text | None = None

    @model_validator(mode="after")
    def _some_file(self) -> Self:
        if not self.by_scale():
            raise ValueError("give x2, x4 or both")
        return self

    def by_scale(self) -> dict[int, str]:
        """Path in the bundle by scale."""
        return {scale: name for scale, name in ((2, self.x2), (4, self.x4)) if name is not None}


class PreviewFile(_Section):
    """`[preview]`: a linear map from latents to colors inside the bundle, for previews without a tiny VAE."""

    file: Text


class Defaults(_Section):
    """`[defaults]`: values of a request that does not set them. A bundle without `[lua]` must name its method."""

    steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    base_width_px: Side
    base_height_px: Side
    scale: Scale = 2
    method: Method = "lua"


class Limits(_Section):
    """`[limits]`: of the base image, before upscaling; `max_direct_px` of an image generated at its final size."""

    min_base_px: Side
    max_base_px: Side
    multiple_px: Side
    max_steps: int = Field(ge=1)
    max_direct_px: Side | None = None

    @model_validator(mode="after")
    def _some_size(self) -> Self:
        if self.max_direct_px is not None and self.max_direct_px < self.max_base_px:
            raise ValueError(f"max_direct_px {self.max_direct_px} is less than max_base_px {self.max_base_px}")
        if -(-self.min_base_px // self.multiple_px) > self.max_base_px // self.multiple_px:
            raise ValueError(f"no multiple of {self.multiple_px} from {self.min_base_px} to {self.max_base_px}")
        return self


class Vocabulary(_Section):
    """`[vocabulary]`: closed if the model only knows words that are one token of the tokenizer."""

    closed: bool


class Descriptor(_Section):
    """The whole of `bundle.toml`.

    `[files]` has the SHA-256 of each weight file by its path in the bundle; `[origin]`, written by `bundle pull`, the
    hub repositories and commits of the parts.
    """

    bundle: About
    pipeline: PipelineSource
    vae: VaeSource | None = None
    tiny_vae: VaeSource | None = None
    latent_space: LatentSpaceSource
    lua: LuaFile | None = None
    lua_source: LuaSource | None = None
    swinir: SwinirFiles | None = None
    preview: PreviewFile | None = None
    defaults: Defaults
    limits: Limits
    vocabulary: Vocabulary
    modes: Modes = Field(default_factory=Modes)
    origin: dict[str, str] = Field(default_factory=dict)
    files: dict[str, Digest] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        space, limits, defaults = self.latent_space.to_latent_space(), self.limits, self.defaults
        if limits.multiple_px % space.multiple_px:
            raise ValueError(
                f"limits.multiple_px {limits.multiple_px} is no multiple of {space.multiple_px}, "
                f"which {space.name} needs"
            )
        for side in (defaults.base_width_px, defaults.base_height_px):
            if nearest_sides(side, limits) != (side, side):
                raise ValueError(f"defaults: a base side of {side} px does not keep to the limits")
        if defaults.steps > limits.max_steps:
            raise ValueError(f"defaults.steps {defaults.steps} exceeds limits.max_steps {limits.max_steps}")
        if self.lua is not None and self.files.get(self.lua.file, self.lua.sha256) != self.lua.sha256:
            raise ValueError(f"lua.sha256 and the entry of {self.lua.file} in files differ")
        for scale, name in ({} if self.swinir is None else self.swinir.by_scale()).items():
            if name not in self.files:
                raise ValueError(f"swinir.x{scale}: {name} has no digest in files")
        if self.preview is not None and self.preview.file not in self.files:
            raise ValueError(f"preview.file: {self.preview.file} has no digest in files")
        self._check_default_method()
        for factor in () if self.lua is None else self.lua.scales:
            if not all(is_whole(side_px // space.multiple_px, factor) for side_px in self._base_sides_px):
                raise ValueError(f"lua.scales: {factor} makes no whole latents of the default base size")
        return self

    @property
    def _base_sides_px(self) -> tuple[int, int]:
        return self.defaults.base_width_px, self.defaults.base_height_px

    def _check_default_method(self) -> None:
        method, scale = self.defaults.method, self.defaults.scale
        if reason := self.unavailable_reason(method):
            raise ValueError(f"defaults.method is {method}, but {reason}; name another of {', '.join(self.methods)}")
        scales = self.scales_of(method)
        if scale not in scales:
            raise ValueError(f"defaults.scale {scale} is not among the scales {scales} of method {method}")
        for side_px in (scaled_size(side, scale) for side in self._base_sides_px):
            if method == "direct" and side_px > (self.limits.max_direct_px or 0):
                raise ValueError(f"defaults: {side_px} px exceed limits.max_direct_px {self.limits.max_direct_px}")

    @property
    def methods(self) -> tuple[Method, ...]:
        """The upscaling methods of this bundle."""
        return tuple(method for method in METHODS if not self.unavailable_reason(method))

    def unavailable_reason(self, method: Method) -> str:
        """Why a method is not available, and what to do; empty if it is."""
        name = self.bundle.name
        if method in ("lua", "lsrna") and self.lua is None:
            return f"bundle {name} has no LUA weights: {self._lua_advice()}"
        if method == "swinir" and self.swinir is None:
            return f"bundle {name} has no SwinIR weights: name files in [swinir] of its bundle.toml"
        if method == "direct" and self.limits.max_direct_px is None:
            return f"the base model of bundle {name} generates no large images: limits.max_direct_px is not set"
        return ""

    @property
    def previews_unavailable(self) -> str:
        """Why no previews can be made, and what to do; empty if they can."""
        if self.tiny_vae is not None or self.preview is not None:
            return ""
        return f"bundle {self.bundle.name} has no [tiny_vae] and no [preview]; `giantleap bundle make` fits one"

    def _lua_advice(self) -> str:
        source = self.lua_source
        if source is None:
            return "its bundle.toml has no [lua]"
        if source.train is not None:
            return f"none are published for it; train your own: {source.train}"
        return f"`giantleap bundle pull {self.bundle.name}` fetches {source.file} of {source.hub_id}"

    def scales_of(self, method: Method) -> tuple[float, ...]:
        """The scales of a method, with 1, which skips upscaling; empty if the method is not available."""
        if self.unavailable_reason(method):
            return ()
        lua: set[float] = set() if self.lua is None else set(self.lua.scales)
        if method == "lua":
            return (1, *sorted(lua))
        if method == "lsrna":
            return (1, *sorted(scale for scale in lua if isinstance(scale, int)))
        if method in REDIFFUSION:
            return (1, *BICUBIC_SCALES)
        if method == "swinir" and self.swinir is not None:
            return (1, *sorted(self.swinir.by_scale()))
        return (1, *sorted(lua | set(BICUBIC_SCALES)))


def takes_mask(pipeline_class: str, channels: int) -> bool:
    """Whether a pipeline of this class, with so many channels in a raw latent, supports a mask."""
    return pipeline_class in INPAINTING and (pipeline_class not in HAS_UNET or channels == UNET_INPAINT_CHANNELS)


def smallest_steps(method: Method, scale: float) -> int:
    """The fewest denoising steps that leave one for each part of a method."""
    if scale == 1 or method not in ("rectifiedhr", "lsrna"):
        return 1
    return 3 if method == "rectifiedhr" and scale > 2 else 2


def nearest_sides(side_px: float, limits: Limits, method: Method = "lua") -> tuple[int, int]:
    """The two nearest sides that the base model generates; equal if the side is one itself or beyond the limits.

    With method "direct" the base model generates the final image, up to `limits.max_direct_px`.
    """
    step, max_px = limits.multiple_px, limits.max_base_px
    if method == "direct" and limits.max_direct_px is not None:
        max_px = limits.max_direct_px
    first, last = -(-limits.min_base_px // step), max_px // step
    less = min(max(int(side_px // step), first), last)
    more = min(max(int(-(-side_px // step)), first), last)
    return less * step, more * step


def from_toml(content: bytes) -> Descriptor:
    """Parse and check a `bundle.toml`.

    Raises:
        DescriptorError: It is not TOML in UTF-8, or has a missing, wrong or unknown key.
    """
    try:
        return Descriptor.model_validate(tomllib.loads(content.decode("utf-8-sig")))  # editors may add the mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DescriptorError(toml_fault(error)) from error
    except ValidationError as error:
        raise DescriptorError(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    def line(fault: Any) -> str:
        place = ".".join(map(str, fault["loc"]))
        found = "" if isinstance(fault["input"], dict) else f"; found {fault['input']!r:.80}"
        return f"{place}: {explain(fault)}{found}" if place else f"{explain(fault)}{found}"

    return "; ".join(line(fault) for fault in error.errors())


def to_toml(descriptor: Descriptor) -> str:
    """The text of `bundle.toml`, with only the values that were set."""
    lines: list[str] = []
    for section, values in descriptor.model_dump(mode="json", exclude_none=True, exclude_unset=True).items():
        lines += [f"[{section}]", *_to_toml_lines(values), ""]
    return "\n".join(lines)


def _to_toml_lines(values: Mapping[str, Any]) -> Sequence[str]:
    # For the types in a descriptor, TOML writes values as JSON does, and any key may be in quotes.
    keys = (key if key.isidentifier() and key.isascii() else json.dumps(key) for key in values)
    return [f"{key} = {_to_toml_value(value)}" for key, value in zip(keys, values.values(), strict=True)]


def _to_toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(_to_toml_lines(value))}}}"
    return json.dumps(value, ensure_ascii=False)
