"""Fits the linear map of previews to a VAE: least squares from latents to the pixels of drawn pictures."""

from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from giantleap.models.bundle.bundle import Bundle, read_bundle, write_bundle
from giantleap.models.bundle.descriptor import PreviewFile
from giantleap.models.bundle.digests import file_hash
from giantleap.models.vae.autoencoder import Vae, read_vae_model
from giantleap.models.vae.preview import MAX_SIDE_PX, PREVIEW_FILE, LinearMap

PICTURES: Final = 24
_DISCS: Final = 60
_RIDGE: Final = 1e-3  # of the mean square of the latents


def draw_picture(side_px: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Shaded discs of random colors over one another, with edges and textures at every size.

    Returns:
        [side_px, side_px, 3] in [-1, 1].
    """
    y, x = np.mgrid[:side_px, :side_px].astype(np.float32) / side_px
    picture = np.zeros((side_px, side_px, 3), np.float32)
    for index in range(_DISCS):
        row, column = rng.random(2)
        radius = 2.0 if index == 0 else 0.02 + 0.4 * rng.random() ** 3
        slope, grain = rng.normal(0, 0.6, (2, 3)), rng.normal(0, 0.15 * rng.random(), (side_px, side_px, 1))
        color = rng.uniform(-1, 1, 3) + (y - row)[..., None] * slope[0] + (x - column)[..., None] * slope[1] + grain
        inside = (y - row) ** 2 + (x - column) ** 2 < radius**2
        picture[inside] = color.astype(np.float32)[inside]
    return picture.clip(-1, 1)


def choose_factor(stride_px: int, base_px: int) -> int:
    """Preview pixels per latent pixel: as many as a base image fills `MAX_SIDE_PX` with, at most the stride."""
    factor = 1
    while 2 * factor <= min(stride_px, MAX_SIDE_PX * stride_px // base_px):
        factor *= 2
    return factor


@torch.inference_mode()
def fit_linear_map(vae: Vae, base_px: int, pictures: int = PICTURES) -> LinearMap:
    """Fit the map for base images of a side of about `base_px`."""
    stride_px = vae.latent_space.stride_px
    factor, rng = choose_factor(stride_px, base_px), np.random.default_rng(0)
    side_px = max(128, 8 * vae.latent_space.multiple_px)
    rows, targets = [], []
    for _ in range(pictures):
        picture = torch.from_numpy(draw_picture(side_px, rng)).permute(2, 0, 1)[None]
        latent = vae.encode(picture).cpu().double()
        small = F.interpolate(picture.double(), scale_factor=factor / stride_px, mode="area")
        rows.append(latent.flatten(2)[0].T)
        targets.append(F.pixel_unshuffle(small, factor).flatten(2)[0].T)
    return _solve(torch.cat(rows), torch.cat(targets))


def add_preview_map(bundle: Bundle) -> Bundle:
    """Fit the map to the VAE of a bundle on disk, write it into the bundle, and name it in the descriptor."""
    vae = Vae(read_vae_model(bundle, torch.device("cpu"), torch.float32), bundle.latent_space, dtype=torch.float32)
    path, descriptor = bundle.directory / PREVIEW_FILE, bundle.descriptor
    fit_linear_map(vae, max(bundle.defaults.base_width_px, bundle.defaults.base_height_px)).write(path)
    changes = {
        "preview": PreviewFile(file=PREVIEW_FILE),
        "files": {**descriptor.files, PREVIEW_FILE: file_hash(path)},
    }
    write_bundle(bundle.directory, descriptor.model_copy(update=changes))
    return read_bundle(bundle.directory)


def _solve(latents: Tensor, colors: Tensor) -> LinearMap:
    """Ridge regression with a free offset: [n, channels] to [n, 3 factor^2]."""
    center, offset = latents.mean(0), colors.mean(0)
    x, y = latents - center, colors - offset
    gram = x.T @ x
    damped = gram + _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(damped, x.T @ y).T
    return LinearMap(weight.float(), (offset - weight @ center).float())
