"""The numbers that define the shape of a LUA (`models/lua/network.py`), and the named configurations."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

HeadName = Literal["pixelshuffle", "liif"]

SPEC_KEY = "giantleap.lua_spec"  # key of the spec in the header of our weight files
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
SCALES = (2, 4)
LIIF_POINTS = 16_384  # points of a LIIF head per step; at 256 wide, in float32, four corners take 64 MiB per map
_SCALE_SETS = ((2,), (4,), (2, 4))
_OPTIONAL_KEYS = frozenset({"head", "linear_skip", "shift"})  # absent in older files
_ROUNDING = 1e-6  # of a latent pixel: 4/3 of 12 is not 16 in floating point


@dataclass(frozen=True, slots=True)
class LuaSpec:
    """Everything that fixes the shape of a `Lua`; stored as JSON beside the weights.

    Args:
        channels: Channels of the latent (or 3 for RGB images).
        embed_dim: Width of the backbone.
        depths: Swin blocks per residual group; its length is the number of groups.
        num_heads: Attention heads per group; one number stands for all groups.
        window: Side of an attention window, in latent pixels.
        mlp_ratio: Hidden width of the MLP over `embed_dim`.
        num_feat: Width of the heads.
        scales: The scale heads, a subset of (2, 4); with a LIIF head the scales that it is trained at.
        conv_first_kernel: 3 as in the released weights; the paper's figure 4 draws 1.
        bicubic_skip: Adds the bicubic enlargement of the input, and starts the heads at zero. The paper has none.
        linear_skip: Adds a linear enlargement of the input, one convolution per scale (`LinearSkip`), and starts the
            heads at zero. It starts as the bicubic one; `giantleap train run` fits it to the pairs by least squares.
        image_mean: Subtracted before and added after the network, one value per channel; for RGB SwinIR files.
        latent_norm: The network carries a mean and a standard deviation per channel (`set_latent_statistics`).
        shift: Odd blocks shift their windows by half of one; False for a SwinIR built for images of one window.
        head: "pixelshuffle" for one head per scale, or "liif" for one that takes any scale (`models/lua/liif.py`).

    Raises:
        ValueError: A field is out of range or two fields contradict each other.
    """

    channels: int
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...] | int
    window: int
    mlp_ratio: float = 2.0
    num_feat: int = 64
    scales: tuple[int, ...] = SCALES
    conv_first_kernel: int = 3
    bicubic_skip: bool = False
    image_mean: tuple[float, ...] | None = None
    latent_norm: bool = False
    head: HeadName = "pixelshuffle"
    linear_skip: bool = False
    shift: bool = True

    def __post_init__(self) -> None:
        if _is_count(self.num_heads, 1):
            object.__setattr__(self, "num_heads", (self.num_heads,) * len(self.depths))
        for name, holds, rule in self._rules():
            if not holds:
                raise ValueError(f"LuaSpec.{name} must be {rule}; found {getattr(self, name)!r}")

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """The rule of each field; a later rule may rely on the earlier ones."""
        for name, minimum in (("channels", 1), ("embed_dim", 1), ("window", 2), ("num_feat", 1)):
            yield name, _is_count(getattr(self, name), minimum), f"an integer of at least {minimum}"
        yield "depths", _are_counts(self.depths), "a tuple of integers of at least 1"
        groups = len(self.depths)
        yield "num_heads", _are_counts(self.num_heads), "an integer, or a tuple of integers, of at least 1"
        yield "num_heads", len(self.layer_heads) == groups, f"one number or {groups}, one for each of depths"
        divides = all(self.embed_dim % heads == 0 for heads in self.layer_heads)
        yield "num_heads", divides, f"divisors of embed_dim {self.embed_dim}"
        yield "mlp_ratio", _is_number(self.mlp_ratio) and self.mlp_hidden >= 1, "a number that leaves a hidden width"
        yield "scales", self.scales in _SCALE_SETS, f"one of {_SCALE_SETS}"
        yield "conv_first_kernel", self.conv_first_kernel in (1, 3), "1 or 3"
        for name in ("bicubic_skip", "latent_norm", "linear_skip", "shift"):
            yield name, isinstance(getattr(self, name), bool), "true or false"
        yield "head", self.head in get_args(HeadName), f"one of {get_args(HeadName)}"
        yield "linear_skip", not (self.linear_skip and self.bicubic_skip), "false beside a bicubic_skip"
        yield "linear_skip", not (self.linear_skip and self.head == "liif"), "false beside a LIIF head"
        if self.image_mean is not None:
            numbers = isinstance(self.image_mean, tuple) and all(_is_number(value) for value in self.image_mean)
            fits = numbers and len(self.image_mean) == self.channels
            yield "image_mean", fits, f"a tuple of {self.channels} numbers"
            yield "latent_norm", not self.latent_norm, "false beside an image_mean"

    @property
    def layer_heads(self) -> tuple[int, ...]:
        """Attention heads of each residual group."""
        return self.num_heads if isinstance(self.num_heads, tuple) else (self.num_heads,) * len(self.depths)

    @property
    def has_skip(self) -> bool:
        """Whether an enlargement of the input is added to the output of the heads."""
        return self.bicubic_skip or self.linear_skip

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLP."""
        return round(self.embed_dim * self.mlp_ratio)

    def takes(self, scale: float) -> bool:
        """Whether the network upscales by a scale: a head's, or with LIIF any above 1 that keeps windows whole."""
        if self.head == "pixelshuffle":
            return scale in self.scales
        return math.isfinite(scale) and scale > 1 and is_whole(self.window, scale)

    def to_json(self) -> str:
        """The spec as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the output of `to_json`.

        Raises:
            ValueError: The text is no JSON object, or its keys are not the fields of a spec.
        """
        values = json.loads(text)
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or not set(names) - _OPTIONAL_KEYS <= set(values) <= set(names):
            raise ValueError(f"a LUA spec has the keys {names}; found {values!r:.200}")
        typed: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**typed)


def to_scale(value: float) -> float:
    """A scale in its usual notation: a whole one is an int, printed as "2" and not "2.0"."""
    return int(value) if math.isfinite(value) and value == int(value) else value


def scaled_size(side: int, scale: float) -> int:
    """`scale` times a side, in pixels of either space; rounded if that is not whole (`is_whole`)."""
    return scale * side if isinstance(scale, int) else round(scale * side)


def is_whole(side: int, scale: float) -> bool:
    """Whether `scale` times a side is a whole number of pixels."""
    return abs(scale * side - round(scale * side)) <= _ROUNDING


def _is_count(value: Any, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) > 0 and all(_is_count(v, 1) for v in values)


PRESETS: Mapping[str, LuaSpec] = MappingProxyType(
    {
        "medium": LuaSpec(16, 180, (6,) * 6, 6, window=8, num_feat=64),
        "release": LuaSpec(16, 360, (6,) * 6, 12, window=16, num_feat=256),
        "pocket": LuaSpec(24, 96, (4, 4), 3, window=8, num_feat=64, linear_skip=True, latent_norm=True),
    }
)


def preset(name: str, channels: int) -> LuaSpec:
    """The named configuration for a latent of `channels` channels.

    Raises:
        ValueError: No preset has this name.
    """
    if name not in PRESETS:
        raise ValueError(f"no LUA preset {name!r}; there are {sorted(PRESETS)}")
    return replace(PRESETS[name], channels=channels)
