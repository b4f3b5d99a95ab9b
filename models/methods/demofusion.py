"""DemoFusion: sample again at each multiple of the base size, held to the enlarged latent of the size below.

Each step mixes overlapping windows (local detail) with strided copies of the whole (global layout).

Ref: arXiv 2311.16973; cosine scales 3, 1, 1 and sigma 0.8, as in the comparison of arXiv 2511.10629.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.methods.steppers import Stepper, sample
from giantleap.models.methods.views import NoiseSource, Predict, Progress, View
from giantleap.models.methods.windows import Corner, WindowGrid

VIEW_BATCH = 4
_SIGMA = 0.8


def cosine_factor(t: float) -> float:
    """1 at pure noise (t = 1000), 0 at none."""
    return (1 + math.cos(math.pi * (1000 - t) / 1000)) / 2


def sample_demofusion(
    predict: Predict,
    stepper: Stepper,
    x: Tensor,
    view: View,
    scale: int,
    window: int,
    stride_px: int,
    noise: NoiseSource,
    progress: Progress,
) -> Tensor:
    """Sample at the base size and at each multiple of it up to `scale`.

    Args:
        predict: The network.
        stepper: Its schedule.
        x: Noise of the base size, [1, channels, h, w].
        view: Of the final image, which the network gets at every size.
        scale: Of the final image over the base image.
        window: Side of a window: that of the latents that the network was trained at.
        stride_px: Image pixels per latent pixel.
        noise: Of this image.
        progress: Called after each step and each batch of windows.

    Returns:
        The clean latent, [1, channels, scale * h, scale * w].
    """
    x, _ = sample(predict, stepper, x, view, progress)
    anchor = x
    height, width = x.shape[-2:]
    for factor in range(2, scale + 1):
        large = F.interpolate(x, size=(factor * height, factor * width), mode="bicubic")
        x = sample_phase(predict, stepper, large, view, factor, window, stride_px, noise, progress)
        x = restandardize(x, anchor)
    return x


def sample_phase(
    predict: Predict,
    stepper: Stepper,
    large: Tensor,
    view: View,
    factor: int,
    window: int,
    stride_px: int,
    noise: NoiseSource,
    progress: Progress,
    first: int = 0,
) -> Tensor:
    """One phase: noise an enlarged latent and denoise it from step `first` on. Arguments as of `sample_demofusion`."""
    fixed = noise.normal(large.shape)
    x = stepper.add_noise(large, fixed, first)
    grid = WindowGrid(large.shape[-2], large.shape[-1], window)
    for index in range(first, len(stepper.timesteps)):
        cosine = cosine_factor(float(stepper.timesteps[index]))
        x = (1 - cosine**3) * x + cosine**3 * stepper.add_noise(large, fixed, index)

        def advance(inputs: Tensor, moved: Tensor, corners_px: Sequence[Corner], index: int = index) -> Tensor:
            seen = replace(view, corners_px=tuple(corners_px))
            return stepper.step(predict(inputs, stepper.timesteps[index], seen), index, moved)[0]

        def run_windows(cut: Tensor, corners: Sequence[Corner], advance: Callable[..., Tensor] = advance) -> Tensor:
            corners_px = [(stride_px * top, stride_px * left) for top, left in corners]
            return _in_batches(advance, cut, cut, corners_px, progress)

        local = grid.average(x, grid.corners(noise), run_windows)
        blurred = _blur_keeping_statistics(x, 2 * factor - 1, _SIGMA * (0.99 * cosine + 0.01))
        strided = F.pixel_unshuffle(x.transpose(0, 1), factor).transpose(0, 1)
        seen_strided = F.pixel_unshuffle(blurred.transpose(0, 1), factor).transpose(0, 1)
        moved = _in_batches(advance, seen_strided, strided, [(0, 0)] * len(strided), progress)
        whole = F.pixel_shuffle(moved.transpose(0, 1), factor).transpose(0, 1)
        before, x = x, (1 - cosine) * local + cosine * whole
        progress.step(partial(stepper.clean_between, before, x, index))
    return x


def restandardize(x: Tensor, anchor: Tensor) -> Tensor:
    """Give a latent the mean and the standard deviation of another one, over all channels."""
    return (x - x.mean()) / x.std() * anchor.std() + anchor.mean()


def _in_batches(
    advance: Callable[[Tensor, Tensor, Sequence[Corner]], Tensor],
    inputs: Tensor,
    moved: Tensor,
    corners_px: Sequence[Corner],
    progress: Progress,
) -> Tensor:
    results = []
    for start in range(0, len(inputs), VIEW_BATCH):
        some = slice(start, start + VIEW_BATCH)
        results.append(advance(inputs[some], moved[some], corners_px[some]))
        progress.part()
    return torch.cat(results)


def _blur_keeping_statistics(x: Tensor, kernel: int, sigma: float) -> Tensor:
    """A Gaussian blur of each channel, zeros outside, brought back to the mean and deviation of its input."""
    place = torch.arange(kernel, device=x.device, dtype=x.dtype) - kernel // 2
    weights = torch.exp(-0.5 * (place / sigma) ** 2)
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, kernel)
    half, groups = kernel // 2, x.shape[1]
    rows = F.conv2d(x, weights, padding=(0, half), groups=groups)
    blurred = F.conv2d(rows, weights.transpose(2, 3), padding=(half, 0), groups=groups)
    return (blurred - blurred.mean()) / blurred.std() * x.std() + x.mean()
