"""Held-out scenes: rendered small and enlarged by every method, against the same scene rendered large.

Two kinds, which no training sees: still lifes with patterns, grain and clouds, and studio scenes, of the calm kind that
prompts draw. A scene has equally many samples at both sizes: its patterns fade with the width of a sample.
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor
from tqdm import tqdm

from benchmarks.quality.routes import SCALES, Networks, Scores, score
from giantleap.training.evaluation.perceptual import Jod
from giantleap.training.pocket.drawing.prompts import draw_prompt
from giantleap.training.pocket.drawing.still_life import render_still_life
from giantleap.training.pocket.pictures import HELD_OUT_SEED, draw_held_out_scene
from giantleap.training.pocket.studio import draw_studio

SCENES = 4  # of each kind
SCENE_PX = 128
SAMPLES = 2  # per pixel of the large scene and direction


def draw_held_out_studio(index: int, image_px: int, samples: int) -> Tensor:
    """Render a studio scene that no training sees: [3, image_px, image_px] in 0..1."""
    rng = np.random.default_rng((HELD_OUT_SEED, 1, index))
    return render_still_life(draw_studio(rng, draw_prompt(rng)), image_px, samples)


KINDS: dict[str, Callable[[int, int, int], Tensor]] = {
    "still lifes": draw_held_out_scene,
    "studio scenes": draw_held_out_studio,
}


def measure_scenes(
    networks: Networks, kind: str, jod: Jod | None = None, count: int = SCENES
) -> dict[int, list[Scores]]:
    """Enlarge scenes of 128 px of a kind of `KINDS` and compare them with those of 256 and 512 px; by scale."""
    draw = KINDS[kind]
    scores: dict[int, list[Scores]] = {scale: [] for scale in SCALES}
    for index in tqdm(range(count), desc=kind):
        for scale in SCALES:
            small = to_levels(draw(index, SCENE_PX, SAMPLES * scale))
            large = to_levels(draw(index, scale * SCENE_PX, SAMPLES))
            scores[scale].append(score(networks.enlarge(small, scale), large, jod))
    return scores


def to_levels(image: Tensor) -> Tensor:
    """Round an image [3, height, width] in 0..1 to 8 bits: [1, 3, height, width] in [-1, 1]."""
    return (image[None] * 255.0).round() / 127.5 - 1.0
