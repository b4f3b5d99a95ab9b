"""The refine pass: adds a little noise to an enlarged latent and denoises it with the pipeline that generated it.

The text-to-image pipeline runs the tail of its own schedule, so guidance, prompts, packing and a shift that depends on
the size are the pipeline's. `giantleap.models.route` calls this between upscaling and decoding.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PNDMScheduler
from torch import Tensor

from giantleap.models.device import PartCallback, part_of
from giantleap.models.generation.generator import Generator
from giantleap.models.generation.items import GenerationItem
from giantleap.models.generation.refinement import Refinement, refine_seed, window_starts

_STEP_TABLES = ("timesteps", "sigmas", "sigmas_interpol")  # of a scheduler, an entry per step


def refine_latent(
    generator: Generator, latent: Tensor, item: GenerationItem, on_part: PartCallback | None = None
) -> Tensor:
    """Sample a latent again, one at a time, so that the result is the same in every batch.

    A latent larger than `Generator.max_side_px` is sampled in windows, whose results are blended where they overlap.
    All of them see the same noise where they overlap.

    Args:
        generator: Of a family that can refine.
        latent: Raw, [channels, h, w], of any size.
        item: Prompt, guidance, seed and `refine`; its size is not used.
        on_part: Called after each step. It may raise, which ends the pass.

    Returns:
        The refined raw latent, float32.

    Raises:
        ValueError: The family cannot refine, or the item does not ask for it.
    """
    space, refinement = generator.latent_space, item.refine
    if refinement is None or not generator.family.refines:
        raise ValueError(f"{type(generator.pipeline).__name__}: the item or the pipeline does not refine")
    unit = space.multiple_px // space.stride_px
    height, width = latent.shape[-2:]
    padded = F.pad(latent[None].float(), (0, -width % unit, 0, -height % unit), mode="replicate")
    noise = torch.randn(padded.shape, generator=torch.Generator("cpu").manual_seed(refine_seed(item.seed)))
    side = unit * max(1, generator.max_side_px // space.multiple_px) if generator.max_side_px else max(padded.shape)
    rows, columns = (window_starts(length, side, unit) for length in padded.shape[-2:])
    total, weights = torch.zeros_like(padded), torch.zeros_like(padded[:, :1])
    places = [(slice(y, y + side), slice(x, x + side)) for y, x in product(rows, columns)]
    for index, (down, across) in enumerate(places):
        window = _Window(generator, item, refinement, part_of(on_part, index, len(places)))
        refined = window.sample(padded[:, :, down, across], noise[:, :, down, across])
        if len(places) == 1:
            return refined[0, :, :height, :width].contiguous()
        weight = _ramp(refined.shape[-2], refined)[:, None] * _ramp(refined.shape[-1], refined)
        total[:, :, down, across] += weight * refined
        weights[:, :, down, across] += weight
    return (total / weights)[0, :, :height, :width].contiguous()


def _ramp(side: int, like: Tensor) -> Tensor:
    """The weight of each row of a window: it rises over the first quarter and falls over the last."""
    distance = torch.arange(1, side + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(distance, distance.flip(0)).clamp(max=max(1, side // 4))


class _Window:
    """One call of the pipeline."""

    def __init__(
        self, generator: Generator, item: GenerationItem, refinement: Refinement, on_part: PartCallback | None
    ) -> None:
        self._generator = generator
        self._item = replace(item, steps=refinement.schedule_steps, init_image=None, mask=None, references=())
        self._steps = refinement.steps
        self._on_part = on_part

    def sample(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Sample [1, channels, h, w] again."""
        space = self._generator.latent_space
        height_px, width_px = (space.stride_px * side for side in clean.shape[-2:])
        item = replace(self._item, width_px=width_px, height_px=height_px)
        with _noised_start(self._generator.pipeline, space.from_raw(clean), space.pack(noise), item.steps, self._steps):
            return self._generator.run([item], self._end_step)

    def _end_step(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if self._on_part is not None:
            self._on_part((step + 1) / pipeline.num_timesteps)
        return {}


@contextmanager
def _noised_start(pipeline: Any, clean: Tensor, noise: Tensor, schedule_steps: int, steps: int) -> Iterator[None]:
    """Within this, the pipeline starts at `clean` with noise, at the last `steps` of its schedule.

    Some pipelines make their latents before the schedule and some after it: the noise is added as soon as both exist.
    It is added in the tensor that the pipeline holds, whatever factor or type it has given that.
    """
    scheduler = pipeline.scheduler
    make_schedule, make_latents = scheduler.set_timesteps, pipeline.prepare_latents
    signature = inspect.signature(make_latents)
    started: dict[str, Any] = {}

    def start() -> None:
        if "latents" in started and "timesteps" in started:
            latents: Tensor = started["latents"]
            latents.copy_(_add_noise(scheduler, clean.to(latents.device), noise.to(latents.device)))

    @wraps(make_schedule)
    def set_timesteps(*args: Any, **options: Any) -> None:
        make_schedule(*args, **options)
        _keep_tail(scheduler, schedule_steps, steps)
        started["timesteps"] = scheduler.timesteps
        start()

    @wraps(make_latents)
    def prepare_latents(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        given = bound.arguments
        given["latents"] = torch.zeros(clean.shape, device=given["device"], dtype=given["dtype"])
        made = make_latents(*bound.args, **bound.kwargs)
        started["latents"] = made[0] if isinstance(made, tuple) else made
        start()
        return made

    scheduler.set_timesteps, pipeline.prepare_latents = set_timesteps, prepare_latents
    try:
        yield
    finally:
        del scheduler.set_timesteps, pipeline.prepare_latents


def _keep_tail(scheduler: Any, schedule_steps: int, steps: int) -> None:
    """Drop all but the last steps of a schedule that was just made."""
    first = (schedule_steps - steps) * scheduler.order
    repeats = isinstance(scheduler, PNDMScheduler)
    if repeats:  # it looks twice at its second step, which makes one entry more
        tail = scheduler.timesteps[-steps:]
        scheduler.timesteps = torch.cat([tail[:2], tail[1:]])
        return
    for name in _STEP_TABLES:
        if isinstance(table := getattr(scheduler, name, None), Tensor):
            setattr(scheduler, name, table[first:])
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def _add_noise(scheduler: Any, clean: Tensor, noise: Tensor) -> Tensor:
    """The latent at the first step of the scheduler."""
    first = scheduler.timesteps[:1]
    noised: Tensor = (
        scheduler.scale_noise(clean, first, noise)
        if hasattr(scheduler, "scale_noise")
        else scheduler.add_noise(clean, noise, first)
    )
    return noised
