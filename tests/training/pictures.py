"""Small pictures for the tests of the training, each another one."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(folder: Path, count: int, width_px: int, height_px: int) -> None:
    """Writes soft colored noise as PNG, `picture-0.png` and so on; the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        coarse = rng.integers(0, 256, (height_px // 8, width_px // 8, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width_px, height_px), Image.Resampling.BICUBIC)
        smooth.save(folder / f"picture-{number}.png")
