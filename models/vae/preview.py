"""Small views of latents that are not finished: by the tiny VAE of a bundle, else by a linear map of the latent.

`giantleap.models.vae.preview_fit` fits the map to a VAE; `giantleap.models.generation.previews` says when to look.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from giantleap.models.bundle.bundle import Bundle, BundleError
from giantleap.models.latent_space import LatentSpace
from giantleap.models.pixels.images import to_pixels
from giantleap.models.vae.decode import decode_tiny

MAX_SIDE_PX: Final = 256
PREVIEW_FILE: Final = "preview.safetensors"


@dataclass(frozen=True, slots=True)
class LinearMap:
    """Colors as a linear function of a latent pixel: a block of `factor` x `factor` pixels for each.

    Args:
        weight: [3 * factor^2, channels], float32.
        bias: [3 * factor^2].
    """

    weight: Tensor
    bias: Tensor

    @property
    def factor(self) -> int:
        """Preview pixels per latent pixel."""
        return math.isqrt(len(self.bias) // 3)

    @classmethod
    def read(cls, path: Path, channels: int) -> Self:
        """Read the file that `write` wrote.

        Raises:
            BundleError: It is no such file, or for latents of other channels.
        """
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise BundleError(f"{path}: damaged or no safetensors file: {error}") from error
        weight, bias = tensors.get("weight"), tensors.get("bias")
        if weight is None or bias is None or weight.ndim != 2 or weight.shape != (len(bias), channels):
            raise BundleError(f"{path}: a preview map has weight [3 k^2, {channels}] and bias [3 k^2]; fit it again")
        made = cls(weight.float(), bias.float())
        if len(bias) != 3 * made.factor**2:
            raise BundleError(f"{path}: {len(bias)} rows are not 3 k^2; fit the map again")
        return made

    def write(self, path: Path) -> None:
        """Write the map as float32 safetensors."""
        path.write_bytes(save({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}))

    def apply(self, raw: Tensor) -> Tensor:
        """Map raw latents [batch, channels, h, w] to images [batch, 3, factor * h, factor * w] in about [-1, 1]."""
        weight, bias = self.weight.to(raw.device), self.bias.to(raw.device)
        return F.pixel_shuffle(F.conv2d(raw.float(), weight[:, :, None, None], bias), self.factor)


class Previewer:
    """Makes previews of latents of one bundle.

    Args:
        space: Of the latents.
        decoder: The tiny VAE of the bundle, or its linear map.
    """

    def __init__(self, space: LatentSpace, decoder: AutoencoderTiny | LinearMap) -> None:
        self._space = space
        self._decoder = decoder

    @torch.inference_mode()
    def show(self, raw: Tensor) -> Tensor:
        """A preview of one raw latent.

        A large latent is averaged first, so that the cost does not grow with the image.

        Shape:
            [channels, h, w] -> [height_px, width_px, 3], uint8, on the CPU; the longest side is at most `MAX_SIDE_PX`.
        """
        decoder = self._decoder
        factor = decoder.factor if isinstance(decoder, LinearMap) else self._space.stride_px
        height, width = raw.shape[-2:]
        shrink = min(1.0, MAX_SIDE_PX / (factor * max(height, width)))
        sides = [max(1, int(shrink * side)) for side in (height, width)]
        small = F.interpolate(raw[None].float(), size=sides, mode="area") if shrink < 1 else raw[None].float()
        if isinstance(decoder, LinearMap):
            image = decoder.apply(small)
        else:
            image = decode_tiny(decoder, small.to(decoder.device, decoder.dtype), self._space)
        return to_pixels(image.float().nan_to_num() / 2 + 0.5)[0]


def open_previewer(bundle: Bundle, tiny: AutoencoderTiny | None) -> Previewer | None:
    """The decoder of a bundle's previews: its tiny VAE, which is loaded, else its map; None if it has neither.

    Raises:
        BundleError: The map cannot be read.
    """
    space, named = bundle.latent_space, bundle.descriptor.preview
    if tiny is not None:
        return Previewer(space, tiny)
    return None if named is None else Previewer(space, LinearMap.read(bundle.directory / named.file, space.channels))
