"""Fits the linear skip of a LUA: the least-squares map from 5 x 5 small codes to the large codes of the same place.

The map has a closed form, costs seconds, and already beats the enlargement of decoded pictures on most autoencoders
whose codes are not smooth; the network then learns what is left. `training/run.py` calls it for a network that starts
afresh with `linear_skip`.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.lua.network import LINEAR_SKIP_KERNEL, LinearSkip, Lua
from giantleap.training.data.pairs_store import PairsStore

RIDGE = 1e-6  # of the mean of the diagonal
TILES = 800  # at most; 400 of 256 px are enough at 16 to 32 channels, fewer overfit the x4 map
TILES_AT_ONCE = 16


@torch.no_grad()
def fit_linear_skip(net: Lua, store: PairsStore, tile_count: int) -> None:
    """Sets the skip of every scale, in place.

    Args:
        net: Has `linear_skip`, and its latent statistics are set.
        store: The pairs.
        tile_count: Tiles that are not held out, from the first; at most `TILES` of them are used, evenly spread.

    Raises:
        ValueError: The network has no linear skip.
    """
    if not net.spec.linear_skip:
        raise ValueError("this LUA was built with linear_skip=False; build it with linear_skip=True to fit a skip")
    step = max(1, tile_count // TILES)
    tiles = range(0, tile_count, step)[:TILES]
    for scale in net.spec.scales:
        fit = SkipFit(net.spec.channels, scale)
        for start in range(0, len(tiles), TILES_AT_ONCE):
            pairs = store.read(tiles[start : start + TILES_AT_ONCE], (1, scale))
            fit.add(_normalized(net, pairs[scale]), _normalized(net, pairs[1]))
        weight, bias = fit.solve()
        conv = cast(LinearSkip, net.skips[f"x{scale}"]).conv
        conv.weight.copy_(weight)
        cast(Tensor, conv.bias).copy_(bias)


class SkipFit:
    """Normal equations of one scale's map, in float64; the last feature is constant and becomes the bias."""

    def __init__(self, channels: int, scale: int) -> None:
        self.channels, self.scale = channels, scale
        self.features = channels * LINEAR_SKIP_KERNEL**2 + 1
        self.gram = torch.zeros(self.features, self.features, dtype=torch.double)
        self.cross = torch.zeros(self.features, channels * scale**2, dtype=torch.double)

    def add(self, small: Tensor, large: Tensor) -> None:
        """Adds tiles.

        Shape:
            [tiles, channels, h, w] and [tiles, channels, scale * h, scale * w].
        """
        margin = LINEAR_SKIP_KERNEL // 2
        padded = F.pad(small.double(), (margin,) * 4, mode="replicate")
        codes = F.unfold(padded, LINEAR_SKIP_KERNEL).transpose(1, 2).flatten(0, 1)
        codes = torch.cat([codes, codes.new_ones(len(codes), 1)], dim=1)
        squares = F.pixel_unshuffle(large.double(), self.scale).flatten(2).transpose(1, 2).flatten(0, 1)
        self.gram += codes.T @ codes
        self.cross += codes.T @ squares

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution before the pixel shuffle, float32."""
        ridge = RIDGE * self.gram.diagonal().mean() * torch.eye(self.features, dtype=torch.double)
        solution = torch.linalg.solve(self.gram + ridge, self.cross).T
        side = LINEAR_SKIP_KERNEL
        weight = solution[:, :-1].reshape(-1, self.channels, side, side)
        return weight.float(), solution[:, -1].float()


def _normalized(net: Lua, latent: Tensor) -> Tensor:
    return net.normalize(latent)
