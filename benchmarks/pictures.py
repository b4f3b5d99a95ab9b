"""Draws the pictures that the benchmarks of training use: dead leaves and rendered scenes, no photograph."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from giantleap.models.atomic_file import replacing
from giantleap.training.pocket.drawing.leaves import read_leaf_pool
from giantleap.training.pocket.drawing.photographs import cut_crop
from giantleap.training.pocket.drawing.still_life import draw_still_life, render_still_life
from giantleap.training.pocket.pictures import to_pixels

SCENE_SHARE = 0.12
LEAVES_PX = 512

Pixels = NDArray[np.uint8]


def read_leaves(folder: Path, count: int, seed: int) -> Pixels:
    """Open the pool of dead leaves [count, side, side, 3], drawn on first use."""
    return read_leaf_pool(folder, count, LEAVES_PX, seed, processes=1)


def draw_picture(rng: np.random.Generator, leaves: Pixels, side_px: int) -> Pixels:
    """Draw one picture [side_px, side_px, 3]."""
    if rng.random() < SCENE_SHARE:
        return to_pixels(render_still_life(draw_still_life(rng), side_px))
    return cut_crop(rng, leaves[int(rng.integers(len(leaves)))], side_px)


def write_pictures(folder: Path, leaves: Pixels, numbers: range, side_px: int) -> None:
    """Draw the pictures that are missing; each follows from its number and the leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in tqdm(numbers, desc="pictures"):
        path = folder / f"{number:06d}.png"
        if not path.is_file():
            pixels = draw_picture(np.random.default_rng((4, number)), leaves, side_px)
            with replacing(path) as file:
                Image.fromarray(np.ascontiguousarray(pixels)).save(file, "png", compress_level=1)
