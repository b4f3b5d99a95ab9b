"""A sheet of the same crop of every method's image: one row per scale, one column per method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

HEAD_PX = 20
CELL_PX = 256


def write_sheet(rows: Sequence[tuple[str, Mapping[str, Image.Image]]], path: Path) -> None:
    """Write one row per scale and one column per method, all of the same central crop.

    Args:
        rows: A title and the images by name; one named "base" is that at scale 1.
        path: Where the sheet goes; its directory is made.
    """
    columns = list(dict.fromkeys(name for _, images in rows for name in images))
    sheet = Image.new("RGB", (len(columns) * CELL_PX, len(rows) * (HEAD_PX + CELL_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (title, images) in enumerate(rows):
        top = row * (HEAD_PX + CELL_PX)
        largest_px = max(image.width for image in images.values())
        for name, image in images.items():
            left = columns.index(name) * CELL_PX
            label = f"{title}: base, pixels repeated" if name == "base" else f"{name} {image.width}x{image.height} px"
            pen.text((left + 4, top + 4), label, fill="black")
            sheet.paste(to_cell(image, largest_px), (left, top + HEAD_PX))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def to_cell(image: Image.Image, largest_px: int) -> Image.Image:
    """Return the central crop at `CELL_PX`; pixels of images smaller than the row's largest are repeated."""
    side = min(image.width, CELL_PX * image.width // largest_px)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((CELL_PX, CELL_PX), Image.Resampling.NEAREST)
