"""RectifiedHR: sampling that grows in the middle, with a guidance that grows with it.

The clean latent that a step predicts is decoded, resized and encoded, gets noise again, and is sampled on. Guidance
restores the variance that a resize takes away.

Ref: arXiv 2503.02537; stages of 2 and 4 times the base size as its authors set them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from giantleap.models.methods.passes import Stage
from giantleap.models.methods.steppers import Stepper, sample
from giantleap.models.methods.views import NoiseSource, Predict, Progress, View


def sample_rectifiedhr(
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
