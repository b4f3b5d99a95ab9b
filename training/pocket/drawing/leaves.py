"""Draw dead-leaves images, the photograph-like training pictures of the pocket VAE and LUA.

A dead-leaves image is a pile of occluding shapes with power-law radii; it has the scale invariance and sharp edges of
natural images (Lee, Mumford and Huang 2001). Leaves have textures (1/f noise, stripes, checkers, gradients), and the
picture is lit, blurred, reduced and given sensor noise as by a camera. `training/pocket/pictures.py`
reads a pool of these images.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from tqdm import tqdm

from giantleap.models.atomic_file import replacing

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

NOISE_PX = 256
MIN_RADIUS_PX = 1.5
MAX_LEAVES = 1500


def fractal_noise(rng: np.random.Generator, size_px: int, slope: float) -> Floats:
    """Draw a tileable noise field with amplitude 1/f**slope, zero mean and unit deviation."""
    frequency_y = np.fft.fftfreq(size_px)[:, None]
    frequency_x = np.fft.rfftfreq(size_px)[None, :]
    radius = np.maximum(np.hypot(frequency_y, frequency_x), 1.0 / size_px)
    spectrum = np.fft.rfft2(rng.standard_normal((size_px, size_px))) / radius**slope
    spectrum[0, 0] = 0.0
    field = np.fft.irfft2(spectrum, s=(size_px, size_px))
    unit: Floats = (field / field.std()).astype(np.float32)
    return unit


@dataclass(frozen=True)
class Palette:
    """Colors of one picture: variations of a base color, mostly in lightness."""

    base: Floats
    contrast: float
    saturation: float

    def draw(self, rng: np.random.Generator) -> Floats:
        """Draw an RGB color in [0, 1]; three in four are close to the base."""
        spread = self.contrast * (1.0 if rng.random() < 0.25 else rng.uniform(0.1, 1.0))
        lightness = rng.uniform(-0.5, 0.5) - 0.4 * (float(self.base.mean()) - 0.5)
        chroma = rng.normal(0.0, self.saturation, 3)
        color = self.base + spread * (lightness + chroma - chroma.mean())
        clipped: Floats = np.clip(color, 0.0, 1.0).astype(np.float32)
        return clipped


def _draw_palette(rng: np.random.Generator) -> Palette:
    saturation = float(rng.uniform(0.0, 0.14)) if rng.random() < 0.85 else 0.35
    chroma = rng.normal(0.0, 0.6 * saturation, 3)
    base = np.clip(rng.uniform(0.15, 0.85) + chroma - chroma.mean(), 0.0, 1.0).astype(np.float32)
    return Palette(base, float(rng.uniform(0.4, 1.3)), saturation)


def _inside(rng: np.random.Generator, dy: Floats, dx: Floats, radius_px: float) -> Floats:
    """Return the signed distance in pixels, positive inside, of a random shape (ellipse, box, bar, polygon)."""
    angle = rng.uniform(0.0, np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    kind = rng.random()
    if kind < 0.45:
        aspect = np.float32(rng.uniform(0.35, 1.0))
        reach = np.hypot(along / np.float32(radius_px), across / np.float32(radius_px * aspect))
        rounded: Floats = np.float32(radius_px * aspect) * (np.float32(1.0) - reach)
        return rounded
    if kind < 0.75:
        half_width = radius_px * (rng.uniform(0.02, 0.15) if kind > 0.65 else rng.uniform(0.25, 0.9))
        ends = np.float32(radius_px * 0.9) - np.abs(along)
        return np.minimum(ends, np.float32(max(half_width, 0.6)) - np.abs(across))
    corners = int(rng.integers(3, 7))
    distance = np.full(dy.shape, np.float32(radius_px), dtype=np.float32)
    for corner in range(corners):
        normal = angle + 2.0 * np.pi * (corner + rng.uniform(-0.25, 0.25)) / corners
        edge = np.float32(radius_px * rng.uniform(0.4, 0.8)) - dx * np.float32(np.cos(normal))
        edge -= dy * np.float32(np.sin(normal))
        distance = np.minimum(distance, edge)
    return distance


def _pattern(rng: np.random.Generator, dy: Floats, dx: Floats, radius_px: float, noise: list[Floats]) -> Floats:
    """Return a scalar texture of about unit deviation over a leaf's bounding box."""
    kind = rng.random()
    if kind < 0.6:
        field = noise[int(rng.integers(len(noise)))]
        top, left = (int(v) for v in rng.integers(0, NOISE_PX, 2))
        rows = np.arange(top, top + dy.shape[0]) % NOISE_PX
        columns = np.arange(left, left + dx.shape[1]) % NOISE_PX
        cut: Floats = field[np.ix_(rows, columns)]
        return cut
    angle = rng.uniform(0.0, 2.0 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    along = dx * cos + dy * sin
    if kind < 0.8:
        ramp: Floats = (along / np.float32(radius_px)).astype(np.float32)
        return ramp
    period_px = float(np.exp(rng.uniform(np.log(2.5), np.log(max(3.0, radius_px)))))
    wave = np.sin(along * np.float32(2.0 * np.pi / period_px))
    if kind < 0.9:
        stripes: Floats = wave * np.float32(1.4)
        return stripes
    across = np.sin((dy * cos - dx * sin) * np.float32(2.0 * np.pi / period_px))
    checker: Floats = np.clip(wave * across * np.float32(rng.uniform(2.0, 8.0)), -1.0, 1.0)
    return checker


def _paint(rng: np.random.Generator, canvas: Floats, radius_px: float, palette: Palette, noise: list[Floats]) -> None:
    """Paint one leaf on the canvas, in place."""
    size_px = canvas.shape[0]
    center_y, center_x = rng.uniform(-0.3 * radius_px, size_px + 0.3 * radius_px, 2)
    reach = radius_px + 2.0
    top, bottom = max(0, int(center_y - reach)), min(size_px, int(center_y + reach) + 1)
    left, right = max(0, int(center_x - reach)), min(size_px, int(center_x + reach) + 1)
    if top >= bottom or left >= right:
        return
    dy = (np.arange(top, bottom, dtype=np.float32) - np.float32(center_y))[:, None]
    dx = (np.arange(left, right, dtype=np.float32) - np.float32(center_x))[None, :]
    dy, dx = np.broadcast_arrays(dy, dx)
    softness_px = 1.0 if rng.random() < 0.7 else float(rng.uniform(1.0, 1.0 + 0.1 * radius_px))
    cover = np.clip(_inside(rng, dy, dx, radius_px) / np.float32(softness_px) + 0.5, 0.0, 1.0)
    color = palette.draw(rng)[None, None, :]
    if radius_px > 3.0 and rng.random() < 0.75:
        contrast = np.float32(np.exp(rng.uniform(np.log(0.01), np.log(0.2))))
        tint = np.float32(1.0) + rng.normal(0.0, 0.3, 3).astype(np.float32)
        color = color + contrast * _pattern(rng, dy, dx, radius_px, noise)[:, :, None] * tint
    area = canvas[top:bottom, left:right]
    area += cover[:, :, None] * (color - area)


def _expose(rng: np.random.Generator, image: Floats, noise: list[Floats]) -> Floats:
    """Light, blur and add noise to the picture like a camera."""
    size_px = image.shape[0]
    if rng.random() < 0.6:
        light = ndimage.zoom(noise[0][:8, :8], size_px / 8, order=1, mode="grid-wrap", grid_mode=True)
        light = light - light.mean()
        image = image * (1.0 + np.float32(rng.uniform(0.02, 0.2)) * light[:size_px, :size_px, None])
    image = np.clip(image, 0.0, 1.0) ** np.float32(np.exp(rng.uniform(-0.4, 0.5)))
    if rng.random() < 0.5:
        sigma_px = float(rng.uniform(0.3, 1.1))
        image = ndimage.gaussian_filter(image, (sigma_px, sigma_px, 0.0), truncate=3.0)
    if rng.random() < 0.5:
        grain = rng.standard_normal(image.shape, dtype=np.float32)
        image = image + np.float32(rng.uniform(0.0, 0.02)) * grain
    return np.clip(image, 0.0, 1.0)


def draw_leaves(rng: np.random.Generator, size_px: int) -> Pixels:
    """Draw one dead-leaves picture [size_px, size_px, 3], uint8.

    One in three is drawn at twice the size and reduced, which gives subpixel detail; one in six has few large smooth
    leaves, like skies and walls.
    """
    shrink = 2 if rng.random() < 0.33 else 1
    canvas_px = size_px * shrink
    smooth = rng.random() < 0.17
    low = canvas_px * 0.06 if smooth else MIN_RADIUS_PX * shrink * np.exp(rng.uniform(0.0, 1.5))
    high = canvas_px * rng.uniform(0.15, 0.5)
    power = rng.uniform(0.7, 2.0)
    count = int(rng.integers(4, 25)) if smooth else int(rng.integers(200, MAX_LEAVES))
    noise = [fractal_noise(rng, NOISE_PX, slope) for slope in (1.6, *rng.uniform(0.3, 1.7, 3))]
    palette = _draw_palette(rng)
    canvas = np.empty((canvas_px, canvas_px, 3), dtype=np.float32)
    canvas[:] = palette.draw(rng)
    for _ in range(6 if smooth else 24):
        _paint(rng, canvas, canvas_px * float(rng.uniform(0.25, 0.7)), palette, noise)
    # Inverse CDF of radii with density r**-(power + 1) between low and high; large leaves mostly first.
    uniform = rng.random(count)
    radii = (low**-power + uniform * (high**-power - low**-power)) ** (-1.0 / power)
    order = np.argsort(-radii * np.exp(rng.normal(0.0, 1.0, count)))
    for radius_px in radii[order]:
        _paint(rng, canvas, float(radius_px), palette, noise)
    image = _expose(rng, canvas, noise)
    if shrink == 2:
        image = image.reshape(size_px, 2, size_px, 2, 3).mean(axis=(1, 3))
    pixels: Pixels = np.rint(image * 255.0).astype(np.uint8)
    return pixels


def _draw_one(task: tuple[int, int, int]) -> Pixels:
    seed, index, size_px = task
    return draw_leaves(np.random.default_rng((seed, index)), size_px)


def read_leaf_pool(folder: Path, count: int, size_px: int, seed: int, processes: int = 2) -> Pixels:
    """Open the pool of a seed, drawing it first if it is not on disk (`leaves_<seed>_<size>_<count>.npy`).

    Every picture depends on (seed, index, size) alone, so pools are equal on every machine.

    Returns:
        [count, size_px, size_px, 3], uint8, memory-mapped.
    """
    path = folder / f"leaves_{seed}_{size_px}_{count}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        images = np.empty((count, size_px, size_px, 3), dtype=np.uint8)
        tasks = [(seed, index, size_px) for index in range(count)]
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            drawn = tqdm(pool.map(_draw_one, tasks, chunksize=4), total=count, desc="leaves", unit="img")
            for index, image in enumerate(drawn):
                images[index] = image
        with replacing(path) as file:
            np.save(file, images, allow_pickle=False)
    pool_images: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    return pool_images
