"""RectifiedHR: sampling that grows in the middle, with a guidance that grows with it.

The clean latent that a step predicts is decoded, resized and encoded, gets noise again, and is sampled on. Guidance
restores the variance that a resize takes away.

Ref: arXiv 2503.02537; stages of 2 and 4 times the base size as its authors set them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from giantleap.models.methods.steppers import Stepper, sample
from giantleap.models.methods.views import NoiseSource, Predict, Progress, View


@dataclass(frozen=True, slots=True)
class Stage:
    """Steps at one size.

    Args:
        steps: Indices of the schedule.
        growth: Of the sides over the base size.
        guidance: Of the guidance over the requested one.
    """

    steps: range
    growth: float
    guidance: float


def plan_stages(steps: int, scale: float, raises_guidance: bool = True) -> tuple[Stage, ...]:
    """The stages of a scale: one for 1, two up to 2, three above; x = i / (stages - 1) places stage i.

    The guidance ends at 6 and 10 times the requested one, 30 and 50 at the authors' 5, if it is raised at all.

    Raises:
        ValueError: There are fewer steps than stages.
    """
    count = 1 if scale <= 1 else 2 if scale <= 2 else 3
    if steps < count:
        raise ValueError(f"rectifiedhr at scale {scale:g} needs at least {count} steps; found {steps}")
    if count == 1:
        return (Stage(range(steps), 1.0, 1.0),)
    first, most = (0.6, 6.0) if count == 2 else (0.8, 10.0)
    guidance = most if raises_guidance else 1.0
    places = [index / (count - 1) for index in range(count)]
    # One step at least for each stage, also in short runs.
    ends = [
        min(max(int(steps * (first + (1 - first) * place**0.5) + 1e-9), index + 1), steps - count + 1 + index)
        for index, place in enumerate(places)
    ]
    return tuple(
        Stage(range(start, end), 1 + (scale - 1) * place, 1 + (guidance - 1) * place**0.5)
        for start, end, place in zip([0, *ends], ends, places, strict=False)
    )


def draw_rectifiedhr(
    predict: Predict,
    stepper: Stepper,
    x: Tensor,
    view: View,
    stages: Sequence[Stage],
    grow: Callable[[Tensor, float], Tensor],
    noise: NoiseSource,
    progress: Progress,
) -> Tensor:
    """Sample through all stages.

    Args:
        predict: The network.
        stepper: Its schedule.
        x: Noise of the base size, [1, channels, h, w].
        view: Of the base image.
        stages: From `plan_stages`.
        grow: Enlarges a clean latent by decoding, resizing and encoding, to so many times the base size.
        noise: Of this image.
        progress: Called after each step.

    Returns:
        The clean latent of the last stage's size.
    """
    clean = x
    for stage in stages:
        if stage.steps.start:
            large = grow(clean, stage.growth)
            x = stepper.add_noise(large, noise.normal(large.shape), stage.steps.start)
        guidance_scale = view.guidance_scale * (stage.guidance if view.guidance_scale > 1 else 1.0)
        size_px = (round(view.height_px * stage.growth), round(view.width_px * stage.growth))
        seen = replace(view, height_px=size_px[0], width_px=size_px[1], guidance_scale=guidance_scale)
        x, clean = sample(predict, stepper, x, seen, progress, indices=stage.steps)
    return x
