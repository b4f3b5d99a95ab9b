"""The pictures that the pocket autoencoder of stride 4 trains on: photographs, dead leaves and rendered scenes.

All pools are square 8-bit pictures in memory-mapped files, drawn or cut on first use. A batch mixes them by `SHARES`;
a third of it is shown at half the size, since an upscaler lives on what the autoencoder keeps of small pictures.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from giantleap.models.atomic_file import replacing
from giantleap.training.losses import shrink
from giantleap.training.pocket.drawing.leaves import read_leaf_pool
from giantleap.training.pocket.drawing.photographs import (
    HELD_OUT,
    PHOTOGRAPHS,
    cut_crop,
    fetch_photographs,
    read_crops,
    read_photograph,
)
from giantleap.training.pocket.drawing.prompts import draw_prompt
from giantleap.training.pocket.drawing.scenes import draw_scene, render
from giantleap.training.pocket.drawing.still_life import draw_still_life, render_still_life
from giantleap.training.pocket.studio import draw_studio

Pixels = NDArray[np.uint8]
SceneKind = Literal["calm", "drawn"]  # studio scenes, and still lifes

CROP_PX = 256
SHARES = (0.65, 0.2, 0.15)  # photographs, leaves, scenes
HALF_SHARE = 0.35
STILL_LIFE_SHARE, LEAF_SHARE = 0.12, 0.12  # of the pictures for the adapter; the rest are photographs
LARGE_PX = 512  # of the scenes that are cut: a scene of 128 px at x4
CUTS, CANDIDATES = 3, 3
# Codes of a mirrored picture are other codes: shown one way only, the adapter memorizes scenes (1 dB less at x2).
ORIENTATIONS = 8
# An adapter learns nothing from smooth pictures: one is a drawn gradient, one is mostly out of focus.
WEIGHTS = {"umang_by_Abhishek_Mudgal.jpg": 0.1, "seeding_by_Clements_Engelhardt.jpg": 0.5}
HELD_OUT_SCENES = 8
HELD_OUT_SEED = 20261130
PERMUTED_SHARE = 0.3  # of the crops have their color channels permuted
GAIN = (0.75, 1.1)


@dataclass(frozen=True)
class PictureCounts:
    """How many pictures each pool has."""

    photographs: int = 1600
    leaves: int = 160
    scenes: int = 120
    held_out: int = 20


@dataclass(frozen=True)
class PicturePools:
    """Pools in the order of `SHARES`; each [n, side, side, 3]."""

    pools: tuple[Pixels, ...]

    def crops(self, rng: np.random.Generator, count: int, size_px: int) -> Tensor:
        """Cuts random crops with random flips, transposes, color permutations and gains.

        Shape:
            returns [count, 3, size_px, size_px] in [-1, 1], channels last.
        """
        images = [self._crop(rng, size_px) for _ in range(count)]
        return torch.cat(images).contiguous(memory_format=torch.channels_last)

    def _crop(self, rng: np.random.Generator, size_px: int) -> Tensor:
        pool = self.pools[int(rng.choice(len(self.pools), p=SHARES))]
        factor = 2 if rng.random() < HALF_SHARE else 1
        side = size_px * factor
        top, left = (int(place) for place in rng.integers(0, pool.shape[1] - side + 1, 2))
        crop = pool[int(rng.integers(len(pool))), top : top + side, left : left + side]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        if rng.random() < 0.5:
            crop = crop.transpose(1, 0, 2)
        if rng.random() < PERMUTED_SHARE:
            crop = crop[:, :, rng.permutation(3)]
        scaled = crop.astype(np.float32) * np.float32(rng.uniform(*GAIN) / 127.5)
        image = torch.from_numpy(scaled).permute(2, 0, 1)[None] - 1.0
        return (shrink(image, factor) if factor > 1 else image).clamp(-1.0, 1.0)


def read_pools(folder: Path, counts: PictureCounts, seed: int) -> PicturePools:
    """Opens the pools to train on."""
    photographs = read_crops(folder, PHOTOGRAPHS, counts.photographs, CROP_PX, seed, "photographs")
    leaves = read_leaf_pool(folder, counts.leaves, 2 * CROP_PX, seed, processes=1)
    return PicturePools((photographs, leaves, read_scenes(folder, counts.scenes, seed)))


def read_held_out(folder: Path, counts: PictureCounts, seed: int) -> Tensor:
    """The crops of the wallpaper that no training sees.

    Shape:
        returns [n, 3, 256, 256] in [-1, 1].
    """
    return to_images(read_crops(folder, HELD_OUT, counts.held_out, CROP_PX, seed + 1, "held_out"))


def read_scenes(folder: Path, count: int, seed: int) -> Pixels:
    """Opens the rendered scenes, rendering them on first use.

    Effects:
        Writes `rendered_<seed>_<size>_<count>.npy` into the folder, once.
    """
    path = folder / f"rendered_{seed}_{CROP_PX}_{count}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        scenes = [draw_scene(np.random.default_rng((seed, index))) for index in range(count)]
        images = torch.cat([render([scene], CROP_PX)[0] for scene in scenes])
        with replacing(path) as file:
            np.save(file, (images * 255.0).round().byte().permute(0, 2, 3, 1).numpy(), allow_pickle=False)
    pool: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    return pool


def to_images(pixels: Pixels) -> Tensor:
    """Shape: [n, height, width, 3] in 0..255 to [n, 3, height, width] in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2) / 127.5 - 1.0


def write_pictures(out: Path, folder: Path, count: int, seed: int) -> None:
    """Writes pictures of 256 x 256 px for `giantleap train prepare`, and after them, by name, the held-out ones.

    Args:
        out: where the PNG files go.
        folder: of the pools.
        count: pictures to train on; each follows from the seed and its number.

    Effects:
        Leaves pictures to train on alone where they are there, so that a stopped run goes on.
    """
    counts = PictureCounts()
    directory = fetch_photographs(folder)
    photographs = [read_photograph(directory / photograph.file) for photograph in PHOTOGRAPHS]
    areas = np.array([photograph.shape[0] * photograph.shape[1] for photograph in photographs], dtype=np.float64)
    areas *= [WEIGHTS.get(photograph.file, 1.0) for photograph in PHOTOGRAPHS]
    leaves = read_leaf_pool(folder, counts.leaves, 2 * CROP_PX, seed, processes=1)
    out.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(count), desc="pictures", unit="img"):
        path, rng = out / f"{index:06d}.png", np.random.default_rng((seed, 2, index))
        if path.is_file():
            continue
        kind = rng.random()
        if kind < STILL_LIFE_SHARE:
            picture = to_pixels(render_still_life(draw_still_life(rng), CROP_PX))
        elif kind < STILL_LIFE_SHARE + LEAF_SHARE:
            picture = cut_crop(rng, leaves[int(rng.integers(len(leaves)))], CROP_PX)
        else:
            picture = cut_crop(rng, photographs[rng.choice(len(photographs), p=areas / areas.sum())], CROP_PX)
        _write_png(path, orient(picture, int(rng.integers(ORIENTATIONS))))
    for index, picture in enumerate(read_crops(folder, HELD_OUT, counts.held_out, CROP_PX, seed + 1, "held_out")):
        _write_png(out / f"held_out_{index:02d}.png", picture)
    for index in range(HELD_OUT_SCENES):
        _write_png(out / f"held_out_scene_{index:02d}.png", to_pixels(draw_held_out_scene(index, CROP_PX)))


def write_scenes(out: Path, kind: SceneKind, count: int, seed: int, orientations: int = 4) -> None:
    """Writes scenes of 512 px as four pictures each, in so many of eight orientations.

    A picture is the whole at half its size, or a detailed part. The whole is a scene of 128 px and its x2, the parts
    are what x4 makes of such a scene.

    Effects:
        Leaves scenes alone that are there, so that a stopped run goes on. The files sort before the held-out ones.
    """
    out.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(count), desc=f"scenes ({kind})", unit="img"):
        last = out / f"{kind}_{index:05d}_whole_{orientations - 1}.png"
        rng, turns = np.random.default_rng((seed, 3, index)), np.random.default_rng((seed, 4, index))
        if last.is_file():
            continue
        scene = draw_still_life(rng) if kind == "drawn" else draw_studio(rng, draw_prompt(rng))
        image = render_still_life(scene, LARGE_PX)
        parts = {str(cut): _cut_detail(rng, to_pixels(image)) for cut in range(CUTS)}
        parts["whole"] = to_pixels(shrink(image[None], LARGE_PX // CROP_PX)[0].clamp(0.0, 1.0))
        for name, picture in parts.items():
            for number, turn in enumerate(turns.choice(ORIENTATIONS, orientations, replace=False)):
                _write_png(out / f"{kind}_{index:05d}_{name}_{number}.png", orient(picture, int(turn)))


def _cut_detail(rng: np.random.Generator, pixels: Pixels) -> Pixels:
    """The most detailed of some windows of 256 px, at the scene's own scale."""
    places = rng.integers(0, LARGE_PX - CROP_PX + 1, (CANDIDATES, 2))
    windows = [pixels[top : top + CROP_PX, left : left + CROP_PX] for top, left in places]
    return max(windows, key=lambda window: float(np.abs(np.diff(window.astype(np.float32), axis=1)).mean()))


def orient(picture: Pixels, turn: int) -> Pixels:
    """One of the eight orientations of a square picture: quarter turns, and from 4 on those of its mirror image."""
    turned: Pixels = np.rot90(picture[:, ::-1] if turn >= ORIENTATIONS // 2 else picture, turn)
    return turned


def draw_held_out_scene(index: int, image_px: int, samples: int = 2) -> Tensor:
    """One of the scenes that no training sees; [3, image_px, image_px] in 0..1."""
    return render_still_life(draw_still_life(np.random.default_rng((HELD_OUT_SEED, index))), image_px, samples)


def to_pixels(image: Tensor) -> Pixels:
    """Shape: [3, height, width] in 0..1 to [height, width, 3] in 0..255."""
    pixels: Pixels = (image * 255.0).round().byte().permute(1, 2, 0).numpy()
    return pixels


def _write_png(path: Path, picture: Pixels) -> None:
    Image.fromarray(np.ascontiguousarray(picture)).save(path, compress_level=1)
