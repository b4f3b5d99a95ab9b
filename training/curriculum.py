"""What each update of a run does, from its configuration (`training/run_config.py`) by arithmetic alone.

Rates, heads and batches of a step are pure functions of the configuration, the stage and the step, so a run that was
stopped needs no more than its step to continue with the same ones. `training/run.py` runs it; losses are in
`training/losses.py`.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from giantleap.training.losses import (
    downsampled_l1,
    eagle,
    fourier_l1,
    high_frequency_l1,
    l1,
    log_square,
    visible_error,
)
from giantleap.training.run_config import (
    SQUARE_FLOOR,
    ConfigError,
    HighPass,
    OptimizerConfig,
    StageConfig,
    StageWeights,
)


def rate_at(optimizer: OptimizerConfig, steps: int, step: int) -> float:
    """The rate of update number `step` (from 0) of a stage: a cosine, or that of torch's MultiStepLR without its state.

    Ref: arXiv 2511.10629, A.2 (62,500, 93,750 and 112,500 of 125,000 steps, factor 0.5).
    """
    warm = min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
    if optimizer.schedule == "cosine":
        return optimizer.rate * warm * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    passed = sum(step >= round(part * steps) for part in optimizer.milestones)
    return optimizer.rate * warm * optimizer.decay**passed


def scales_at(stage: StageConfig, scales: tuple[int, ...], seed: int, stage_index: int, step: int) -> tuple[int, ...]:
    """The heads that an update trains: all of them, then in the last part of the stage one at random.

    The same in every process, and whatever was run before.

    Ref: arXiv 2511.10629, A.4.
    """
    if step < stage.steps - round(stage.random_head_share * stage.steps):
        return scales
    return (scales[int(np.random.default_rng((seed, 1, stage_index, step)).integers(len(scales)))],)


def tiles_at(count: int, batch: int, seed: int, stage_index: int, step: int) -> list[int]:
    """The tiles of one update, over all processes: the next `batch` of an endless row of shuffled decks.

    Every tile comes once per deck; the place in the row follows from the step alone.
    """
    if count < 1:
        raise ConfigError("there is no tile to train on")
    places = range(step * batch, (step + 1) * batch)
    decks = sorted({place // count for place in places})
    orders = {deck: _shuffle(count, seed, stage_index, deck) for deck in decks}
    return [int(orders[place // count][place % count]) for place in places]


@lru_cache(maxsize=4)
def _shuffle(count: int, seed: int, stage_index: int, deck: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, 2, stage_index, deck)).permutation(count)


def loss_terms(
    weights: StageWeights,
    upscaled: Tensor,
    large: Tensor,
    decoded: Tensor | None,
    target: Tensor | None,
    *,
    ds_factor: int = 2,
    eagle_filter: HighPass = "paper",
    picture_map: Tensor | None = None,
    square_floor: float = SQUARE_FLOOR,
) -> dict[str, Tensor]:
    """The terms of one head's loss, each already weighted; their sum is the loss.

    Args:
        weights: Of the stage.
        upscaled: The network's output.
        large: The latent of the large picture.
        decoded: The enlarged latent, decoded with a gradient; needed where `weights.decodes`.
        target: The large latent, decoded.
        picture_map: Of `fit_picture_map`; needed where `weights.linear_square` is above 0.
        square_floor: Of `log_square`.

    Shape:
        upscaled and large [batch, channels, h, w]; decoded and target [batch, 3, height_px, width_px]; scalars.

    References:
        arXiv 2511.10629, Eq. 16 to 18.

    Raises:
        ValueError: a picture is missing that a weight asks for.
    """
    terms: dict[str, Tensor] = {}
    if weights.latent_l1:
        terms["latent_l1"] = weights.latent_l1 * l1(upscaled, large)
    if weights.latent_fft:
        terms["latent_fft"] = weights.latent_fft * fourier_l1(upscaled, large)
    if weights.linear_square:
        if picture_map is None:
            raise ValueError("linear_square needs the linear map of the decoder, and none was given")
        mapped = F.conv2d(upscaled - large, picture_map, padding=picture_map.shape[-1] // 2)
        terms["linear_square"] = weights.linear_square * log_square(mapped, square_floor)
    if not weights.decodes:
        return terms
    if decoded is None or target is None:
        raise ValueError("these weights compare pictures, and no decoded pictures were given")
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "pixel_ds": partial(downsampled_l1, factor=ds_factor),
        "pixel_hf": high_frequency_l1,
        "pixel_l1": l1,
        "pixel_fft": fourier_l1,
        "eagle": partial(eagle, high_pass=eagle_filter),
        "pixel_square": lambda prediction, target: log_square(visible_error(prediction, target), square_floor),
    }
    for name, loss in losses.items():
        weight = getattr(weights, name)
        if weight:
            terms[name] = weight * loss(decoded, target)
    return terms


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of weighted terms."""
    return torch.stack(list(terms.values())).sum()
