"""What a pipeline's latents mean: their channels, their stride, and the way to and from raw VAE latents.

LUA and the decoder see raw latents, [batch, channels, latent_height, latent_width] as the VAE's encoder gives them,
without scaling or packing. Works on torch tensors and numpy arrays alike and imports no torch, because the API process
has none. A bundle names its space in `models/bundle.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Latent = TypeVar("Latent", Tensor, NDArray[np.floating[Any]])


class LatentSpaceError(ValueError):
    """A tensor that is no latent of the space, or numbers that describe no space."""


@dataclass(frozen=True, slots=True)
class LatentSpace:
    """One family of latents.

    A pipeline hands out `scaled = (raw - shift) * scale`; with per-channel statistics `scaled = (raw - mean) / std *
    scale`. The packing "flux" then folds each 2x2 patch into one token: [batch, h * w / 4, 4 * channels].

    Args:
        name: The family.
        channels: Of a raw latent.
        stride_px: Image pixels per latent pixel.
        scale: As above; `scaling_factor` of a diffusers VAE.
        shift: As above; `shift_factor` of a diffusers VAE.
        packing: "none" or "flux".
        mean: Per channel; only together with `std` and with no shift.
        std: Per channel; only together with `mean`.

    Raises:
        LatentSpaceError: The numbers contradict each other.
    """

    name: str
    channels: int
    stride_px: int
    scale: float
    shift: float = 0.0
    packing: Literal["none", "flux"] = "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.channels < 1 or self.stride_px < 1 or not self.scale > 0:
            raise LatentSpaceError(
                f"latent space {self.name}: channels, stride_px and scale must be positive; found {self.channels}, "
                f"{self.stride_px}, {self.scale}"
            )
        if self.packing not in ("none", "flux"):
            raise LatentSpaceError(f"latent space {self.name}: packing is none or flux; found {self.packing!r}")
        if (self.mean is None) != (self.std is None):
            raise LatentSpaceError(f"latent space {self.name}: mean and std come together; found only one of them")
        if self.mean is not None and self.std is not None:
            if not len(self.mean) == len(self.std) == self.channels or min(self.std) <= 0:
                raise LatentSpaceError(
                    f"latent space {self.name}: mean and std need {self.channels} values each, std positive ones; "
                    f"found {len(self.mean)} and {len(self.std)}"
                )
            if self.shift != 0.0:
                raise LatentSpaceError(f"latent space {self.name}: a shift of {self.shift} beside a mean per channel")

    def latent_size(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Height and width of the raw latent that a pipeline makes for an image of this size."""
        patch = 2 if self.packing == "flux" else 1
        return patch * (height_px // (patch * self.stride_px)), patch * (width_px // (patch * self.stride_px))

    def check_raw(self, shape: Sequence[int]) -> None:
        """Refuses what is no raw latent of this space.

        Raises:
            LatentSpaceError: The shape is not [batch, channels, latent_height, latent_width] with no empty side.
        """
        if len(shape) != 4 or shape[1] != self.channels or min(shape) < 1:
            form = f"[batch, {self.channels}, latent_height, latent_width]"
            raise LatentSpaceError(self._refusal("raw", form, shape))

    def check_scaled(self, shape: Sequence[int]) -> None:
        """Refuses what is no latent as the pipeline hands it out.

        Raises:
            LatentSpaceError: The shape is not that of `check_raw` or, in a packed space, [batch, tokens, 4 * channels].
        """
        if self.packing == "none":
            self.check_raw(shape)
        elif len(shape) != 3 or shape[2] != 4 * self.channels or min(shape) < 1:
            form = f"[batch, latent_height * latent_width / 4, {4 * self.channels}]"
            raise LatentSpaceError(self._refusal("scaled and packed", form, shape))

    def to_raw(self, latent: "Latent", height_px: int | None = None, width_px: int | None = None) -> "Latent":
        """From the pipeline's form to the raw one.

        Args:
            latent: As the pipeline hands it out, packed if the space is.
            height_px: Height of the image that the pipeline was asked for; a packed latent does not tell.
            width_px: Its width.

        **Shape** [batch, channels, h, w] or packed [batch, h * w / 4, 4 * channels] -> [batch, channels, h, w].

        **Raises** LatentSpaceError: The shape is not of this space, or does not fit the size.
        """
        self.check_scaled(tuple(latent.shape))
        if self.packing == "flux":
            latent = self._unpack(latent, height_px, width_px)
        if self.mean is not None and self.std is not None:
            normal = latent / self.scale
            raw: Latent = normal * _per_channel(self.std, latent) + _per_channel(self.mean, latent)
            return raw
        return latent / self.scale + self.shift

    def from_raw(self, raw: "Latent") -> "Latent":
        """The inverse of `to_raw`.

        **Shape** [batch, channels, h, w] -> the same, or packed [batch, h * w / 4, 4 * channels].

        **Raises** LatentSpaceError: The shape is not of this space, or has an odd side that cannot be packed.
        """
        self.check_raw(tuple(raw.shape))
        if self.mean is not None and self.std is not None:
            scaled = (raw - _per_channel(self.mean, raw)) / _per_channel(self.std, raw) * self.scale
        else:
            scaled = (raw - self.shift) * self.scale
        return scaled if self.packing == "none" else self._pack(scaled)

    def _unpack(self, latent: "Latent", height_px: int | None, width_px: int | None) -> "Latent":
        batch, tokens, folded = latent.shape
        if height_px is None or width_px is None:
            raise LatentSpaceError(
                f"latent space {self.name} is packed: {tokens} tokens do not tell height from width; give the size of "
                "the image in pixels"
            )
        height, width = self.latent_size(height_px, width_px)
        if height * width != 4 * tokens:
            raise LatentSpaceError(
                f"latent space {self.name}: {width_px}x{height_px} px is {height * width // 4} tokens; found {tokens}"
            )
        patches = latent.reshape(batch, height // 2, width // 2, folded // 4, 2, 2)  # b i j c p q
        spread = patches.swapaxes(1, 3).swapaxes(2, 3).swapaxes(3, 4)  # b c i p j q
        raw: Latent = spread.reshape(batch, self.channels, height, width)
        return raw

    def _pack(self, latent: "Latent") -> "Latent":
        batch, channels, height, width = latent.shape
        if height % 2 or width % 2:
            raise LatentSpaceError(
                f"latent space {self.name} packs 2x2 patches and needs even sides; found {height}x{width} latent pixels"
            )
        spread = latent.reshape(batch, channels, height // 2, 2, width // 2, 2)  # b c i p j q
        patches = spread.swapaxes(3, 4).swapaxes(2, 3).swapaxes(1, 3)  # b i j c p q
        return patches.reshape(batch, height * width // 4, 4 * channels)

    def _refusal(self, form_name: str, form: str, shape: Sequence[int]) -> str:
        likely = [space for space in LATENT_SPACES.values() if space.name != self.name and _resembles(space, shape)]
        hint = f", which looks like {' or '.join(space.name for space in likely)}" if likely else ""
        return f"latent space {self.name} takes {form_name} latents {form}; found {list(shape)}{hint}"


def _resembles(space: LatentSpace, shape: Sequence[int]) -> bool:
    if len(shape) == 3:
        return space.packing == "flux" and shape[2] == 4 * space.channels
    return len(shape) == 4 and shape[1] == space.channels


def _per_channel(values: Sequence[float], like: "Latent") -> "Latent":
    if isinstance(like, np.ndarray):
        return np.asarray(values, dtype=like.dtype).reshape(-1, 1, 1)
    return like.new_tensor(list(values)).view(-1, 1, 1)


# Factors as in the configurations of the families' VAEs (diffusers 0.42).
LATENT_SPACES: Mapping[str, LatentSpace] = MappingProxyType(
    {
        space.name: space
        for space in (
            LatentSpace("sd15", 4, 8, scale=0.18215),
            LatentSpace("sdxl", 4, 8, scale=0.13025),
            LatentSpace("sd3", 16, 8, scale=1.5305, shift=0.0609),
            LatentSpace("flux1", 16, 8, scale=0.3611, shift=0.1159, packing="flux"),
            LatentSpace("pocket16", 16, 8, scale=1.0),
        )
    }
)
