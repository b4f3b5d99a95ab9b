"""Schedulers without memory, so that windows of one latent may step apart: DDIM, and Euler for flow matching.

Multistep solvers remember earlier outputs, which belong to other windows. A bundle's own scheduler gives the times.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from giantleap.models.methods.views import NoiseSource, Predict, Progress, View

_SMALL = 1e-6


class Stepper(Protocol):
    """The times of a sampling run, and the step between two of them."""

    timesteps: Tensor
    """[steps], as the network gets them: from about 1000 down."""

    def step(self, output: Tensor, index: int, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The latent at the next time, and the clean latent that the network's output stands for."""
        ...

    def add_noise(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """A clean latent at the time of step `index`."""
        ...

    def clean_between(self, x: Tensor, following: Tensor, index: int) -> Tensor:
        """The clean latent that a step without fresh noise went to, from the latents before and after it."""
        ...


class DdimStepper:
    """DDIM of a noise schedule (arXiv 2010.02502, equation 12).

    Args:
        config: Configuration of the bundle's own scheduler.
        steps: Denoising steps.
        eta: Share of fresh noise in each step.
    """

    def __init__(self, config: Any, steps: int, device: torch.device, eta: float = 0.0) -> None:
        # What DDIM would assume for a configuration of another class, where SD and SDXL say otherwise.
        self._scheduler: Any = DDIMScheduler.from_config({"clip_sample": False, "set_alpha_to_one": False, **config})
        self._scheduler.set_timesteps(steps, device=device)
        self.timesteps: Tensor = self._scheduler.timesteps
        self._eta = eta

    def step(self, output: Tensor, index: int, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Stepper`."""
        eta = 0.0 if noise is None else self._eta
        made = self._scheduler.step(output, self.timesteps[index], x, eta=eta, variance_noise=noise)
        return made.prev_sample, made.pred_original_sample

    def add_noise(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """See `Stepper`."""
        noised: Tensor = self._scheduler.add_noise(clean, noise, self.timesteps[index : index + 1])
        return noised

    def clean_between(self, x: Tensor, following: Tensor, index: int) -> Tensor:
        """See `Stepper`."""
        (signal, noise), (next_signal, next_noise) = self._shares(index), self._shares(index + 1)
        change = next_signal - signal * next_noise / noise
        return following if change < _SMALL else (following - next_noise / noise * x) / change  # the last may stay

    def _shares(self, index: int) -> tuple[float, float]:
        """The shares of clean latent and noise at the time of step `index`, or at the end."""
        alpha = self._scheduler.final_alpha_cumprod
        if index < len(self.timesteps):
            alpha = self._scheduler.alphas_cumprod[int(self.timesteps[index])]
        return float(alpha) ** 0.5, (1 - float(alpha)) ** 0.5


class FlowStepper:
    """Euler steps of flow matching: x = (1 - sigma) clean + sigma noise.

    Args:
        timesteps: [steps].
        sigmas: [steps + 1], the last one 0.
        prediction_type: `flow_prediction` (noise minus clean) or `sample` (clean).
    """

    def __init__(self, timesteps: Tensor, sigmas: Tensor, prediction_type: str) -> None:
        if prediction_type not in ("flow_prediction", "sample"):
            raise ValueError(f"prediction_type {prediction_type}: flow matching has flow_prediction or sample here")
        self.timesteps = timesteps
        self._sigmas: list[float] = sigmas.tolist()
        self._predicts_clean = prediction_type == "sample"

    def step(self, output: Tensor, index: int, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Stepper`; no noise is added."""
        sigma, following = self._sigmas[index], self._sigmas[index + 1]
        clean = output if self._predicts_clean else x - sigma * output
        return clean + (following / sigma) * (x - clean), clean

    def add_noise(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """See `Stepper`."""
        sigma = self._sigmas[index]
        return (1 - sigma) * clean + sigma * noise

    def clean_between(self, x: Tensor, following: Tensor, index: int) -> Tensor:
        """See `Stepper`."""
        share = self._sigmas[index + 1] / self._sigmas[index]
        return (following - share * x) / (1 - share)


def open_stepper(scheduler: Any, steps: int, device: torch.device, eta: float = 0.0) -> Stepper:
    """The stepper for the noise schedule of a pipeline's scheduler, which is not touched.

    Raises:
        ValueError: It shifts its times by the size of the image, or predicts what flow matching does not.
    """
    config = scheduler.config
    is_flow = config.get("use_flow_sigmas", False) or type(scheduler).__name__.startswith("FlowMatch")
    if not is_flow:
        return DdimStepper(config, steps, device, eta)
    if config.get("use_dynamic_shifting", False):
        raise ValueError("a scheduler with use_dynamic_shifting has other times at every size; choose another method")
    own = type(scheduler).from_config(config)
    own.set_timesteps(steps, device=device)
    return FlowStepper(own.timesteps, own.sigmas, config.get("prediction_type", "flow_prediction"))


def _same(latent: Tensor) -> Tensor:
    return latent


def sample(
    predict: Predict,
    stepper: Stepper,
    x: Tensor,
    view: View,
    progress: Progress,
    *,
    indices: range | None = None,
    noise: NoiseSource | None = None,
    begin: Callable[[int], object] = lambda index: None,
) -> tuple[Tensor, Tensor]:
    """Denoise a latent as a whole.

    Args:
        predict: The network.
        stepper: Its schedule.
        x: [1, channels, h, w], at the time of the first index.
        view: Of the whole image.
        progress: Called after each step.
        indices: Steps to run; all if left out.
        noise: Fresh noise for each step, for a stepper with an `eta`.
        begin: Called before each step with its index.

    Returns:
        The latent after the last step, and the clean latent that this step predicted.
    """
    clean = x
    for index in range(len(stepper.timesteps)) if indices is None else indices:
        begin(index)
        output = predict(x, stepper.timesteps[index], view)
        x, clean = stepper.step(output, index, x, None if noise is None else noise.normal(x.shape))
        progress.step(partial(_same, clean))
    return x, clean
