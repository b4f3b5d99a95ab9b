"""Generates raw latents from prompts with a stock diffusers pipeline: seeded per item, cancelable between steps.

`giantleap.models.generation.families` holds what differs between the pipeline classes. The latents go to the upscaler
in `giantleap.models.route`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial, wraps
from typing import Any, Self

import torch
from torch import Tensor

from giantleap.models.adapters.cache import AdapterCache
from giantleap.models.bundle.bundle import Bundle
from giantleap.models.bundle.modes import PLAIN, Modes
from giantleap.models.generation.families import FAMILIES
from giantleap.models.generation.items import CancelCheck, GenerationItem, StepCallback
from giantleap.models.generation.loading import load_pipeline
from giantleap.models.generation.previews import PreviewCallback, preview_steps, to_clean
from giantleap.models.generation.sources import check_images, with_images
from giantleap.models.latent_space import LatentSpace


class _AllCanceledError(Exception):
    """Leaves the pipeline's loop: no image of the call is wanted any more. Not every pipeline can be interrupted."""


class Generator:
    """A diffusers text-to-image pipeline that stops at latents.

    Args:
        pipeline: Of one of the classes in `FAMILIES`.
        latent_space: Converts the pipeline's latents to raw ones.
        max_side_px: Longest side of an image that it samples at once in a refine pass; None for any.
        modes: Those that the pipeline has (`giantleap.models.generation.modes`).

    Raises:
        ValueError: The pipeline is of another class.
    """

    def __init__(
        self, pipeline: Any, latent_space: LatentSpace, max_side_px: int | None = None, modes: Modes = PLAIN
    ) -> None:
        if type(pipeline) not in FAMILIES:
            known = ", ".join(cls.__name__ for cls in FAMILIES)
            raise ValueError(f"pipeline class {type(pipeline).__name__}: only {known} are known")
        self.pipeline = pipeline
        self.family = FAMILIES[type(pipeline)]
        self.family.prepare(pipeline)
        self.latent_space = latent_space
        self.modes = modes
        self.adapters = AdapterCache(pipeline, hotswap=modes.compile != "none")
        self.max_side_px = max_side_px
        self._clean: Tensor | None = None  # of the last step, while an item has previews
        if latent_space.statistics_in_vae and latent_space.mean is None:
            norm, eps = pipeline.vae.bn, pipeline.vae.config.batch_norm_eps
            std = (norm.running_var.double() + eps).sqrt()
            self.latent_space = latent_space.with_statistics(norm.running_mean.tolist(), std.tolist())

    @classmethod
    def open(cls, bundle: Bundle, device: torch.device, dtype: torch.dtype) -> Self:
        """Load the bundle's pipeline (`load_pipeline`).

        Raises:
            BundleError: As `load_pipeline`.
            ValueError: The pipeline is of an unknown class.
        """
        return cls(load_pipeline(bundle, device, dtype), bundle.latent_space, bundle.max_side_px, bundle.modes)

    @property
    def supports_init_image(self) -> bool:
        """Whether items may have an `init_image`."""
        return self.family.image_pipeline is not None

    @property
    def takes_negative_prompt(self) -> bool:
        """Whether items may have a negative prompt."""
        return self.family.no_negative is not None

    def generate(
        self,
        items: Sequence[GenerationItem],
        *,
        on_step: StepCallback | None = None,
        is_canceled: CancelCheck | None = None,
        on_preview: PreviewCallback | None = None,
    ) -> list[Tensor | None]:
        """Generate the raw latents of a batch.

        A seed gives the same latent on every device and in every batch, up to rounding: each item has its own generator
        on the CPU. A pipeline whose result depends on the other prompts of a batch, and one that takes reference
        images, runs the items one by one.

        Args:
            items: At least one; all of one size, number of steps, guidance, strength and kind of images.
            on_step: Called after each denoising step with (steps done, steps).
            is_canceled: Called after each step, and after `on_step`, with the index of each item: whether its result is
                no longer wanted. Once all items are canceled the remaining steps are skipped.
            on_preview: Called after `is_canceled`, for each item whose `previews` ask for this step.

        Returns:
            A raw float32 latent per item, [channels, latent_height, latent_width]; None for a canceled one.

        Raises:
            ValueError: The items differ in what a batch shares, or one needs what the pipeline cannot do.
        """
        for item in items:
            self.check(item, items[0])
        together = self.family.batches and not items[0].references
        together = together and self.modes.cache == "none"  # a cache decides by the mean of its batch
        runs = [list(range(len(items)))] if together else [[index] for index in range(len(items))]
        latents: list[Tensor | None] = [None] * len(items)
        canceled: set[int] = set()

        def end_step(
            pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any], *, run: list[int]
        ) -> dict[str, Any]:
            steps = pipeline.num_timesteps
            if on_step is not None:
                on_step(runs.index(run) * steps + step + 1, len(runs) * steps)
            if is_canceled is not None:
                canceled.update(index for index in range(len(items)) if is_canceled(index))
            if canceled.issuperset(run):
                raise _AllCanceledError
            if on_preview is not None and self._clean is not None:
                previewed = {index for index in run if step + 1 in preview_steps(items[index].previews, steps)}
                for index in sorted(previewed - canceled):
                    row = self._clean[run.index(index)][None].float()
                    on_preview(index, step + 1, self._to_raw(row, items[index])[0])
            return {}

        for run in runs:
            if canceled.issuperset(run):
                continue
            with suppress(_AllCanceledError):
                latents_of_run = self.run([items[index] for index in run], partial(end_step, run=run))
                for index, latent in zip(run, latents_of_run, strict=True):
                    latents[index] = latent
        return [None if index in canceled else latent for index, latent in enumerate(latents)]

    def truncated_tokens(self, prompt: str) -> int:
        """Number of tokens of a prompt beyond what the text encoder takes.

        Of several encoders the one with the most room counts. Words that the family puts around a prompt count too.
        """
        return max(0, self.family.truncated_tokens(self.pipeline, prompt))

    def check(self, item: GenerationItem, first: GenerationItem) -> None:
        """Raise ValueError, as `generate` does, for an item that cannot be generated, or not together with `first`."""
        name, multiple_px = type(self.pipeline).__name__, self.latent_space.multiple_px
        if item.shared != first.shared:
            raise ValueError(
                "items of one batch must share size, steps, guidance, strength, images and LoRAs; use several batches"
            )
        if item.width_px % multiple_px or item.height_px % multiple_px:
            raise ValueError(
                f"{item.width_px}x{item.height_px} px: {name} needs sides that are multiples of {multiple_px}"
            )
        if item.negative_prompt and not self.takes_negative_prompt:
            raise ValueError(f"{name} takes no negative prompt")
        check_images(item, self.pipeline, self.family, self.latent_space.channels)

    def run(self, items: Sequence[GenerationItem], end_step: Callable[..., dict[str, Any]]) -> Tensor:
        """Call the pipeline once; returns raw latents, [items, channels, latent_height, latent_width], float32."""
        first = items[0]
        self.adapters.activate(first.loras)
        arguments = self._prompts(items) | {
            self.family.guidance: first.guidance_scale,
            "width": first.width_px,
            "height": first.height_px,
            "num_inference_steps": first.steps,
            "generator": [torch.Generator("cpu").manual_seed(item.seed) for item in items],
            "output_type": "latent",
            "callback_on_step_end": end_step,
            **self.family.arguments(self.pipeline, first),
        }
        pipeline, images = with_images(self.pipeline, self.family, items, self.latent_space.stride_px)
        arguments |= images
        keep = self._keep_clean if any(item.previews for item in items) else None
        try:
            with _prepared_steps(pipeline.scheduler, arguments["generator"], keep), self.cleared():
                latents: Tensor = pipeline(**arguments).images.float()
        finally:
            self._clean = None
        if self.family.returns_raw:
            self.latent_space.check_raw(tuple(latents.shape))
            return latents
        return self._to_raw(latents, first)

    def _to_raw(self, latents: Tensor, item: GenerationItem) -> Tensor:
        return self.latent_space.to_raw(latents, item.height_px, item.width_px)

    def _keep_clean(self, arguments: Mapping[str, Any], made: Any, scheduler: Any) -> None:
        self._clean = to_clean(scheduler, arguments, made)

    @contextmanager
    def cleared(self) -> Iterator[None]:
        """Context of one call of the pipeline or its network: afterwards no step is cached and no weight left.

        The pipelines themselves do this only at the end of a call that is not canceled.
        """
        if self.modes.cache == "none" and self.modes.offload != "model":
            yield
            return
        try:
            with ExitStack() as stack:
                if self.modes.cache != "none":  # FLUX.1 from an image names no cache itself
                    stack.enter_context(self.pipeline.transformer.cache_context("cond"))
                yield
        finally:
            self.pipeline.maybe_free_model_hooks()

    @torch.no_grad()
    def _prompts(self, items: Sequence[GenerationItem]) -> dict[str, Any]:
        prompts = [item.prompt for item in items]
        if self.family.no_negative is None:
            return {"prompt": prompts}
        negative = [item.negative_prompt or self.family.no_negative for item in items]
        if not getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False):
            return {"prompt": prompts, "negative_prompt": negative}
        # SDXL embeds an empty negative prompt as zeros, but only for a whole batch.
        positive, away, pooled, pooled_away = self.pipeline.encode_prompt(prompts, negative_prompt=negative)
        named = torch.tensor([bool(item.negative_prompt) for item in items], device=away.device, dtype=away.dtype)
        return {
            "prompt_embeds": positive,
            "negative_prompt_embeds": away * named[:, None, None],
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": pooled_away * named[:, None],
        }


@contextmanager
def _prepared_steps(
    scheduler: Any, generators: Sequence[torch.Generator], on_made: Callable[..., object] | None
) -> Iterator[None]:
    """Give the generators to the scheduler's steps too, which most pipelines of flow models do not.

    A scheduler that draws noise in its steps would draw it from torch's global generator. `on_made` sees the arguments
    and the result of each step, and the scheduler.
    """
    step = scheduler.step
    signature = inspect.signature(step)
    seeds = {"generator": generators} if "generator" in signature.parameters else {}

    @wraps(step)
    def prepared(*args: Any, **options: Any) -> Any:
        options = seeds | options
        made = step(*args, **options)
        if on_made is not None:
            on_made(signature.bind(*args, **options).arguments, made, scheduler)
        return made

    scheduler.step = prepared
    try:
        yield
    finally:
        del scheduler.step
