"""Halve the tokens of a trained text-to-latent network: coarse tokens learn layout cheaply, fine ones draw edges."""

from collections.abc import Mapping

import torch
from torch import Tensor

PATCH_EMBED = "transformer.patch_embed.proj.weight"
PROJ_OUT = ("transformer.proj_out.weight", "transformer.proj_out.bias")


def patch_of(weights: Mapping[str, Tensor]) -> int:
    """Side of a token in latent pixels."""
    return int(weights[PATCH_EMBED].shape[-1])


def halve_patches(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights for tokens of half the side.

    A small token enters as if its large one consisted of four like it, and leaves as the mean of the four quarters.

    Args:
        weights: Of `TextToLatent`; the token's side is even. Places are computed and have no weights.
    """
    side, halved = patch_of(weights) // 2, dict(weights)
    embed = weights[PATCH_EMBED]
    channels = embed.shape[1]
    halved[PATCH_EMBED] = embed.unflatten(3, (2, side)).unflatten(2, (2, side)).sum(dim=(2, 4))
    for name in PROJ_OUT:
        quarters = weights[name].view(2, side, 2, side, channels, *weights[name].shape[1:])
        halved[name] = quarters.mean(dim=(0, 2)).flatten(0, 2)
    return {name: torch.clone(value) for name, value in halved.items()}
