"""Generates an image by a re-diffusion method: opens network and scheduler, runs the method's loop.

Items run one by one: each has its own windows and shifts, so that a batch gives what each item gives alone.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.bundle.descriptor import Method
from giantleap.models.device import PartCallback
from giantleap.models.generation.generator import Generator
from giantleap.models.generation.items import CancelCheck, GenerationItem, StepCallback
from giantleap.models.generation.previews import PreviewCallback, preview_steps
from giantleap.models.methods.demofusion import sample_demofusion
from giantleap.models.methods.denoiser import Denoiser
from giantleap.models.methods.hidiffusion import hidiffusion, plan_hidiffusion
from giantleap.models.methods.lsrna import sample_lsrna
from giantleap.models.methods.passes import first_step, plan_stages
from giantleap.models.methods.rectifiedhr import sample_rectifiedhr
from giantleap.models.methods.scalecrafter import plan_scalecrafter, scalecrafter
from giantleap.models.methods.steppers import FlowStepper, Stepper, open_stepper, sample
from giantleap.models.methods.views import NoiseSource, Progress, View
from giantleap.models.vae.autoencoder import Vae


class _CanceledError(Exception):
    """Leaves a loop: the image is not wanted any more."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What a method may use beside the network.

    Args:
        vae: Decodes and encodes.
        enlarge: LUA: from a raw latent to one that is so many times as large.
    """

    vae: Vae
    enlarge: Callable[[Tensor, float], Tensor]


def sample_items(
    generator: Generator,
    tools: Tools,
    items: Sequence[GenerationItem],
    method: Method,
    scale: int,
    on_step: StepCallback | None = None,
    is_canceled: CancelCheck | None = None,
    on_part: PartCallback | None = None,
    on_preview: PreviewCallback | None = None,
) -> list[Tensor | None]:
    """Generate images `scale` times as large as their items. Arguments not named here as of `Generator.generate`.

    Args:
        tools: VAE and enlarger.
        method: One of `REDIFFUSION`.
        scale: At least 2.
        on_part: Called within long steps; it may raise.

    Returns:
        A raw float32 latent per item, [channels, scale * h, scale * w]; None for a canceled one.

    Raises:
        ValueError: The items differ in what a batch shares, or the pipeline cannot run the method.
    """
    for item in items:
        generator.check(item, items[0])
    if any(item.init_image is not None or item.references for item in items):
        raise ValueError(f"{method} starts from noise; leave images out")
    steps = count_steps(method, scale, items[0].steps)
    total = len(items) * steps
    latents: list[Tensor | None] = []
    done = 0

    def end_step(to_clean: Callable[[], Tensor]) -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)
        if is_canceled is not None and is_canceled(len(latents)):
            raise _CanceledError
        index = len(latents)
        step = done - index * steps
        if on_preview is not None and step in preview_steps(items[index].previews, steps):
            on_preview(index, step, generator.latent_space.to_raw(to_clean().float())[0])

    progress = Progress(end_step, lambda: None if on_part is None else on_part(None))
    for index, item in enumerate(items):
        done = index * steps
        latent: Tensor | None = None
        if is_canceled is None or not is_canceled(index):
            with suppress(_CanceledError), generator.cleared():
                latent = _Sampling(generator, tools, item, scale, progress).run(method)
        latents.append(latent)
    return latents


def count_steps(method: Method, scale: int, steps: int) -> int:
    """How many steps a method reports for one image."""
    if method == "demofusion":
        return scale * steps
    return 2 * steps - first_step(steps) if method == "lsrna" else steps


class _Sampling:
    """The sampling of one image."""

    def __init__(
        self, generator: Generator, tools: Tools, item: GenerationItem, scale: int, progress: Progress
    ) -> None:
        self._adapters = generator.adapters
        self._space = generator.latent_space
        self._pipeline = generator.pipeline
        self._tools = tools
        self._item = item
        self._scale = scale
        self._progress = progress
        device = self._pipeline.device
        self._noise = NoiseSource(torch.Generator("cpu").manual_seed(item.seed), device)

    @torch.no_grad()
    def run(self, method: Method) -> Tensor:
        """The raw latent, [channels, h, w], float32."""
        self._adapters.activate(self._item.loras)
        denoiser = Denoiser.open(self._pipeline, self._item)
        stepper = open_stepper(
            self._pipeline.scheduler, self._item.steps, self._noise.device, eta=1.0 if method == "scalecrafter" else 0.0
        )
        scaled = self._run(method, denoiser, stepper)
        raw: Tensor = self._space.to_raw(scaled.float())[0]
        return raw

    def _run(self, method: Method, denoiser: Denoiser, stepper: Stepper) -> Tensor:
        noise, progress, scale = self._noise, self._progress, self._scale
        base, final = self._view(1), self._view(scale)
        places = (self._network.config.sample_size, self._space.stride_px)
        if method == "rectifiedhr":
            # The authors' guidance is for networks that predict noise; flow matching has no published one.
            stages = plan_stages(self._item.steps, scale, raises_guidance=not isinstance(stepper, FlowStepper))
            return sample_rectifiedhr(denoiser, stepper, self._start(1), base, stages, self._grow, noise, progress)
        if method == "demofusion":
            return sample_demofusion(denoiser, stepper, self._start(1), final, scale, *places, noise, progress)
        if method == "lsrna":
            models = (self._decode, self._enlarge)
            return sample_lsrna(denoiser, stepper, self._start(1), base, scale, *places, *models, noise, progress)
        unet, x = self._network, self._start(scale)
        if method == "hidiffusion":
            plan = plan_hidiffusion(unet, x.shape[-2], x.shape[-1], self._item.steps)
            with hidiffusion(unet, plan, noise) as state:
                return sample(denoiser, stepper, x, final, progress, begin=state.begin)[0]
        if method != "scalecrafter":
            raise ValueError(f"method {method} is not a re-diffusion method")
        with scalecrafter(plan_scalecrafter(unet, scale, self._item.steps), denoiser) as crafted:
            return sample(crafted, stepper, x, final, progress, noise=noise, begin=crafted.begin)[0]

    @property
    def _network(self) -> Any:
        return self._pipeline.unet if hasattr(self._pipeline, "unet") else self._pipeline.transformer

    def _view(self, scale: int) -> View:
        return View(scale * self._item.height_px, scale * self._item.width_px, self._item.guidance_scale)

    def _start(self, scale: int) -> Tensor:
        sides = (scale * side_px // self._space.stride_px for side_px in (self._item.height_px, self._item.width_px))
        return self._noise.normal((1, self._space.channels, *sides))

    def _grow(self, clean: Tensor, growth: float) -> Tensor:
        """Enlarge in pixels: decode, resize the 8-bit image, encode."""
        image = self._decode(clean)
        unit_px = self._space.multiple_px * (self._network.config.get("patch_size") or 1)
        sides = [round(growth * side_px / unit_px) * unit_px for side_px in (self._item.height_px, self._item.width_px)]
        levels = ((image / 2 + 0.5).clamp(0, 1) * 255).round() / 255
        large = F.interpolate(levels, size=sides, mode="bicubic", antialias=True).clamp(0, 1)  # as Pillow's bicubic
        return self._scaled(self._tools.vae.encode(large * 2 - 1, self._on_part))

    def _decode(self, clean: Tensor) -> Tensor:
        return self._tools.vae.decode(self._space.to_raw(clean.float()), on_part=self._on_part)

    def _enlarge(self, clean: Tensor) -> Tensor:
        return self._scaled(self._tools.enlarge(self._space.to_raw(clean.float()), self._scale))

    def _scaled(self, raw: Tensor) -> Tensor:
        scaled: Tensor = self._space.from_raw(raw).to(self._noise.device)
        return scaled

    def _on_part(self, fraction: float | None) -> None:
        self._progress.part()
