"""The form of `bundle.toml`: one frozen model per section, and the rules that hold within and between them.

`models/bundle.py` reads the file and checks it against what lies beside it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.latent_space import LATENT_SPACES, LatentSpace

Side = Annotated[int, Field(ge=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(min_length=1)]
Floats = Annotated[tuple[float, ...], Field(strict=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class About(_Section):
    """`[bundle]`: `provenance` tells where the weights come from and what they were trained on."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    title: Text
    licence: Text
    provenance: Text


class PipelineSource(_Section):
    """`[pipeline]`: a directory inside the bundle, or a hub id at a fixed revision."""

    path: Text | None = None
    hub_id: Text | None = None
    revision: Text | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("give either path or hub_id")
        if (self.hub_id is None) != (self.revision is None):
            raise ValueError("revision is required with hub_id, and only there")
        return self


class LatentSpaceSource(_Section):
    """`[latent_space]`: the name of a known family alone, or a name of its own with all numbers."""

    name: Text
    channels: int | None = None
    stride_px: int | None = None
    scale: float | None = None
    shift: float = 0.0
    packing: Literal["none", "flux"] = "none"
    mean: Floats | None = None
    std: Floats | None = None

    @model_validator(mode="after")
    def _known_or_complete(self) -> Self:
        self.to_latent_space()
        return self

    def to_latent_space(self) -> LatentSpace:
        """The space itself.

        Raises:
            ValueError: The name is not known and numbers are missing, or it is known and has numbers as well.
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
    """`[lua]`: the weights inside the bundle, the scale heads they must have, and their digest."""

    file: Text
    scales: Annotated[tuple[int, ...], Field(strict=False, min_length=1)]
    sha256: Digest


class Defaults(_Section):
    """`[defaults]`: what a request gets that does not say."""

    steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    base_width_px: Side
    base_height_px: Side
    scale: int = 2


class Limits(_Section):
    """`[limits]`: of the base image, before upscaling."""

    min_base_px: Side
    max_base_px: Side
    multiple_px: Side
    max_steps: int = Field(ge=1)

    @model_validator(mode="after")
    def _some_size(self) -> Self:
        if -(-self.min_base_px // self.multiple_px) > self.max_base_px // self.multiple_px:
            raise ValueError(f"no multiple of {self.multiple_px} from {self.min_base_px} to {self.max_base_px}")
        return self


class Vocabulary(_Section):
    """`[vocabulary]`: closed where words that are not one token of the tokenizer mean nothing to the model."""

    closed: bool


class Descriptor(_Section):
    """The whole of `bundle.toml`. `[files]` holds the SHA-256 of each weight file by its path in the bundle."""

    bundle: About
    pipeline: PipelineSource
    latent_space: LatentSpaceSource
    lua: LuaFile
    defaults: Defaults
    limits: Limits
    vocabulary: Vocabulary
    files: dict[str, Digest]

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        space, limits, defaults = self.latent_space.to_latent_space(), self.limits, self.defaults
        unit = space.stride_px * (2 if space.packing == "flux" else 1)
        if limits.multiple_px % unit:
            raise ValueError(
                f"limits.multiple_px {limits.multiple_px} is no multiple of {unit}, which {space.name} needs"
            )
        for side in (defaults.base_width_px, defaults.base_height_px):
            if nearest_sides(side, limits) != (side, side):
                raise ValueError(f"defaults: a base side of {side} px does not keep to the limits")
        if defaults.steps > limits.max_steps:
            raise ValueError(f"defaults.steps {defaults.steps} exceeds limits.max_steps {limits.max_steps}")
        if defaults.scale not in (1, *self.lua.scales):
            raise ValueError(f"defaults.scale {defaults.scale} is not among 1 and lua.scales {self.lua.scales}")
        if self.files.get(self.lua.file, self.lua.sha256) != self.lua.sha256:
            raise ValueError(f"lua.sha256 and the entry of {self.lua.file} in files differ")
        return self


def nearest_sides(side_px: float, limits: Limits) -> tuple[int, int]:
    """The two allowed base sides around a wished one; equal where it is allowed itself or beyond the limits."""
    step = limits.multiple_px
    first, last = -(-limits.min_base_px // step), limits.max_base_px // step
    less = min(max(int(side_px // step), first), last)
    more = min(max(int(-(-side_px // step)), first), last)
    return less * step, more * step


def to_toml(descriptor: Descriptor) -> str:
    """The text of `bundle.toml`: what was set, for a known latent space refuses even its own numbers."""
    lines: list[str] = []
    for section, values in descriptor.model_dump(mode="json", exclude_none=True, exclude_unset=True).items():
        lines += [f"[{section}]", *_to_toml_lines(values), ""]
    return "\n".join(lines)


def _to_toml_lines(values: Mapping[str, Any]) -> Sequence[str]:
    # For the types in a descriptor, TOML writes values as JSON does, and any key may be in quotes.
    keys = (key if key.isidentifier() and key.isascii() else json.dumps(key) for key in values)
    return [
        f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in zip(keys, values.values(), strict=True)
    ]
