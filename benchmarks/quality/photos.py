"""Measure a bundle's VAE and LUA on six real photographs that no training has seen.

The honest baseline of a latent upscaler is decode-then-bicubic: latents do not survive interpolation, so beating latent
bicubic proves little. `benchmarks/pocket_quality.py` prints the figures and compares them with targets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image
from torch import Tensor
from tqdm import tqdm

from giantleap.models.lua.network import Lua
from giantleap.training.evaluation import metrics
from giantleap.training.evaluation.cases import shrink

MULTIPLE_PX = 32  # a quarter of the side must be whole latents
SCALES = (2, 4)
CELL_PX = 128  # side of a crop on the contact sheet, shown twice as large


@dataclass(frozen=True)
class PhotoScores:
    """PSNR in dB against the original photograph, for one photograph or the mean of all."""

    round_trip: float
    lua: dict[int, float]
    pixel_bicubic: dict[int, float]
    latent_bicubic: dict[int, float]


@dataclass(frozen=True)
class PhotoRoutes:
    """Decoded pictures of one photograph, each [1, 3, height, width], clamped to [-1, 1]."""

    original: Tensor
    round_trip: Tensor
    lua: dict[int, Tensor]
    pixel_bicubic: dict[int, Tensor]
    latent_bicubic: dict[int, Tensor]


def read_photos() -> dict[str, Tensor]:
    """Read the photographs from installed packages as center squares.

    Returns:
        Each [1, 3, side, side] in [-1, 1], side a multiple of 32.
    """
    sources: dict[str, Callable[[], NDArray[np.uint8]]] = {
        "astronaut": skimage.data.astronaut,
        "coffee": skimage.data.coffee,
        "chelsea": skimage.data.chelsea,
        "rocket": skimage.data.rocket,
        "china": lambda: load_sample_image("china.jpg"),
        "flower": lambda: load_sample_image("flower.jpg"),
    }
    photos = {}
    for name, read in sources.items():
        pixels = read()
        side = min(pixels.shape[:2]) // MULTIPLE_PX * MULTIPLE_PX
        top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
        square = np.ascontiguousarray(pixels[top : top + side, left : left + side, :3])
        photos[name] = torch.from_numpy(square).permute(2, 0, 1)[None] / 127.5 - 1.0
    return photos


def psnr_db(picture: Tensor, original: Tensor) -> float:
    """Peak signal-to-noise ratio over all channels of 8-bit pictures; both in [-1, 1]."""
    return metrics.psnr_db(metrics.to_levels(picture), metrics.to_levels(original), border_px=0)


def _enlarge(maps: Tensor, scale: int) -> Tensor:
    return F.interpolate(maps, scale_factor=float(scale), mode="bicubic")


@torch.no_grad()
def draw_routes(vae: Any, lua: Lua, photo: Tensor) -> PhotoRoutes:
    """Send one photograph through every route; small versions are antialiased bicubic in 8 bits."""

    def encode(picture: Tensor) -> Tensor:
        encoded = vae.encode(picture)
        latent: Tensor = encoded.latent if isinstance(vae, AutoencoderDC) else encoded.latent_dist.mode()
        return latent

    def decode(latent: Tensor) -> Tensor:
        picture: Tensor = vae.decode(latent).sample
        return picture.clamp(-1.0, 1.0)

    small = {scale: encode(shrink(photo, scale)) for scale in SCALES}
    return PhotoRoutes(
        original=photo,
        round_trip=decode(encode(photo)),
        lua={scale: decode(lua(small[scale], scale)) for scale in SCALES},
        pixel_bicubic={scale: _enlarge(decode(small[scale]), scale) for scale in SCALES},
        latent_bicubic={scale: decode(_enlarge(small[scale], scale)) for scale in SCALES},
    )


def score(routes: PhotoRoutes) -> PhotoScores:
    """Return the PSNR of every route."""

    def each(pictures: dict[int, Tensor]) -> dict[int, float]:
        return {scale: psnr_db(picture, routes.original) for scale, picture in pictures.items()}

    return PhotoScores(
        psnr_db(routes.round_trip, routes.original),
        each(routes.lua),
        each(routes.pixel_bicubic),
        each(routes.latent_bicubic),
    )


def mean_scores(scores: list[PhotoScores]) -> PhotoScores:
    """Return the mean over photographs of the decibels."""

    def each(name: str) -> dict[int, float]:
        return {scale: float(np.mean([getattr(s, name)[scale] for s in scores])) for scale in SCALES}

    return PhotoScores(
        float(np.mean([s.round_trip for s in scores])),
        each("lua"),
        each("pixel_bicubic"),
        each("latent_bicubic"),
    )


def measure_photos(vae: Any, lua: Lua, sheet: Path | None = None) -> dict[str, PhotoScores]:
    """Score every photograph and their `mean`; writes a contact sheet where a path is given."""
    routes = {name: draw_routes(vae, lua, photo) for name, photo in tqdm(read_photos().items(), desc="photos")}
    scores = {name: score(route) for name, route in routes.items()}
    if sheet is not None:
        write_photo_sheet(routes, sheet)
    return {**scores, "mean": mean_scores(list(scores.values()))}


def write_photo_sheet(routes: dict[str, PhotoRoutes], path: Path) -> None:
    """Write one row of center crops per photograph, pixels doubled."""
    titles = ("x4 bicubic", "x4 LUA", "x2 bicubic", "x2 LUA", "VAE ceiling", "original")
    side, head = 2 * CELL_PX, 20
    sheet = Image.new("RGB", (len(titles) * side, head + len(routes) * side), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((column * side + 4, 4), title, fill="black")
    for row, route in enumerate(routes.values()):
        cells = (route.pixel_bicubic[4], route.lua[4], route.pixel_bicubic[2], route.lua[2])
        for column, picture in enumerate((*cells, route.round_trip, route.original)):
            offset = (picture.shape[-1] - CELL_PX) // 2
            crop = picture[0, :, offset : offset + CELL_PX, offset : offset + CELL_PX].clamp(-1.0, 1.0)
            pixels = ((crop.permute(1, 2, 0) + 1.0) * 127.5).round().byte().numpy()
            cell = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(cell, (column * side, head + row * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
