"""Between latents and 8-bit pixels: an image to its raw latent, and raw latents of one or several sizes to images."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from giantleap.models.bundle.descriptor import DecodeName
from giantleap.models.device import PartCallback, part_of
from giantleap.models.pixels.images import finite_items, to_pixels, to_signed
from giantleap.models.vae.autoencoder import Vae


@torch.inference_mode()
def encode_pixels(vae: Vae, pixels: NDArray[np.uint8], on_part: PartCallback | None = None) -> Tensor:
    """Encode an image to its raw latent, the mean of the posterior.

    Sides are padded to whole latents by repeating their last pixels.

    Shape:
        [height_px, width_px, 3] -> [channels, h, w], float32.
    """
    height_px, width_px = pixels.shape[:2]
    unit_px = vae.latent_space.multiple_px
    filling = ((0, -height_px % unit_px), (0, -width_px % unit_px), (0, 0))
    image = to_signed(torch.from_numpy(np.pad(pixels, filling, mode="edge")))
    return vae.encode(image[None].to(vae.device), on_part)[0]


def encode_items(
    vae: Vae, images: Sequence[Tensor | None], latents: Sequence[Tensor], on_part: PartCallback
) -> list[Tensor]:
    """Encode images one by one. For an image that was not finite, NaN in the shape of its latent."""
    return [
        torch.full_like(latents[index], torch.nan)
        if image is None
        else encode_pixels(vae, image.numpy(), part_of(on_part, index, len(images)))
        for index, image in enumerate(images)
    ]


@torch.inference_mode()
def decode_pixels(
    vae: Vae, latents: Tensor, how: DecodeName = "exact", on_part: PartCallback | None = None
) -> list[Tensor | None]:
    """Decode raw latents in one call; None for an image with a value that is not finite.

    Shape:
        [batch, channels, h, w] -> per item [stride * h, stride * w, 3], uint8, on the CPU.
    """
    decoded = vae.decode(latents, how=how, on_part=on_part)
    finite = finite_items(decoded)
    pixels = to_pixels(decoded / 2 + 0.5)
    return [image if good else None for image, good in zip(pixels, finite, strict=True)]


def decode_items(
    vae: Vae, latents: Sequence[Tensor], how: DecodeName = "exact", on_part: PartCallback | None = None
) -> list[Tensor | None]:
    """Decode latents of any sizes; a GPU decodes latents of one size together. See `decode_pixels`."""
    images: list[Tensor | None] = [None] * len(latents)
    done = 0
    # On a CPU a batch of 8 took 1.27 times as long per image as one at a time: activations leave the cache.
    max_items = 1 if vae.device.type == "cpu" else len(latents)
    for size in dict.fromkeys(latent.shape for latent in latents):
        alike = [index for index, latent in enumerate(latents) if latent.shape == size]
        for chosen in (alike[start : start + max_items] for start in range(0, len(alike), max_items)):
            report = part_of(on_part, done, len(latents), len(chosen))
            decoded = decode_pixels(vae, torch.stack([latents[index] for index in chosen]), how, report)
            done += len(chosen)
            for index, image in zip(chosen, decoded, strict=True):
                images[index] = image
    return images
