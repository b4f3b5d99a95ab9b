"""LSRNA-DemoFusion with LUA as the latent enlarger: one enlargement, noise where edges are, one DemoFusion phase.

The authors' own enlarger has weights without a license; LUA takes its place. Edges are the Sobel magnitude of the
base image, scaled to 0 to 1, in place of Canny's, so that film grain does not count as edges everywhere.

Ref: arXiv 2503.18446; noise up to a standard deviation of 1.2, and the last 30 of 50 steps.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.methods.demofusion import restandardize, sample_phase
from giantleap.models.methods.passes import first_step
from giantleap.models.methods.steppers import Stepper, sample
from giantleap.models.methods.views import NoiseSource, Predict, Progress, View

_MAX_STD = 1.2


def sample_lsrna(
    predict: Predict,
    stepper: Stepper,
    x: Tensor,
    view: View,
    scale: int,
    window: int,
    stride_px: int,
    decode: Callable[[Tensor], Tensor],
    enlarge: Callable[[Tensor], Tensor],
    noise: NoiseSource,
    progress: Progress,
) -> Tensor:
    """Sample at the base size, enlarge the latent, sample again. Arguments not named here as of `sample_demofusion`.

    Args:
        view: Of the base image.
        decode: From a clean latent to an image [1, 3, height_px, width_px] in [-1, 1].
        enlarge: From a clean latent to one `scale` times as large.
    """
    anchor, _ = sample(predict, stepper, x, view, progress)
    large = enlarge(anchor)
    strength = edge_strength(decode(anchor), (large.shape[-2], large.shape[-1]))
    large = large + noise.normal(large.shape) * _MAX_STD * strength
    final = replace(view, height_px=scale * view.height_px, width_px=scale * view.width_px)
    first = first_step(len(stepper.timesteps))
    x = sample_phase(predict, stepper, large, final, scale, window, stride_px, noise, progress, first)
    return restandardize(x, anchor)


def edge_strength(image: Tensor, size: tuple[int, int]) -> Tensor:
    """How much of an edge each place of an image is, from 0 to 1; 0 everywhere in an image without any.

    Shape:
        [1, 3, height_px, width_px] -> [1, 1, *size].
    """
    gray = image.mean(dim=1, keepdim=True)
    slope = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=image.device)
    kernels = torch.stack([slope, slope.T])[:, None]
    magnitude = F.conv2d(F.pad(gray, (1,) * 4, mode="replicate"), kernels).square().sum(1, keepdim=True).sqrt()
    pooled = F.adaptive_avg_pool2d(magnitude, size)
    low, high = pooled.min(), pooled.max()
    return (pooled - low) / (high - low) if bool(high - low > 1e-6) else torch.zeros_like(pooled)
