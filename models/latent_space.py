"""Defines latent spaces: channels, stride, and the conversion between a pipeline's latents and raw VAE latents.

LUA and the decoder take raw latents, [batch, channels, latent_height, latent_width] as the VAE's encoder gives them,
without scaling or packing. The conversions take torch tensors and numpy arrays and import no torch, which the API
process does not have. `models/bundle/bundle.py` names a bundle's space.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np

from giantleap.models.safetensors_header import FLOAT_DTYPES, read_header, to_floats

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Latent = TypeVar("Latent", Tensor, NDArray[np.floating[Any]])

Packing = Literal["none", "flux", "rows", "frame"]

# A scaled latent has a root mean square of about 1, noise of exactly 1.
MAX_SCALED_RMS = 4.0


class LatentSpaceError(ValueError):
    """A tensor that is no latent of the space, or numbers that define no space."""


@dataclass(frozen=True, slots=True)
class LatentSpace:
    """One family of latents.

    A pipeline returns `scaled = (raw - shift) * scale`; with statistics `scaled = (raw - mean) / std * scale`. A
    packing then changes [batch, channels, h, w]:

    - "none": nothing.
    - "flux": folds each 2x2 patch into one token, [batch, h * w / 4, 4 * channels].
    - "rows": makes each pixel a token, row by row, [batch, h * w, channels].
    - "frame": makes it a video of one frame, [batch, channels, 1, h, w].

    Statistics are one value per raw channel or, in the packing "flux", one per channel of a token.

    Args:
        name: The family.
        channels: Channels of a raw latent.
        stride_px: Image pixels per latent pixel.
        scale: `scaling_factor` of a diffusers VAE.
        shift: `shift_factor` of a diffusers VAE.
        packing: One of the above.
        mean: Per channel; only together with `std` and without a shift.
        std: Per channel; only together with `mean`.
        side_multiple: The pipeline makes latents whose sides are multiples of this.
        has_frames: The VAE is one of videos, and takes a raw latent also as [batch, channels, 1, h, w].
        statistics_in_vae: Mean and standard deviation are weights of the VAE (`read_vae_statistics`); before
            `with_statistics` only shapes are known.

    Raises:
        LatentSpaceError: The numbers contradict each other.
    """

    name: str
    channels: int
    stride_px: int
    scale: float
    shift: float = 0.0
    packing: Packing = "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    side_multiple: int = 1
    statistics_in_vae: bool = False
    has_frames: bool = False

    def __post_init__(self) -> None:
        if min(self.channels, self.stride_px, self.side_multiple) < 1 or not self.scale > 0:
            raise LatentSpaceError(
                f"latent space {self.name}: channels, stride_px, side_multiple and scale must be positive; found "
                f"{self.channels}, {self.stride_px}, {self.side_multiple}, {self.scale}"
            )
        if self.packing not in get_args(Packing):
            raise LatentSpaceError(
                f"latent space {self.name}: packing is one of {', '.join(get_args(Packing))}; found {self.packing!r}"
            )
        if (self.mean is None) != (self.std is None):
            raise LatentSpaceError(f"latent space {self.name}: mean and std come together; found only one of them")
        if self.mean is not None and self.std is not None:
            counts = (self.channels, 4 * self.channels) if self.packing == "flux" else (self.channels,)
            if len(self.mean) != len(self.std) or len(self.mean) not in counts or min(self.std) <= 0:
                raise LatentSpaceError(
                    f"latent space {self.name}: mean and std need {' or '.join(map(str, counts))} values each, std "
                    f"positive ones; found {len(self.mean)} and {len(self.std)}"
                )
            if self.shift != 0.0:
                raise LatentSpaceError(f"latent space {self.name}: a shift of {self.shift} beside a mean per channel")

    @property
    def multiple_px(self) -> int:
        """The pipeline makes images whose sides are multiples of this."""
        return self.stride_px * self._side_multiple

    @property
    def scaled_dims(self) -> int:
        """Number of dimensions of a scaled latent, the batch included."""
        return {"none": 4, "flux": 3, "rows": 3, "frame": 5}[self.packing]

    @property
    def is_packed(self) -> bool:
        """Whether a scaled latent is a row of tokens, from which height and width cannot be read."""
        return self.scaled_dims == 3

    @property
    def takes_frames(self) -> bool:
        """Whether a raw latent may be a video of one frame."""
        return self.has_frames or self.packing == "frame"

    def latent_size(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Height and width of the raw latent that a pipeline makes for an image of this size."""
        multiple, multiple_px = self._side_multiple, self.multiple_px
        return multiple * (height_px // multiple_px), multiple * (width_px // multiple_px)

    def with_statistics(self, mean: Sequence[float], std: Sequence[float]) -> "LatentSpace":
        """The same space with the statistics of one VAE (`read_vae_statistics`).

        Raises:
            LatentSpaceError: Their number differs from the number of channels.
        """
        return replace(self, mean=tuple(map(float, mean)), std=tuple(map(float, std)))

    def is_one_frame(self, shape: Sequence[int]) -> bool:
        """Whether a shape is that of videos of one frame, [channels, 1, h, w] or with a batch, in a space of such."""
        return self.takes_frames and len(shape) in (4, 5) and shape[-4] == self.channels and shape[-3] == 1

    def is_token_row(self, shape: Sequence[int]) -> bool:
        """Whether a shape is that of scaled and packed latents, [tokens, folded channels] or with a batch."""
        return self.is_packed and len(shape) in (2, 3) and _is_scaled(self, (1, *shape)[-3:])

    def check_raw(self, shape: Sequence[int], sent: Sequence[int] | None = None) -> None:
        """Check the shape of a raw latent; `sent` is the shape to name, where a batch or a frame was added or removed.

        Raises:
            LatentSpaceError: It is not [batch, channels, latent_height, latent_width] without an empty side.
        """
        if not _is_raw(self, shape):
            form = f"[batch, {self.channels}, latent_height, latent_width]"
            raise LatentSpaceError(self._refusal("raw", form, shape, sent))

    def check_scaled(self, shape: Sequence[int], sent: Sequence[int] | None = None) -> None:
        """Check the shape of a latent as the pipeline returns it; `sent` as for `check_raw`.

        Raises:
            LatentSpaceError: It is not the shape of the packing.
        """
        if not _is_scaled(self, shape):
            packed = "scaled" if self.packing == "none" else "scaled and packed"
            raise LatentSpaceError(self._refusal(packed, self.scaled_form, shape, sent))

    def check_scaled_values(self, latent: "Latent") -> None:
        """Check that a latent declared as scaled is not a raw one, as far as its values tell.

        This is only possible for spaces whose raw latents are far larger than scaled ones, such as sdxl (1 / 0.13025 =
        7.7 times). The opposite mistake cannot be detected: a scaled latent is also the raw latent of some dull image.

        Raises:
            LatentSpaceError: The values are too large for a scaled latent.
        """
        rms = float((latent * latent).mean()) ** 0.5
        if rms > MAX_SCALED_RMS and self.mean is None and 1 / self.scale > MAX_SCALED_RMS:
            raise LatentSpaceError(
                f"latent space {self.name}: a scaled latent has values of root mean square about 1; found {rms:.1f}, "
                f"which looks like a raw latent (about {1 / self.scale:.1f}): send it as a raw one"
            )

    def to_raw(self, latent: "Latent", height_px: int | None = None, width_px: int | None = None) -> "Latent":
        """Convert a latent from the pipeline's form to the raw one.

        Args:
            latent: As the pipeline returns it, packed if the space is.
            height_px: Height of the image; needed for a packed latent.
            width_px: Width of the image; needed for a packed latent.

        Returns:
            [batch, channels, h, w].

        Raises:
            LatentSpaceError: The shape is not of this space, or does not fit the size.
        """
        self.check_scaled(tuple(latent.shape))
        self._check_statistics()
        if self._has_token_statistics:
            return self._unpack(self._denormalize(latent, ()), height_px, width_px)
        return self._denormalize(self._unpack(latent, height_px, width_px), (1, 1))

    def unscale(self, latent: "Latent") -> "Latent":
        """Convert a latent that is scaled but not packed to the raw one.

        Args:
            latent: [batch, channels, h, w].

        Raises:
            LatentSpaceError: The shape is not of this space, or has an odd side where statistics are those of tokens.
        """
        self.check_raw(tuple(latent.shape))
        self._check_statistics()
        if not self._has_token_statistics:
            return self._denormalize(latent, (1, 1))
        height, width = latent.shape[-2:]
        tokens = self._denormalize(self.pack(latent), ())
        return self._unpack(tokens, self.stride_px * height, self.stride_px * width)

    def from_raw(self, raw: "Latent") -> "Latent":
        """Convert a raw latent to the pipeline's form; the inverse of `to_raw`.

        Args:
            raw: [batch, channels, h, w].

        Raises:
            LatentSpaceError: The shape is not of this space, or has an odd side that cannot be packed.
        """
        self.check_raw(tuple(raw.shape))
        self._check_statistics()
        if self._has_token_statistics:
            return self._normalize(self.pack(raw), ())
        return self.pack(self._normalize(raw, (1, 1)))

    @property
    def _side_multiple(self) -> int:
        return max(self.side_multiple, 2) if self.packing == "flux" else self.side_multiple

    @property
    def _has_token_statistics(self) -> bool:
        return self.mean is not None and len(self.mean) != self.channels

    def _check_statistics(self) -> None:
        if self.statistics_in_vae and self.mean is None:
            raise LatentSpaceError(
                f"latent space {self.name}: mean and std are weights of its VAE and were not read "
                "(read_vae_statistics, with_statistics)"
            )

    def _denormalize(self, latent: "Latent", trailing: tuple[int, ...]) -> "Latent":
        if self.mean is None or self.std is None:
            return latent / self.scale + self.shift
        raw: Latent = latent / self.scale * _channels(self.std, latent, trailing) + _channels(
            self.mean, latent, trailing
        )
        return raw

    def _normalize(self, raw: "Latent", trailing: tuple[int, ...]) -> "Latent":
        if self.mean is None or self.std is None:
            return (raw - self.shift) * self.scale
        centered = raw - _channels(self.mean, raw, trailing)
        scaled: Latent = centered / _channels(self.std, raw, trailing) * self.scale
        return scaled

    def _unpack(self, latent: "Latent", height_px: int | None, width_px: int | None) -> "Latent":
        if self.packing == "frame":
            return latent[:, :, 0]
        if self.packing == "none":
            return latent
        batch, tokens, folded = latent.shape
        if height_px is None or width_px is None:
            raise LatentSpaceError(
                f"latent space {self.name} is packed: {tokens} tokens do not tell height from width; give the size of "
                "the image in pixels"
            )
        height, width = self.latent_size(height_px, width_px)
        side = 2 if self.packing == "flux" else 1
        if height * width != side**2 * tokens:
            raise LatentSpaceError(
                f"latent space {self.name}: {width_px}x{height_px} px is {height * width // side**2} tokens; found "
                f"{tokens}"
            )
        patches = latent.reshape(batch, height // side, width // side, folded // side**2, side, side)  # b i j c p q
        spread = patches.swapaxes(1, 3).swapaxes(2, 3).swapaxes(3, 4)  # b c i p j q
        raw: Latent = spread.reshape(batch, self.channels, height, width)
        return raw

    def pack(self, latent: "Latent") -> "Latent":
        """Pack [batch, channels, h, w] as the pipeline does, without scaling it.

        Raises:
            LatentSpaceError: It has an odd side that cannot be packed.
        """
        if self.packing == "frame":
            return latent[:, :, None]
        if self.packing == "none":
            return latent
        batch, channels, height, width = latent.shape
        side = 2 if self.packing == "flux" else 1
        if height % side or width % side:
            raise LatentSpaceError(
                f"latent space {self.name} packs 2x2 patches and needs even sides; found {height}x{width} latent pixels"
            )
        spread = latent.reshape(batch, channels, height // side, side, width // side, side)  # b c i p j q
        patches = spread.swapaxes(3, 4).swapaxes(2, 3).swapaxes(1, 3)  # b i j c p q
        return patches.reshape(batch, height * width // side**2, channels * side**2)

    @property
    def scaled_form(self) -> str:
        """The shape of a scaled latent, in words."""
        return {
            "none": f"[batch, {self.channels}, latent_height, latent_width]",
            "flux": f"[batch, latent_height * latent_width / 4, {4 * self.channels}]",
            "rows": f"[batch, latent_height * latent_width, {self.channels}]",
            "frame": f"[batch, {self.channels}, 1, latent_height, latent_width]",
        }[self.packing]

    def _refusal(self, form_name: str, form: str, shape: Sequence[int], sent: Sequence[int] | None) -> str:
        likely = [label for space in LATENT_SPACES.values() if (label := _label(space, shape))]
        hint = f", which looks like {' or '.join(likely)}" if likely else ""
        return f"latent space {self.name} takes {form_name} latents {form}; found {list(sent or shape)}{hint}"


def read_vae_statistics(vae_directory: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read mean and standard deviation of a FLUX.2 VAE, which are the running statistics of its batch normalization.

    It reads two small tensors of the safetensors file, not the rest.

    Args:
        vae_directory: With `config.json` and the weights, as diffusers saves them.

    Returns:
        Mean and standard deviation, for `LatentSpace.with_statistics`.

    Raises:
        LatentSpaceError: The weights hold no such statistics.
        OSError: A file is missing.

    References:
        Flux2Pipeline of diffusers 0.42: std = sqrt(running_var + batch_norm_eps).
    """
    config = json.loads((vae_directory / "config.json").read_text(encoding="utf-8"))
    statistics: dict[str, NDArray[np.float64]] = {}
    for path in sorted(vae_directory.glob("*.safetensors")):
        statistics |= _read_tensors(path, ("bn.running_mean", "bn.running_var"))
    if len(statistics) != 2 or "batch_norm_eps" not in config:
        raise LatentSpaceError(f"{vae_directory}: no safetensors file here holds the statistics of a FLUX.2 VAE")
    std = np.sqrt(statistics["bn.running_var"] + config["batch_norm_eps"])
    return tuple(statistics["bn.running_mean"].tolist()), tuple(std.tolist())


def _read_tensors(path: Path, names: Sequence[str]) -> "dict[str, NDArray[np.float64]]":
    tensors = {}
    with path.open("rb") as file:
        header, data_at = read_header(file)
        for name in names:
            if name not in header:
                continue
            first, last = header[name]["data_offsets"]
            dtype = header[name]["dtype"]
            if dtype not in FLOAT_DTYPES:
                raise LatentSpaceError(f"{path}: {name} is stored as {dtype}; F32, F16 and BF16 are read")
            file.seek(data_at + first)
            stored = np.frombuffer(file.read(last - first), FLOAT_DTYPES[dtype])
            tensors[name] = to_floats(stored, dtype).astype(np.float64)
    return tensors


def _is_raw(space: LatentSpace, shape: Sequence[int]) -> bool:
    return len(shape) == 4 and shape[1] == space.channels and min(shape) >= 1


def _is_scaled(space: LatentSpace, shape: Sequence[int]) -> bool:
    if len(shape) != space.scaled_dims or min(shape) < 1:
        return False
    if space.scaled_dims == 3:
        return shape[2] == space.channels * (4 if space.packing == "flux" else 1)
    return shape[1] == space.channels and (space.packing != "frame" or shape[2] == 1)


def _label(space: LatentSpace, shape: Sequence[int]) -> str | None:
    """The name of a latent of this shape in a space; None if it is none."""
    if _is_scaled(space, shape):
        return space.name if space.packing == "none" else f"packed {space.name}"
    return f"raw {space.name}" if _is_raw(space, shape) else None


def _channels(values: Sequence[float], like: "Latent", trailing: tuple[int, ...]) -> "Latent":
    if isinstance(like, np.ndarray):
        return np.asarray(values, dtype=like.dtype).reshape(-1, *trailing)
    return like.new_tensor(list(values)).view(-1, *trailing)


_WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
             0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
_WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip
_QWEN21_MEAN = (
    0.5126, 0.7721, -0.0631, 1.3506, -0.7855, -2.1025, -0.3458, 1.3722, 1.8873, -1.7177, -0.651, 0.2732, 0.7562,
    -0.6163, -1.0277, 3.8363, 2.021, 0.0472, 0.932, 2.0087, 2.4954, -0.1391, -1.4249, 1.8464, -0.5236, 1.2826, 3.7046,
    -1.3035, 2.7286, -1.4518, -1.9036, -1.9955, -0.0342, -1.0265, -0.7636, 3.0555, 0.0746, -3.0751, -0.1076, 1.7376,
    -1.0914, -1.9435, -0.2784, -1.368, 0.4809, -0.4433, 0.3764, 0.5729, -2.0595, 1.096, -1.326, -2.0211, -5.0179,
    0.5275, 4.0162, 1.8505, 0.3026, 1.9373, 1.4937, 0.2632, 0.5547, -1.7121, -0.1562, 0.0304,
)  # fmt: skip
_QWEN21_STD = (
    3.2001, 3.2936, 3.4321, 3.0091, 3.1061, 4.0379, 4.0705, 3.791, 3.0785, 3.65, 3.9308, 3.0904, 2.8778, 3.7675, 3.732,
    5.0756, 3.2864, 4.0397, 3.1317, 4.0443, 2.9249, 3.9454, 3.0988, 4.2489, 3.4896, 3.8513, 3.9323, 3.4719, 3.7498,
    4.283, 3.5694, 4.2467, 3.9037, 3.2947, 5.077, 3.5075, 3.27, 3.4767, 2.8063, 5.1125, 3.5327, 4.7833, 3.1286, 4.1819,
    3.8527, 3.8312, 3.5605, 4.3875, 3.9624, 4.0168, 3.5643, 4.055, 5.5614, 4.2963, 4.408, 3.4959, 3.8747, 3.7608,
    3.5735, 3.149, 3.7662, 3.6746, 3.4563, 3.8161,
)  # fmt: skip

# Factors, statistics and packings as in the VAEs and pipelines of diffusers 0.42. Note that
# Flux2KleinPipeline, unlike Flux2Pipeline, returns raw latents for output_type="latent"; they need no `to_raw`.
LATENT_SPACES: Mapping[str, LatentSpace] = MappingProxyType(
    {
        space.name: space
        for space in (
            LatentSpace("sd15", 4, 8, scale=0.18215),
            LatentSpace("sdxl", 4, 8, scale=0.13025),
            LatentSpace("sd3", 16, 8, scale=1.5305, shift=0.0609, side_multiple=2),
            LatentSpace("flux1", 16, 8, scale=0.3611, shift=0.1159, packing="flux"),
            LatentSpace("z-image", 16, 8, scale=0.3611, shift=0.1159, side_multiple=2),
            LatentSpace("flux2", 32, 8, scale=1.0, packing="flux", statistics_in_vae=True),
            LatentSpace("qwen-image", 16, 8, scale=1.0, packing="flux", mean=_WAN_MEAN, std=_WAN_STD, has_frames=True),
            LatentSpace("wan21", 16, 8, scale=1.0, packing="frame", mean=_WAN_MEAN, std=_WAN_STD, side_multiple=2),
            LatentSpace(
                "qwen-image-21",
                64,
                16,
                scale=1.0,
                packing="rows",
                mean=_QWEN21_MEAN,
                std=_QWEN21_STD,
                side_multiple=2,
                has_frames=True,
            ),
            LatentSpace("sana", 32, 32, scale=0.41407),
            LatentSpace("pocket24", 24, 4, scale=0.5),
        )
    }
)
