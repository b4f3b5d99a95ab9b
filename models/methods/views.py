"""What a sampling loop asks of a network, and where its noise comes from: the loops know nothing else of a pipeline."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class View:
    """What a network gets beside latent and time. Only SDXL reads the sizes.

    Args:
        height_px: Of the image that the latent is, or is a part of.
        width_px: Likewise.
        guidance_scale: 1 or less is no guidance.
        corners_px: Top and left of each latent of the batch; empty where all are whole images.
    """

    height_px: int
    width_px: int
    guidance_scale: float
    corners_px: tuple[tuple[int, int], ...] = ()


class Predict(Protocol):
    """A guided network: noise, velocity or clean latent, as the scheduler's `prediction_type` says."""

    def __call__(self, x: Tensor, t: Tensor, view: View) -> Tensor:
        """Predict for latents at one time.

        Shape:
            [views, channels, h, w] -> the same.
        """
        ...


@dataclass(frozen=True, slots=True)
class NoiseSource:
    """Everything random of one image: noise, window places and shifts, all from one generator on the CPU."""

    generator: torch.Generator
    device: torch.device

    def normal(self, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """Normal noise, float32, the same for a seed on every device."""
        return torch.randn(shape, generator=self.generator).to(self.device)

    def integer(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return int(torch.randint(low, high + 1, (1,), generator=self.generator))


class Progress:
    """What a loop reports: a whole step, with what gives its clean latent, or a part of one. Both may raise."""

    def __init__(self, on_step: Callable[[Callable[[], Tensor]], object], on_part: Callable[[], object]) -> None:
        self.step = on_step
        self.part = on_part
