"""Procedural surfaces of the rendered scenes: noise, grounds, patterns on solids, and a sky with clouds and hills.

Colors are linear light, [3]; places are tensors of world coordinates of any one shape. Every pattern fades where it
becomes finer than a pixel, so that distant ground does not flicker. `training/pocket/drawing/still_life.py` renders
with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.training.pocket.drawing.leaves import fractal_noise

Color = tuple[float, float, float]

NOISE_PX = 256
GROUNDS = ("plain", "tiles", "planks", "sand", "stone")
PATTERNS = ("plain", "rings", "checker", "marble", "speckle", "wood")
PLANK = (0.30, 4.0)  # of a board, in tile sides: width and length


def to_linear(color: Sequence[float]) -> Tensor:
    """A display color as linear light."""
    return torch.tensor(color, dtype=torch.float32) ** 2.2


@dataclass(frozen=True)
class NoiseFields:
    """Tileable fields of unit deviation: a soft and a rough one; [1, 1, 256, 256]."""

    soft: Tensor
    rough: Tensor

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "NoiseFields":
        """Draws both."""
        soft, rough = (torch.from_numpy(fractal_noise(rng, NOISE_PX, slope))[None, None] for slope in (1.7, 1.0))
        return cls(soft, rough)


def sample(field: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Looks a noise field up at any places, repeating it; one unit is the whole field; bilinear.

    Shape:
        x and y of one shape, which is the result's.
    """
    places = torch.stack([x, y], dim=-1).remainder(1.0)
    grid = (places * NOISE_PX + 0.5) / (NOISE_PX + 1) * 2.0 - 1.0
    wrapped = F.pad(field, (0, 1, 0, 1), mode="circular")
    values = F.grid_sample(wrapped, grid.reshape(1, 1, -1, 2), mode="bilinear", align_corners=False)
    return values.reshape(x.shape)


def fade(footprint: Tensor, period: float) -> Tensor:
    """How much of a pattern is left where a pixel covers `footprint` of the world: 1 near, 0 below two pixels."""
    return torch.exp(-((1.6 * footprint / period) ** 2))


@dataclass(frozen=True)
class Ground:
    """The floor.

    Args:
        pattern: one of `GROUNDS`.
        color: display color of the greater part.
        contrast: of the pattern, 0 to 1.
        period: of the pattern in world units; the camera is 1 above the floor.
        yaw: of the pattern, radians.
    """

    pattern: str
    color: Color
    contrast: float
    period: float
    yaw: float

    def albedo(self, x: Tensor, z: Tensor, footprint: Tensor, noise: NoiseFields) -> Tensor:
        """Shape: places [h, w] to [3, h, w], linear."""
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        along, across = (cos * x + sin * z) / self.period, (cos * z - sin * x) / self.period
        grain = sample(noise.rough, along * 0.31, across * 0.31) * fade(footprint, 0.05 * self.period)
        level = 0.10 * sample(noise.soft, along * 0.11, across * 0.11) + 0.07 * grain
        if self.pattern == "tiles":
            level = level + _tiles(along, across) * fade(footprint, self.period)
        elif self.pattern == "planks":
            level = level + _planks(along, across, noise) * fade(footprint, PLANK[0] * self.period)
        elif self.pattern == "sand":
            ripple = torch.sin(6.3 * across + 2.0 * sample(noise.soft, along * 0.15, across * 0.15))
            level = level + (0.16 * ripple + 0.12 * grain) * fade(footprint, self.period)
        elif self.pattern == "stone":
            veins = sample(noise.soft, along * 0.23, across * 0.23).abs()
            level = level - 0.5 * torch.exp(-14.0 * veins) * fade(footprint, 0.15 * self.period) + 0.08 * grain
        return _tinted(self.color, self.contrast * level)


def _tinted(color: Color, level: Tensor) -> Tensor:
    """The color made lighter and darker by the logarithm `level`; [3, ...]."""
    return (to_linear(color).view(3, *([1] * level.ndim)) * torch.exp(1.6 * level)).clamp(0.0, 1.0)


def _tiles(along: Tensor, across: Tensor) -> Tensor:
    """A checker of light and dark tiles with darker joints."""
    parity = (along.floor() + across.floor()).remainder(2.0)
    joint = torch.maximum((along.remainder(1.0) - 0.5).abs(), (across.remainder(1.0) - 0.5).abs()) > 0.475
    return 0.9 * (parity - 0.5) - 0.6 * joint.float()


def _planks(along: Tensor, across: Tensor, noise: NoiseFields) -> Tensor:
    """Boards side by side, each with its own tone and grain."""
    row = (across / PLANK[0]).floor()
    shifted = along / PLANK[1] + 0.37 * row
    board = shifted.floor()
    tone = torch.sin(91.7 * row + 47.3 * board)
    grain = sample(noise.rough, along * 0.05 + 0.13 * row, across * 1.1 + 0.29 * board)
    gap = ((across / PLANK[0]).remainder(1.0) < 0.06) | (shifted.remainder(1.0) < 0.012)
    return 0.25 * tone + 0.16 * grain - 0.8 * gap.float()


@dataclass(frozen=True)
class Finish:
    """The surface of a solid.

    Args:
        pattern: one of `PATTERNS`.
        second: display color that the pattern mixes in.
        period: of the pattern, in heights of the solid.
        gloss: of its coat, 0 (matte) to 1 (polished).
    """

    pattern: str
    second: Color
    period: float
    gloss: float

    def mix(self, place: Tensor, footprint: Tensor, noise: NoiseFields) -> Tensor:
        """How much of the second color each place has.

        Shape:
            place [3, h, w], in heights of the solid, from its foot; returns [h, w].
        """
        x, y, z = place
        visible = fade(footprint, self.period)
        if self.pattern == "rings":
            share = _step(torch.sin(2.0 * np.pi * y / self.period))
        elif self.pattern == "checker":
            angle = torch.atan2(z, x) / (2.0 * np.pi)
            count = max(4, 2 * round(0.5 / self.period))
            share = _step(torch.sin(2.0 * np.pi * y / (2.0 * self.period)) * torch.sin(2.0 * np.pi * count * angle))
        elif self.pattern == "marble":
            warp = 2.2 * sample(noise.soft, 0.35 * x + 0.2 * z, 0.35 * y)
            share = 0.5 + 0.5 * torch.sin(2.0 * np.pi * (x + 0.6 * y + 0.4 * z) / (2.0 * self.period) + warp)
            share = share**3
        elif self.pattern == "speckle":
            share = _step(sample(noise.rough, 0.6 * x + 0.17 * z, 0.6 * y + 0.31 * z) - 0.9)
        elif self.pattern == "wood":
            radius = torch.hypot(x, z) + 0.05 * sample(noise.soft, 0.3 * x, 0.3 * z + 0.1 * y)
            share = 0.5 + 0.5 * torch.sin(2.0 * np.pi * (radius + 0.08 * y) / (0.6 * self.period))
        else:
            share = 0.12 * sample(noise.soft, 0.5 * x + 0.3 * z, 0.5 * y).clamp(-1.0, 1.0).abs()
        return share * visible


def _step(value: Tensor) -> Tensor:
    """A steep edge at zero."""
    return torch.sigmoid(24.0 * value)


@dataclass(frozen=True)
class Sky:
    """What lies behind everything.

    Args:
        color: display color of the upper sky.
        clouds: 0 (none) to 1 (many).
        hills: rows of hills at the horizon, 0 to 3.
        hill_color: display color of the nearest row.
        haze: share of gray in the color of the horizon.
    """

    color: Color
    clouds: float
    hills: int
    hill_color: Color
    haze: float = 0.55

    def horizon_color(self) -> Tensor:
        """What distance fades to; [3], linear."""
        return (1.0 - self.haze) * to_linear(self.color) + self.haze * torch.tensor([0.80, 0.82, 0.84])

    def radiance(self, u: Tensor, elevation: Tensor, noise: NoiseFields) -> Tensor:
        """Shape: across and above the horizon in frame heights, [h, w] each; returns [3, h, w], linear."""
        height = elevation.clamp(0.0, 1.0)
        blend = torch.exp(-5.0 * height)
        sky = (1.0 - blend) * to_linear(self.color).view(3, 1, 1) + blend * self.horizon_color().view(3, 1, 1)
        if self.clouds > 0.0:
            depth = 0.35 / (height + 0.10)
            shape = sample(noise.soft, 0.21 * u * depth, 0.21 * depth) + 0.35 * sample(
                noise.rough, 0.4 * u, 0.9 * height
            )
            cover = torch.sigmoid(5.0 * (shape - 1.3 + 1.5 * self.clouds)) * (1.0 - torch.exp(-8.0 * height))
            light = 0.95 - 0.18 * torch.sigmoid(4.0 * (shape - 1.2))
            sky = sky + 0.85 * cover * (light - sky)
        for row in range(self.hills):
            sky = self._with_hill(sky, u, elevation, noise, row)
        return sky

    def _with_hill(self, sky: Tensor, u: Tensor, elevation: Tensor, noise: NoiseFields, row: int) -> Tensor:
        """Lays one row of hills over the sky; farther rows, drawn first, are higher and paler."""
        near = (row + 1) / self.hills
        across = (0.25 + 0.12 * near) * u + 0.37 * row
        crest = 0.085 - 0.05 * near + 0.028 * sample(noise.soft, across, torch.full_like(u, 0.1 + 0.3 * row))
        crest = crest + 0.004 * sample(noise.rough, across * 3.0, torch.full_like(u, 0.7 * near))
        cover = ((crest - elevation) * 500.0 + 0.5).clamp(0.0, 1.0)
        grain = 0.35 * near * sample(noise.rough, 2.0 * u, 6.0 * elevation + 0.3 * row)
        color = _tinted(self.hill_color, 0.4 * grain)
        haze = self.horizon_color().view(3, 1, 1)
        return sky + cover * ((0.3 + 0.5 * near) * color + (0.7 - 0.5 * near) * haze - sky)
