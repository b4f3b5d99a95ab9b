"""Six real photographs that no training has seen, and what the pocket bundle makes of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image
from torch import Tensor
from tqdm import tqdm

from benchmarks.quality.routes import SCALES, Networks, Scores, psnr_db, score
from giantleap.training.evaluation.cases import shrink
from giantleap.training.evaluation.perceptual import Jod

MULTIPLE_PX = 32  # a quarter of the side must be whole latents
SIZES = {"full": 1, "half": 2, "quarter": 4}
CELL_PX = 128  # side of a crop on the contact sheet, shown twice as large


@dataclass(frozen=True)
class Photo:
    """One photograph and its versions, each [1, 3, height, width] in [-1, 1].

    Args:
        original: The photograph.
        round_trips: By the names of `SIZES`: the picture of that size, and what the VAE returns.
        enlarged: By scale and method.
    """

    original: Tensor
    round_trips: Mapping[str, tuple[Tensor, Tensor]]
    enlarged: Mapping[int, Mapping[str, Tensor]]

    def round_trip_db(self) -> dict[str, float]:
        """Return the PSNR of the round trip by size."""
        return {size: psnr_db(decoded, picture) for size, (picture, decoded) in self.round_trips.items()}

    def scores(self, jod: Jod | None = None) -> dict[int, Scores]:
        """Compare every method with the photograph, by scale."""
        return {scale: score(dict(pictures), self.original, jod) for scale, pictures in self.enlarged.items()}


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


def enlarge_photo(networks: Networks, original: Tensor) -> Photo:
    """Send one photograph through every route; small versions are antialiased bicubic in 8 bits."""
    sized = {name: shrink(original, factor) if factor > 1 else original for name, factor in SIZES.items()}
    return Photo(
        original,
        {name: (picture, networks.round_trip(picture)) for name, picture in sized.items()},
        {scale: networks.enlarge(shrink(original, scale), scale) for scale in SCALES},
    )


def enlarge_photos(networks: Networks) -> dict[str, Photo]:
    """Send all photographs through every route."""
    return {name: enlarge_photo(networks, each) for name, each in tqdm(read_photos().items(), desc="photos")}


def write_photo_sheet(photos: Mapping[str, Photo], path: Path) -> None:
    """Write one row of center crops per photograph, pixels doubled."""
    titles = ("x4 decoded, then bicubic", "x4 LUA", "x4 SwinIR", "x2 decoded, then bicubic", "x2 LUA", "original")
    side, head = 2 * CELL_PX, 20
    sheet = Image.new("RGB", (len(titles) * side, head + len(photos) * side), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((column * side + 4, 4), title, fill="black")
    for row, photo in enumerate(photos.values()):
        large, double = photo.enlarged[4], photo.enlarged[2]
        cells = (large["resized"], large["lua"], large["swinir"], double["resized"], double["lua"], photo.original)
        for column, picture in enumerate(cells):
            offset = (picture.shape[-1] - CELL_PX) // 2
            crop = picture[0, :, offset : offset + CELL_PX, offset : offset + CELL_PX].clamp(-1.0, 1.0)
            pixels = ((crop.permute(1, 2, 0) + 1.0) * 127.5).round().byte().numpy()
            cell = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(cell, (column * side, head + row * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
