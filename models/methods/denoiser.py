"""The network of a diffusers pipeline as a `Predict`: prompts encoded once, guidance, the extra inputs of SDXL.

The stock pipelines hold their loop and their network in one call; the methods here need loops of their own.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import SanaPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from giantleap.models.generation.items import GenerationItem
from giantleap.models.generation.prompt_tokens import own_prompt_length
from giantleap.models.methods.views import View

Prompt = Mapping[str, Tensor]
Network = Callable[[Tensor, Tensor, Prompt, View], Tensor]


class Denoiser:
    """A network with the prompts of one image.

    Args:
        network: Runs latents with one prompt each.
        away: The negative prompt, tensors of one row.
        toward: The prompt, likewise.
    """

    def __init__(self, network: Network, away: Prompt, toward: Prompt) -> None:
        self._network = network
        self._away = away
        self._toward = toward

    @classmethod
    def open(cls, pipeline: Any, item: GenerationItem) -> "Denoiser":
        """Encode the prompts of an item.

        Raises:
            ValueError: The pipeline is of another class, or has its guidance as an input of the network.
        """
        kind = type(pipeline)
        if kind is SanaPipeline:
            return cls(partial(_run_sana, pipeline.transformer), *_encode_sana(pipeline, item))
        if kind not in (StableDiffusionPipeline, StableDiffusionXLPipeline):
            raise ValueError(f"{kind.__name__} has no loop of its own here; choose another method")
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise ValueError("a UNet with its guidance as an input was distilled for few steps; choose another method")
        encode = _encode_sdxl if kind is StableDiffusionXLPipeline else _encode_sd
        return cls(partial(_run_unet, pipeline.unet), *encode(pipeline, item))

    def halves(self, x: Tensor, t: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """The predictions for the negative prompt and for the prompt; the same one twice without guidance."""
        views = len(x)
        if view.guidance_scale <= 1:
            only = self._network(x, t, _rows([self._toward], views), view).float()
            return only, only
        both = self._network(torch.cat([x, x]), t, _rows([self._away, self._toward], views), view).float()
        away, toward = both.chunk(2)
        return away, toward

    def __call__(self, x: Tensor, t: Tensor, view: View) -> Tensor:
        """See `giantleap.models.methods.views.Predict`."""
        away, toward = self.halves(x, t, view)
        return guide(away, toward, view.guidance_scale)


def guide(away: Tensor, toward: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, equation 6)."""
    return toward if guidance_scale <= 1 else away + guidance_scale * (toward - away)


def _rows(prompts: list[Prompt], views: int) -> Prompt:
    return {name: torch.cat([each[name].repeat_interleave(views, 0) for each in prompts]) for name in prompts[0]}


def _run_unet(unet: Any, x: Tensor, t: Tensor, prompt: Prompt, view: View) -> Tensor:
    text, added = prompt["text"], None
    if "pooled" in prompt:
        size = (view.height_px, view.width_px)
        corners = view.corners_px or ((0, 0),)
        ids = torch.tensor([(*size, *corner, *size) for corner in corners], dtype=text.dtype, device=text.device)
        added = {"text_embeds": prompt["pooled"], "time_ids": ids.repeat(len(x) // len(ids), 1)}
    output: Tensor = unet(x.to(text.dtype), t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[
        0
    ]
    return output


def _run_sana(transformer: Any, x: Tensor, t: Tensor, prompt: Prompt, view: View) -> Tensor:
    dtype = transformer.dtype
    output: Tensor = transformer(
        x.to(dtype),
        encoder_hidden_states=prompt["text"].to(dtype),
        encoder_attention_mask=prompt["mask"],
        timestep=t.expand(len(x)) * transformer.config.timestep_scale,
        return_dict=False,
    )[0]
    return output.chunk(2, dim=1)[0] if transformer.config.out_channels // 2 == x.shape[1] else output


def _encode_sd(pipeline: Any, item: GenerationItem) -> tuple[Prompt, Prompt]:
    toward, away = pipeline.encode_prompt(
        item.prompt, pipeline.device, 1, True, negative_prompt=item.negative_prompt or None
    )
    return {"text": away}, {"text": toward}


def _encode_sdxl(pipeline: Any, item: GenerationItem) -> tuple[Prompt, Prompt]:
    toward, away, pooled, pooled_away = pipeline.encode_prompt(
        item.prompt, negative_prompt=item.negative_prompt or None
    )
    return {"text": away, "pooled": pooled_away}, {"text": toward, "pooled": pooled}


def _encode_sana(pipeline: Any, item: GenerationItem) -> tuple[Prompt, Prompt]:
    defaults = inspect.signature(type(pipeline).__call__).parameters
    length = {name: defaults[name].default for name in ("max_sequence_length", "complex_human_instruction")}
    toward, mask, away, mask_away = pipeline.encode_prompt(
        item.prompt, True, negative_prompt=item.negative_prompt, **length | own_prompt_length(pipeline)
    )
    return {"text": away, "mask": mask_away}, {"text": toward, "mask": mask}
