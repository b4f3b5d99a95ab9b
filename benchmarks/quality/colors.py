"""Reads colors from drawn scenes: of floor and sky in fixed strips, of an object where its mask must be."""

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.training.pocket.drawing.captions import COLORS, Slots
from giantleap.training.pocket.drawing.scenes import PALETTE, plain_scene, render

SKY_ROWS = (0.02, 0.14)  # above every object
FLOOR_ROWS = (0.90, 0.98)  # below every object
SHADES = (0.5, 0.65, 0.8, 1.0)  # brightness of an object's faces


def read_color(pixels: Tensor, shades: tuple[float, ...] = (1.0,)) -> str:
    """Return the palette color nearest to most of the pixels [n, 3] in 0..1."""
    palette = torch.tensor([[c * shade for c in PALETTE[name]] for name in COLORS for shade in shades])
    votes = torch.cdist(pixels, palette).argmin(1) // len(shades)
    return COLORS[int(votes.bincount(minlength=len(COLORS)).argmax())]


def object_core(slots: Slots, image_px: int) -> Tensor:
    """Return the mask [image_px, image_px] of the requested object, eroded by 4 % of the frame."""
    _, mask = render([plain_scene(slots)], image_px)
    margin = max(1, round(0.04 * image_px))
    eroded = -F.max_pool2d(-mask, 2 * margin + 1, 1, margin)
    core = eroded if (eroded > 0.99).sum() >= 16 else mask
    return core[0, 0] > 0.99
