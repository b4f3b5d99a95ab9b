"""Draws raw latents from prompts with a stock diffusers pipeline: seeded per item, watched and stopped between steps.

The latents go to the upscaler in `models.route`. Which words a prompt may use is in `models.prompt_words`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from models.bundle import Bundle
from models.latent_space import LatentSpace

StepWatcher = Callable[[int, int], None]
CancelCheck = Callable[[], set[int]]

SEED_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class DrawItem:
    """One image to draw. The size is that of the base image, before upscaling."""

    prompt: str
    negative_prompt: str
    seed: int
    width_px: int
    height_px: int
    steps: int
    guidance_scale: float

    @property
    def shared(self) -> tuple[int, int, int, float]:
        """What the items of one batch must have in common."""
        return self.width_px, self.height_px, self.steps, self.guidance_scale


def image_seed(seed: int, index: int) -> int:
    """The seed of image `index` of a job: the first has the job's own, the next count on from there."""
    return (seed + index) % SEED_LIMIT


class Generator:
    """A diffusers text-to-image pipeline that stops at latents.

    Args:
        pipeline: Any pipeline that takes `output_type="latent"` and `callback_on_step_end`.
        latent_space: Says how the pipeline's latents become raw ones.
    """

    def __init__(self, pipeline: Any, latent_space: LatentSpace) -> None:
        self.pipeline = pipeline
        self.latent_space = latent_space

    @classmethod
    def open(cls, bundle: Bundle, device: torch.device, dtype: torch.dtype) -> Self:
        """Load the bundle's pipeline: from disk alone where that is a directory, and from safetensors only.

        Raises:
            OSError: the directory or a file in it is missing.

        Effects: quietens the libraries' own logs and progress bars, which would print prompts.
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        diffusers_logging.set_verbosity_error()  # a prompt that is cut off would be logged
        diffusers_logging.disable_progress_bar()
        pipeline = DiffusionPipeline.from_pretrained(
            str(bundle.pipeline),
            revision=bundle.revision,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=isinstance(bundle.pipeline, Path),
        )
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline.to(device), bundle.latent_space)

    def draw(self, items: Sequence[DrawItem], on_step: StepWatcher, canceled: CancelCheck) -> list[Tensor | None]:
        """Draw a batch.

        A seed gives the same latent on every device and in every batch, up to rounding: each item has a generator of
        its own on the CPU.

        Args:
            items: At least one; all of one size, number of steps and guidance.
            on_step: Called after each denoising step with (steps done, steps).
            canceled: Asked after each step for the indices of items that nobody wants any more. When that is all of
                them the rest of the steps is left out.

        Returns:
            A raw float32 latent per item, None for a canceled one.

        **Shape** each [channels, latent_height, latent_width].

        **Raises** ValueError: the items differ in what a batch shares.
        """
        first = items[0]
        if any(item.shared != first.shared for item in items):
            raise ValueError("items of one batch must share size, steps and guidance; draw them in several batches")
        gone: set[int] = set()

        def end_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, pipeline.num_timesteps)
            gone.update(canceled())
            if len(gone) == len(items):
                pipeline._interrupt = True  # diffusers' own way to stop; the next call sets it back
            return {}

        latents = self.pipeline(
            prompt=[item.prompt for item in items],
            negative_prompt=[item.negative_prompt for item in items],
            width=first.width_px,
            height=first.height_px,
            num_inference_steps=first.steps,
            guidance_scale=first.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(item.seed) for item in items],
            output_type="latent",
            callback_on_step_end=end_step,
        ).images
        raw = self.latent_space.to_raw(latents.float(), first.height_px, first.width_px)
        return [None if index in gone else latent for index, latent in enumerate(raw)]

    def lost_tokens(self, prompt: str) -> int:
        """How many tokens of the prompt lie beyond what the text encoder takes and are cut off."""
        tokenizer = self.pipeline.tokenizer
        return max(0, len(tokenizer(prompt).input_ids) - int(tokenizer.model_max_length))
