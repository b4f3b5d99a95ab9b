"""Rendered scenes with something to enlarge: several solids, soft shadows, textures, reflections, depth and a sky.

One ray per subpixel meets the closed-form solids of `training/pocket/drawing/scenes.py`; the light is a disk, shadows
are the share of it that is seen. The six slots of a caption describe the main solid, the floor's and the sky's color,
as in the plain scenes. A scene follows from its seed. Surfaces are in `training/pocket/drawing/surfaces.py`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from giantleap.training.losses import shrink
from giantleap.training.pocket.drawing.captions import COLORS, SHAPES, Slots, draw_slots
from giantleap.training.pocket.drawing.scenes import FOCAL, PALETTE, Scene, Vector, draw_scene, hit
from giantleap.training.pocket.drawing.surfaces import (
    GROUNDS,
    PATTERNS,
    Color,
    Finish,
    Ground,
    NoiseFields,
    Sky,
    to_linear,
)

LIGHT_SAMPLES = 10  # per subpixel
AMBIENT = 0.42
HILL_COLORS: tuple[Color, ...] = ((0.25, 0.36, 0.22), (0.30, 0.33, 0.42), (0.45, 0.36, 0.28), (0.22, 0.30, 0.34))
RADIUS = {"sphere": 0.46, "cube": 0.62, "cylinder": 0.45, "cone": 0.44}  # about, in heights


@dataclass(frozen=True)
class Solid:
    """One object on the floor.

    Args:
        shape: one of `SHAPES`.
        color: display color.
        x, z: of its foot; the camera is at 0, 0, at height 1, and looks along z.
        height: in world units.
        yaw: radians.
        finish: its surface.
    """

    shape: str
    color: Color
    x: float
    z: float
    height: float
    yaw: float
    finish: Finish

    def hit(self, origin: Vector, ray: Vector) -> tuple[Tensor, Vector]:
        """Distance along the ray, infinite where it misses, and the outer normal."""
        local = (origin[0] - self.x, origin[1], origin[2] - self.z)
        return hit(self.shape, local, ray, torch.tensor(self.height), torch.tensor(self.yaw))


@dataclass(frozen=True)
class StillLife:
    """A whole scene; what its caption says and what it leaves open."""

    slots: Slots
    solids: tuple[Solid, ...]
    ground: Ground
    sky: Sky
    horizon_y: float
    light: tuple[float, float, float]
    light_radius: float
    warmth: float
    exposure: float
    noise_seed: int


def draw_still_life(rng: np.random.Generator, slots: Slots | None = None) -> StillLife:
    """Draws a scene; the slots too where none are given."""
    slots = slots or draw_slots(rng)
    plain = draw_scene(rng, slots)
    solids = [place_solid(plain, draw_finish(rng))]
    for _ in range(int(rng.integers(0, 5))):
        other = _draw_other(rng, slots, solids[0].z)
        if all(_apart(other, solid) for solid in solids):
            solids.append(other)
    return StillLife(
        slots=slots,
        solids=tuple(solids),
        ground=Ground(
            pattern=str(rng.choice(GROUNDS)),
            color=PALETTE[str(slots.floor)],
            contrast=rng.uniform(0.3, 1.0),
            period=rng.uniform(0.25, 0.8),
            yaw=rng.uniform(0.0, 1.57),
        ),
        sky=Sky(
            color=PALETTE[str(slots.sky)],
            clouds=max(0.0, rng.uniform(-0.3, 0.8)),
            hills=int(rng.integers(0, 4)),
            hill_color=HILL_COLORS[int(rng.integers(len(HILL_COLORS)))],
        ),
        horizon_y=plain.horizon_y,
        light=(plain.light_x, 1.0, plain.light_z),
        light_radius=rng.uniform(0.02, 0.16),
        warmth=rng.uniform(-0.5, 1.0),
        exposure=rng.uniform(0.9, 1.15),
        noise_seed=int(rng.integers(2**31)),
    )


def place_solid(plain: Scene, finish: Finish) -> Solid:
    """The object of a plain scene in the world."""
    depth = FOCAL / (plain.foot_y - plain.horizon_y)
    return Solid(
        shape=str(plain.slots.shape),
        color=PALETTE[str(plain.slots.color)],
        x=(plain.center_x - 0.5) * depth / FOCAL,
        z=depth,
        height=plain.height * depth / FOCAL,
        yaw=plain.yaw,
        finish=finish,
    )


def draw_finish(rng: np.random.Generator) -> Finish:
    """Draws a surface; four in ten are plain, so that the color of the caption stays the color that is seen."""
    pattern = "plain" if rng.random() < 0.4 else str(rng.choice(PATTERNS))
    second = PALETTE[str(rng.choice(COLORS))] if rng.random() < 0.5 else PALETTE["white"]
    return Finish(pattern, second, rng.uniform(0.12, 0.5), float(rng.choice((0.0, rng.uniform(0.2, 1.0)))))


def _draw_other(rng: np.random.Generator, slots: Slots, depth: float) -> Solid:
    """A smaller solid somewhere on the floor, of another color than the main one."""
    colors = [color for color in COLORS if color != slots.color]
    z = depth * rng.uniform(0.75, 2.2)
    return Solid(
        shape=str(rng.choice(SHAPES)),
        color=PALETTE[str(rng.choice(colors))],
        x=rng.uniform(-0.55, 0.55) * z / FOCAL,
        z=z,
        height=rng.uniform(0.25, 0.8),
        yaw=rng.uniform(0.0, 1.57),
        finish=draw_finish(rng),
    )


def _apart(one: Solid, other: Solid) -> bool:
    """Whether two solids do not touch, and the smaller does not hide the other."""
    reach = RADIUS[one.shape] * one.height + RADIUS[other.shape] * other.height
    across = abs(one.x / one.z - other.x / other.z) * FOCAL
    widths = RADIUS[one.shape] * one.height / one.z + RADIUS[other.shape] * other.height / other.z
    return bool(np.hypot(one.x - other.x, one.z - other.z) > 1.1 * reach and across > 0.8 * widths * FOCAL)


@dataclass(frozen=True)
class Points:
    """What the rays see: places, normals, what is there (-1 sky, 0 floor, 1.. solids) and how far; [h, w] each."""

    place: Vector
    normal: Vector
    index: Tensor
    distance: Tensor


@torch.no_grad()
def render_still_life(scene: StillLife, image_px: int = 256, samples: int = 2) -> Tensor:
    """Renders one scene.

    Shape:
        returns [3, image_px, image_px] in 0..1.
    """
    side = image_px * samples
    axis = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    up, across = scene.horizon_y - axis.view(-1, 1), axis.view(1, -1) - 0.5
    full = torch.zeros(side, side)
    ray = (across + full, up + full, full + FOCAL)
    noise = NoiseFields.draw(np.random.default_rng(scene.noise_seed))
    points = _trace(scene, ray)
    footprint = points.distance / side  # width of a subpixel in the world
    albedo, gloss = _surfaces(scene, points, footprint, noise)
    lit = _light(scene, points, albedo)
    lit = lit + gloss * _mirrored(scene, points, ray, noise)
    haze = 1.0 - torch.exp(-0.035 * (points.distance - 3.0).clamp(min=0.0))
    lit = lit + haze * (scene.sky.horizon_color().view(3, 1, 1) - lit)
    is_sky = points.index < 0
    linear = torch.where(is_sky, scene.sky.radiance(ray[0], ray[1], noise), lit)
    display = (scene.exposure * linear).clamp(0.0, 1.0) ** (1.0 / 2.2)
    # The filter by which all pictures here are shrunk, so that a scene rendered small is the large one shrunk.
    return shrink(display[None], samples)[0].clamp(0.0, 1.0)


def _trace(scene: StillLife, ray: Vector) -> Points:
    """The nearest of floor and solids along each ray from the camera."""
    full = torch.zeros_like(ray[0])
    origin = (full, full + 1.0, full)
    is_down = ray[1] < -1e-3
    distance = torch.where(is_down, -1.0 / ray[1].clamp(max=-1e-3), torch.inf)
    index = torch.where(is_down, 0, -1)
    normal = (full, full + 1.0, full)
    for number, solid in enumerate(scene.solids, start=1):
        t, outer = solid.hit(origin, ray)
        nearer = t < distance
        distance = torch.where(nearer, t, distance)
        index = torch.where(nearer, number, index)
        normal = _choose(nearer, outer, normal)
    finite = torch.where(distance.isfinite(), distance, 0.0)
    place = (ray[0] * finite, 1.0 + ray[1] * finite, ray[2] * finite)
    return Points(place, normal, index, finite)


def _choose(mask: Tensor, one: Vector, other: Vector) -> Vector:
    x, y, z = (torch.where(mask, a, b) for a, b in zip(one, other, strict=True))
    return x, y, z


def _surfaces(scene: StillLife, points: Points, footprint: Tensor, noise: NoiseFields) -> tuple[Tensor, Tensor]:
    """Albedo [3, h, w] and gloss [h, w] of every place."""
    albedo = scene.ground.albedo(points.place[0], points.place[2], footprint * 1.5, noise)
    gloss = torch.zeros_like(footprint)
    for number, solid in enumerate(scene.solids, start=1):
        here = points.index == number
        x, y, z = points.place[0] - solid.x, points.place[1], points.place[2] - solid.z
        cos, sin = np.cos(solid.yaw), np.sin(solid.yaw)
        local = torch.stack([cos * x - sin * z, y, sin * x + cos * z]) / solid.height
        share = solid.finish.mix(local, footprint / solid.height, noise)
        first, second = to_linear(solid.color).view(3, 1, 1), to_linear(solid.finish.second).view(3, 1, 1)
        albedo = torch.where(here, first + share * (second - first), albedo)
        gloss = torch.where(here, solid.finish.gloss, gloss)
    return albedo, gloss


def _light(scene: StillLife, points: Points, albedo: Tensor) -> Tensor:
    """Sun with soft shadows, and light from the sky and the floor, less where solids stand close; [3, h, w]."""
    direct = _sunlight(scene, points)
    sun = torch.tensor([1.0 + 0.08 * scene.warmth, 1.0, 1.0 - 0.14 * scene.warmth]).view(3, 1, 1)
    upward = 0.5 + 0.5 * points.normal[1]
    sky_light = (0.6 + 0.4 * scene.sky.horizon_color()).view(3, 1, 1)
    bounce = 0.55 * to_linear(scene.ground.color).view(3, 1, 1) + 0.1
    ambient = upward * sky_light + (1.0 - upward) * bounce
    return albedo * ((1.0 - AMBIENT) * 1.25 * direct * sun + AMBIENT * _openness(scene, points) * ambient)


def _openness(scene: StillLife, points: Points) -> Tensor:
    """Share of the sky that solids leave open, each as the sphere round it.

    Ref: I. Quilez, "Sphere ambient occlusion": cosine times squared apparent radius.
    """
    openness = torch.ones_like(points.distance)
    for number, solid in enumerate(scene.solids, start=1):
        radius = 0.5 * solid.height
        toward = (solid.x - points.place[0], radius - points.place[1], solid.z - points.place[2])
        square = sum((part * part for part in toward), torch.zeros_like(openness))
        cosine = sum((n * part for n, part in zip(points.normal, toward, strict=True)), torch.zeros_like(square))
        hidden = (cosine / square.sqrt().clamp(min=1e-3)).clamp(min=0.0) * (radius**2 / square.clamp(min=1e-6))
        openness = openness * torch.where(points.index == number, 1.0, 1.0 - 0.8 * hidden.clamp(max=1.0))
    return openness


def _sunlight(scene: StillLife, points: Points) -> Tensor:
    """Cosine of the sun times the share of its disk that is seen; the four subpixels look at different points of it."""
    side = points.distance.shape[0]
    toward = torch.tensor(scene.light)
    toward = toward / toward.norm()
    tangent = torch.linalg.cross(toward, torch.tensor([0.0, 0.0, 1.0]))
    tangent = tangent / tangent.norm()
    second = torch.linalg.cross(toward, tangent)
    phase = (torch.arange(side) % 2).view(-1, 1) * 2 + (torch.arange(side) % 2).view(1, -1)
    start = tuple(p + 1e-3 * n for p, n in zip(points.place, points.normal, strict=True))
    total = torch.zeros(side, side)
    for number in range(LIGHT_SAMPLES):
        turn = (4 * number + phase + 0.5) / (4 * LIGHT_SAMPLES)
        radius, angle = scene.light_radius * turn.sqrt(), 2.399963 * (4 * number + phase)
        x, y, z = (toward[i] + radius * (angle.cos() * tangent[i] + angle.sin() * second[i]) for i in range(3))
        cosine = sum((n * d for n, d in zip(points.normal, (x, y, z), strict=True)), torch.zeros(side, side))
        visible = torch.ones(side, side)
        for solid in scene.solids:
            t, _ = solid.hit((start[0], start[1], start[2]), (x, y, z))
            visible = torch.where(t.isfinite(), 0.0, visible)
        total += visible * cosine.clamp(min=0.0)
    return total / LIGHT_SAMPLES


def _mirrored(scene: StillLife, points: Points, ray: Vector, noise: NoiseFields) -> Tensor:
    """What a polished coat adds: the mirrored sky or floor by Schlick's law, and the sun's highlight; [3, h, w]."""
    length = sum((part * part for part in ray), torch.zeros_like(ray[0])).sqrt()
    view = tuple(part / length for part in ray)
    facing = sum((n * v for n, v in zip(points.normal, view, strict=True)), torch.zeros_like(length))
    x, y, z = (v - 2.0 * facing * n for v, n in zip(view, points.normal, strict=True))
    strength = 0.04 + 0.96 * (1.0 - facing.abs()).clamp(0.0, 1.0) ** 5
    above = scene.sky.radiance(x / (z.abs() + 0.4), y.clamp(min=0.0), noise)
    below = 0.6 * to_linear(scene.ground.color).view(3, 1, 1)
    seen = torch.where(y > 0.0, above, below.expand_as(above))
    toward = torch.tensor(scene.light)
    toward = toward / toward.norm()
    highlight = (x * toward[0] + y * toward[1] + z * toward[2]).clamp(min=0.0) ** 60.0
    mirrored: Tensor = strength * seen + 0.7 * highlight
    return mirrored
