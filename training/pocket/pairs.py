"""Photograph-like views of the procedural pictures, and the encoded pairs that the pocket LUA trains on.

The VAE's group norms average over the whole picture, so pairs are whole pictures of the sizes used later. Leaves are
sharp and grainy everywhere, while photographs have blurred parts, soft shading and strong colors: `draw_view` resizes,
stretches, mixes, blurs and colors them. `training/pocket/lua.py` trains on the pairs.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from giantleap.training.pocket.vae import Pictures

SCALES = (2, 4)
Sizes = tuple[tuple[int, int], ...]
SIZES_PX: Sizes = (
    (256, 256),
    (384, 320),
    (320, 384),
    (416, 416),
    (512, 512),
)  # height, width; equal shares of the pixels
UNIT_PX = 256  # pictures are counted in squares of this side
ENCODE_UNITS = 8  # encoded at once
SCENE_SHARE = 0.12
MIX_SHARE = 0.4  # share of views that join two along a soft edge

Pixels = NDArray[np.uint8]


def shrink(images: Tensor, scale: int) -> Tensor:
    """Reduce pictures in [-1, 1]: antialiased bicubic, rounded to 8-bit levels."""
    small = F.interpolate(images, scale_factor=1.0 / scale, mode="bicubic", antialias=True)
    return ((small.clamp(-1.0, 1.0) + 1.0) * 127.5).round() / 127.5 - 1.0


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(image, size=(height, width), mode="bicubic", antialias=True).clamp(0.0, 1.0)


def _window(rng: np.random.Generator, pool: Pixels, height: int, width: int) -> Tensor:
    """Return a random window of a random picture, flipped, turned and resized: [1, 3, h, w] in [0, 1].

    From a fifth of the size (a blurred enlargement) to twice the size; one in three is stretched up to 2.5 times.
    """
    side = pool.shape[1]
    zoom = math.exp(rng.uniform(math.log(0.2), math.log(2.0)))
    stretch = math.exp(rng.uniform(-0.45, 0.45)) if rng.random() < 0.33 else 1.0
    rows, columns = (min(side, max(16, round(v))) for v in (height * zoom * stretch, width * zoom / stretch))
    turned = rng.random() < 0.5
    if turned:
        rows, columns = columns, rows
    top, left = rng.integers(0, side - rows + 1), rng.integers(0, side - columns + 1)
    cut = np.array(pool[rng.integers(len(pool)), top : top + rows, left : left + columns])
    image = torch.from_numpy(cut).permute(2, 0, 1)[None] / 255.0
    image = _resize(image.transpose(2, 3) if turned else image, height, width)
    return image.flip(3) if rng.random() < 0.5 else image


def _blur(image: Tensor, sigma_px: float) -> Tensor:
    """Blur approximately like a Gaussian, by resizing."""
    height, width = image.shape[-2:]
    factor = max(1.0, 1.5 * sigma_px)
    return _resize(_resize(image, max(4, round(height / factor)), max(4, round(width / factor))), height, width)


def _soft_mask(rng: np.random.Generator, height: int, width: int) -> Tensor:
    """Return a mask [1, 1, h, w] in [0, 1] of a few large blobs with sharp to very soft edges."""
    cells = int(rng.integers(3, 7))
    field = torch.from_numpy(rng.standard_normal((1, 1, cells, cells), dtype=np.float32))
    steepness = math.exp(rng.uniform(math.log(1.0), math.log(60.0)))
    return torch.sigmoid(steepness * F.interpolate(field, size=(height, width), mode="bicubic"))


def _color(rng: np.random.Generator, image: Tensor) -> Tensor:
    """Change hue, saturation, tone curve and tint of [1, 3, h, w] in [0, 1]."""
    grey = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    luma = (image * grey).sum(dim=1, keepdim=True)
    chroma = image - luma
    order = rng.permutation(3)
    image = luma + math.exp(rng.uniform(-0.8, 1.5)) * chroma[:, order.tolist()]
    tint = torch.from_numpy(np.exp(rng.normal(0.0, rng.uniform(0.0, 0.35), 3)).astype(np.float32)).view(1, 3, 1, 1)
    image = (image * tint).clamp(0.0, 1.0) ** math.exp(rng.uniform(-0.5, 0.6))
    low, high = rng.uniform(-0.15, 0.1), rng.uniform(0.75, 1.1)  # half of the views clip at black, a third at white
    return (low + (high - low) * image).clamp(0.0, 1.0)


def draw_view(rng: np.random.Generator, leaves: Pixels, height: int, width: int) -> Tensor:
    """Draw one photograph-like picture [1, 3, height, width] in [-1, 1] from a pool of square leaves."""
    image = _window(rng, leaves, height, width)
    if rng.random() < MIX_SHARE:
        behind = _window(rng, leaves, height, width)
        mask = _soft_mask(rng, height, width)
        image = mask * image + (1.0 - mask) * _blur(behind, math.exp(rng.uniform(0.0, math.log(12.0))))
    if rng.random() < 0.3:
        image = _blur(image, rng.uniform(0.7, 3.0))
    image = _color(rng, image)
    if rng.random() < 0.4:
        grain = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
        image = (image + rng.uniform(0.0, 0.02) * grain).clamp(0.0, 1.0)
    return image * 2.0 - 1.0


def draw_scene_view(rng: np.random.Generator, scenes: Pixels, height: int, width: int) -> Tensor:
    """Draw a whole captioned scene [1, 3, height, width] in [-1, 1]."""
    image = torch.from_numpy(np.array(scenes[rng.integers(len(scenes))])).permute(2, 0, 1)[None] / 255.0
    image = _resize(image, height, width)
    image = image.flip(3) if rng.random() < 0.5 else image
    return (image * rng.uniform(0.75, 1.1)).clamp(0.0, 1.0) * 2.0 - 1.0


@dataclass(frozen=True)
class Pairs:
    """Encoded pictures of one size: `latents[1]` at full size, `latents[2]` and `latents[4]` reduced."""

    latents: dict[int, Tensor]
    pictures: Pixels

    @property
    def units(self) -> float:
        """Size of one picture in squares of `UNIT_PX`."""
        _, height, width, _ = self.pictures.shape
        return int(height) * int(width) / UNIT_PX**2

    def latents_at(self, places: NDArray[np.int64], scale: int) -> tuple[Tensor, Tensor]:
        """Return the pairs at these indices: small [n, 16, h / scale, w / scale], large [n, 16, h, w]."""
        index = torch.from_numpy(places)
        return self.latents[scale][index].float(), self.latents[1][index].float()

    def pictures_at(self, places: NDArray[np.int64]) -> Tensor:
        """Return the pictures at these indices, [n, 3, 8 h, 8 w] in [-1, 1]."""
        return torch.from_numpy(self.pictures[places]).permute(0, 3, 1, 2) / 127.5 - 1.0


@torch.no_grad()
def write_pairs(
    vae: AutoencoderKL, source: Pictures, folder: Path, units: int, seed: int, sizes_px: Sizes = SIZES_PX
) -> None:
    """Draw views of every size, `units` squares of 256 px in total, and encode each at full, half and quarter size.

    Writes `<height>x<width>.npy` with the pictures and `.pt` with the latents in float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for height, width in sizes_px:
        rng = np.random.default_rng((seed, height, width))
        per_picture = height * width / UNIT_PX**2
        count = max(1, round(units / len(sizes_px) / per_picture))
        batch = max(1, int(ENCODE_UNITS / per_picture))
        pictures = np.empty((count, height, width, 3), dtype=np.uint8)
        parts: dict[int, list[Tensor]] = {scale: [] for scale in (1, *SCALES)}
        for start in tqdm(range(0, count, batch), desc=f"pairs of {height} x {width} px", unit=f"{batch} img"):
            views = [
                draw_scene_view(rng, source.scenes, height, width)
                if rng.random() < SCENE_SHARE
                else draw_view(rng, source.leaves, height, width)
                for _ in range(min(batch, count - start))
            ]
            levels = ((torch.cat(views) + 1.0) * 127.5).round()
            pictures[start : start + len(levels)] = levels.byte().permute(0, 2, 3, 1).numpy()
            images = levels / 127.5 - 1.0
            for scale, latents in parts.items():
                small = images if scale == 1 else shrink(images, scale)
                # bfloat16 is 10 times faster here and changes a code by 0.2 to 0.9 % of its deviation.
                with torch.autocast("cpu", torch.bfloat16):
                    latents.append(vae.encode(small).latent_dist.mode().half().contiguous())
        np.save(folder / f"{height}x{width}.npy", pictures, allow_pickle=False)
        torch.save({str(s): torch.cat(latents) for s, latents in parts.items()}, folder / f"{height}x{width}.pt")


def read_pairs(folder: Path) -> list[Pairs]:
    """Open the output of `write_pairs`, one entry per size.

    Raises:
        FileNotFoundError: There are no pairs in the folder.
    """
    groups = []
    for path in sorted(folder.glob("*.pt")):
        latents = torch.load(path, weights_only=True)
        pictures = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        groups.append(Pairs({int(scale): value for scale, value in latents.items()}, pictures))
    if not groups:
        raise FileNotFoundError(f"no pairs in {folder}; run `python -m giantleap.training.pocket pairs`")
    return groups
