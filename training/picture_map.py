"""The decoder of a VAE as one linear map of errors: cheap enough to be part of a loss at every update.

`fit_picture_map` explains each square of pixels by the 3 x 3 codes round it. `loss_terms` in `training/curriculum.py`
convolves the error of an enlarged latent with it, where `linear_square` has a weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.vae.autoencoder import Vae
from giantleap.training.data.pairs_store import LEVELS, PairsStore

SIDE = 3  # codes in each direction that a square of pixels depends on
MAX_WAY = 0.6  # of the way to the bicubic enlargement, at most, goes a disturbed latent
NOISE = 0.1  # of each channel's deviation
RIDGE = 1e-6  # of the mean of the diagonal


@torch.no_grad()
def fit_picture_map(vae: Vae, store: PairsStore, seed: int, count: int = 12) -> Tensor:
    """Fits the map from latent errors to the errors of the decoded picture, by least squares in float64.

    The latents are disturbed as an upscaler would: a part of the way to the bicubic enlargement, and by white noise.

    Args:
        vae: Of the pairs.
        store: The pairs; the first `count` tiles are used.
        seed: Of the disturbances.

    Shape:
        returns [3 * stride**2, channels, 3, 3], a convolution's weight.
    """
    generator = torch.Generator().manual_seed(seed)
    tiles = store.read(range(min(count, len(store))))
    large = tiles[1]
    deviations = large.std(dim=(0, 2, 3)).view(1, -1, 1, 1)
    stride_px, channels = vae.latent_space.stride_px, large.shape[1]
    features, targets = SIDE**2 * channels, 3 * stride_px**2
    gram = torch.zeros(features, features, dtype=torch.double)
    cross = torch.zeros(features, targets, dtype=torch.double)
    for scale in LEVELS[1:]:
        way = MAX_WAY * torch.rand(len(large), 1, 1, 1, generator=generator)
        noise = NOISE * deviations * torch.randn(large.shape, generator=generator)
        error = way * (F.interpolate(tiles[scale], scale_factor=scale, mode="bicubic") - large) + noise
        shown = vae.decode((large + error).to(vae.device)).cpu() - vae.decode(large.to(vae.device)).cpu()
        codes = F.unfold(error, SIDE, padding=SIDE // 2).transpose(1, 2).flatten(0, 1).double()
        squares = F.unfold(shown, stride_px, stride=stride_px).transpose(1, 2).flatten(0, 1).double()
        gram += codes.T @ codes
        cross += codes.T @ squares
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(features, dtype=torch.double)
    weight: Tensor = torch.linalg.solve(gram + ridge, cross)
    return weight.T.reshape(targets, channels, SIDE, SIDE).float()
