"""Captioned ray-cast scenes: one object on a colored floor under a colored sky, with the object's mask.

A scene is a value (`Scene`), drawn from a seed and rendered in batches by closed-form ray intersections. The camera is
fixed except for small jitters, so that a slot such as "left" or "large" has one meaning. Captions are in
`training/pocket/drawing/captions.py`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from giantleap.training.pocket.drawing.captions import Slots, draw_slots

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.10),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.96, 0.88, 0.15),
    "green": (0.14, 0.62, 0.20),
    "cyan": (0.18, 0.80, 0.84),
    "blue": (0.14, 0.28, 0.85),
    "purple": (0.50, 0.16, 0.66),
    "pink": (0.98, 0.58, 0.76),
    "white": (0.95, 0.95, 0.95),
    "black": (0.08, 0.08, 0.09),
}
HEIGHT_OF_SIZE = {"small": 0.29, "medium": 0.38, "large": 0.48}  # in frame heights
CENTER_OF_POSITION = {"left": 0.26, "centre": 0.50, "right": 0.74}  # in frame widths
FOCAL = 1.6  # focal length in frame heights
AMBIENT = 0.5
SHADOW = 0.58


@dataclass(frozen=True)
class Scene:
    """One picture: its six slots and the jitters."""

    slots: Slots
    center_x: float  # of the object, 0..1 across the frame
    foot_y: float  # where the object's center line meets the floor, 0 top .. 1 bottom
    height: float  # of the object in frame heights
    yaw: float  # of the cube, radians
    horizon_y: float
    light_x: float  # sideways part of the direction to the light
    light_z: float  # depth part; negative is towards the camera
    gain: float  # brightness of the whole picture


def draw_scene(rng: np.random.Generator, slots: Slots | None = None) -> Scene:
    """Draw the jitters, and the slots if none are given."""
    slots = slots or draw_slots(rng)
    return Scene(
        slots=slots,
        center_x=CENTER_OF_POSITION[str(slots.position)] + rng.uniform(-0.03, 0.03),
        foot_y=0.77 + rng.uniform(-0.02, 0.02),
        height=HEIGHT_OF_SIZE[str(slots.size)] * rng.uniform(0.95, 1.05),
        yaw=rng.uniform(0.25, 1.32),
        horizon_y=0.39 + rng.uniform(-0.015, 0.015),
        light_x=float(rng.choice((-1.0, 1.0))) * rng.uniform(0.35, 0.8),
        light_z=rng.uniform(-0.9, -0.4),
        gain=rng.uniform(0.94, 1.04),
    )


def plain_scene(slots: Slots) -> Scene:
    """Return the scene of these slots without jitter."""
    x, height = CENTER_OF_POSITION[str(slots.position)], HEIGHT_OF_SIZE[str(slots.size)]
    return Scene(slots, x, 0.77, height, 0.785, 0.39, -0.6, -0.6, 1.0)


def render(scenes: list[Scene], image_px: int = 128, samples: int = 2) -> tuple[Tensor, Tensor]:
    """Ray-cast scenes, which may have different shapes.

    Returns:
        Pictures [batch, 3, image_px, image_px] in 0..1 and object coverage [batch, 1, image_px, image_px].
    """
    side = image_px * samples
    images = torch.empty(len(scenes), 3, image_px, image_px)
    masks = torch.empty(len(scenes), 1, image_px, image_px)
    for shape in {str(scene.slots.shape) for scene in scenes}:
        index = [i for i, scene in enumerate(scenes) if scene.slots.shape == shape]
        color, mask = _cast(shape, [scenes[i] for i in index], side)
        images[index] = torch.nn.functional.avg_pool2d(color, samples)
        masks[index] = torch.nn.functional.avg_pool2d(mask, samples)
    return images.clamp(0, 1), masks


def _column(scenes: list[Scene], name: str) -> Tensor:
    return torch.tensor([getattr(scene, name) for scene in scenes], dtype=torch.float32).view(-1, 1, 1)


def _albedo(scenes: list[Scene], slot: str) -> Tensor:
    return torch.tensor([PALETTE[str(getattr(scene.slots, slot))] for scene in scenes]).view(-1, 3, 1, 1)


def _cast(shape: str, scenes: list[Scene], side: int) -> tuple[Tensor, Tensor]:
    """Return one color per ray for scenes of one shape; camera at (0, 1, 0) along z, floor at y = 0."""
    axis = (torch.arange(side, dtype=torch.float32) + 0.5) / side
    v, u = axis.view(1, side, 1), axis.view(1, 1, side)
    horizon, foot = _column(scenes, "horizon_y"), _column(scenes, "foot_y")
    depth = FOCAL / (foot - horizon)
    height = _column(scenes, "height") * depth / FOCAL
    center = (_column(scenes, "center_x") - 0.5) * depth / FOCAL
    light = torch.stack([_column(scenes, "light_x"), torch.ones(len(scenes), 1, 1), _column(scenes, "light_z")])
    light = light / light.norm(dim=0)
    full = torch.zeros(len(scenes), side, side)
    ray = (u - 0.5 + full, horizon - v + full, full + FOCAL)
    yaw = _column(scenes, "yaw")

    t, normal = hit(shape, (-center, torch.ones_like(center), -depth), ray, height, yaw)
    floor_t = torch.where(ray[1] < -1e-4, -1.0 / ray[1].clamp(max=-1e-4), torch.inf)
    finite_t = torch.where(floor_t.isfinite(), floor_t, 0.0)
    point = (ray[0] * finite_t - center, full, ray[2] * finite_t - depth)
    shadow_t, _ = hit(shape, point, (light[0] + full, light[1] + full, light[2] + full), height, yaw)

    lit = torch.where(shadow_t.isfinite(), SHADOW, 1.0) * (0.88 + 0.12 * ((v - horizon) / (1 - horizon)).clamp(0, 1))
    floor = _albedo(scenes, "floor") * lit.unsqueeze(1)
    haze = 0.14 * (v / horizon).clamp(0, 1).unsqueeze(1)
    sky = _albedo(scenes, "sky") * (1 - haze) + haze * 0.9
    facing = sum((n * part for n, part in zip(normal, light, strict=True)), full).clamp(min=0)
    solid = _albedo(scenes, "color") * (AMBIENT + (1 - AMBIENT) * facing).unsqueeze(1)
    seen = (t < floor_t).unsqueeze(1)
    background = torch.where(floor_t.isfinite().unsqueeze(1), floor, sky)
    return torch.where(seen, solid, background) * _column(scenes, "gain").unsqueeze(1), seen.float()


Vector = tuple[Tensor, Tensor, Tensor]


def hit(shape: str, origin: Vector, ray: Vector, height: Tensor, yaw: Tensor) -> tuple[Tensor, Vector]:
    """Return the distance to the shape (infinite if missed) and the outer normal; the shape stands on the origin."""
    if shape == "sphere":
        return _hit_sphere(origin, ray, 0.46 * height)
    if shape == "cube":
        return _hit_cube(origin, ray, 0.80 * height, yaw)
    if shape == "cylinder":
        return _hit_cylinder(origin, ray, 0.92 * height, 0.33 * height)
    return _hit_cone(origin, ray, height, 0.44 * height)


def _nearest_root(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return the smaller root of a t^2 + 2 b t + c, infinite if there is none."""
    square = b * b - a * c
    return torch.where(square > 0, (-b - square.clamp(min=0).sqrt()) / a, torch.inf)


def _hit_sphere(origin: Vector, ray: Vector, radius: Tensor) -> tuple[Tensor, Vector]:
    x, y, z = origin[0], origin[1] - radius, origin[2]
    dx, dy, dz = ray
    t = _nearest_root(dx * dx + dy * dy + dz * dz, x * dx + y * dy + z * dz, x * x + y * y + z * z - radius * radius)
    t = torch.where(t > 0, t, torch.inf)
    near = torch.where(t.isfinite(), t, 0.0)
    return t, ((x + near * dx) / radius, (y + near * dy) / radius, (z + near * dz) / radius)


def _hit_cube(origin: Vector, ray: Vector, side: Tensor, yaw: Tensor) -> tuple[Tensor, Vector]:
    cos, sin = yaw.cos(), yaw.sin()
    half = side / 2
    o = (cos * origin[0] - sin * origin[2], origin[1] - half, sin * origin[0] + cos * origin[2])
    d = (cos * ray[0] - sin * ray[2], ray[1], sin * ray[0] + cos * ray[2])
    inverse = [1.0 / torch.where(part.abs() < 1e-6, 1e-6, part) for part in d]
    enter = [-(a * i) - half * i.abs() for a, i in zip(o, inverse, strict=True)]
    leave = [-(a * i) + half * i.abs() for a, i in zip(o, inverse, strict=True)]
    t_in = torch.maximum(torch.maximum(enter[0], enter[1]), enter[2])
    t_out = torch.minimum(torch.minimum(leave[0], leave[1]), leave[2])
    t = torch.where((t_in < t_out) & (t_in > 0), t_in, torch.inf)
    nx, ny, nz = (torch.where(e >= t_in, -part.sign(), 0.0) for e, part in zip(enter, d, strict=True))
    return t, (cos * nx + sin * nz, ny, cos * nz - sin * nx)


def _hit_cylinder(origin: Vector, ray: Vector, height: Tensor, radius: Tensor) -> tuple[Tensor, Vector]:
    x, y, z = origin
    dx, dy, dz = ray
    side = _nearest_root(dx * dx + dz * dz, x * dx + z * dz, x * x + z * z - radius * radius)
    at = y + side * dy
    side = torch.where((side > 0) & (at >= 0) & (at <= height), side, torch.inf)
    top = (height - y) / torch.where(dy.abs() < 1e-6, 1e-6, dy)
    on_top = (top > 0) & ((x + top * dx) ** 2 + (z + top * dz) ** 2 <= radius * radius)
    top = torch.where(on_top & (dy < 0), top, torch.inf)
    near = torch.where(side.isfinite(), side, 0.0)
    from_top = top < side
    nx = torch.where(from_top, 0.0, (x + near * dx) / radius)
    nz = torch.where(from_top, 0.0, (z + near * dz) / radius)
    return torch.minimum(side, top), (nx, from_top.float(), nz)


def _hit_cone(origin: Vector, ray: Vector, height: Tensor, radius: Tensor) -> tuple[Tensor, Vector]:
    x, y, z = origin[0], height - origin[1], origin[2]  # y runs down from the tip
    dx, dy, dz = ray[0], -ray[1], ray[2]
    slope = (radius / height) ** 2
    a = dx * dx + dz * dz - slope * dy * dy
    a = torch.where(a.abs() < 1e-6, 1e-6, a)
    b = x * dx + z * dz - slope * y * dy
    c = x * x + z * z - slope * y * y
    square = b * b - a * c
    root = square.clamp(min=0).sqrt()
    best = torch.full_like(square, torch.inf)
    for t in ((-b - root) / a, (-b + root) / a):
        at = y + t * dy
        legal = (square > 0) & (t > 0) & (at >= 0) & (at <= height)
        best = torch.where(legal, torch.minimum(best, t), best)
    near = torch.where(best.isfinite(), best, 0.0)
    nx, nz, ny = x + near * dx, z + near * dz, slope * (y + near * dy)
    length = (nx * nx + ny * ny + nz * nz).clamp(min=1e-12).sqrt()
    return best, (nx / length, ny / length, nz / length)
