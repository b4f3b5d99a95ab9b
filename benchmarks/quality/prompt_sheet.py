"""A contact sheet of prompts and what a pipeline drew for them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

_COLUMNS, _SIDE_PX, _LINE_PX, _LINE_LETTERS = 6, 192, 15, 32


def write_prompt_sheet(path: Path, prompts: Sequence[str], images: Tensor) -> None:
    """Write a sheet with the prompt below each image.

    Args:
        path: Where to write it; its directory is made.
        prompts: One for each image.
        images: [count, 3, height, width] in 0..1.
    """
    captions = [textwrap.wrap(text, _LINE_LETTERS) for text in prompts]
    foot_px = _LINE_PX * max(map(len, captions))
    rows = -(-len(captions) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _SIDE_PX, rows * (_SIDE_PX + foot_px)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (lines, image) in enumerate(zip(captions, images, strict=True)):
        left, top = index % _COLUMNS * _SIDE_PX, index // _COLUMNS * (_SIDE_PX + foot_px)
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        size = (_SIDE_PX - 4, _SIDE_PX - 4)
        sheet.paste(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS), (left + 2, top + 2))
        pen.multiline_text((left + 4, top + _SIDE_PX), "\n".join(lines), fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
