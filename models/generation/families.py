"""Differences between the supported pipeline classes of diffusers: `FAMILIES`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from diffusers import (
    Flux2KleinInpaintPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    PRXPipeline,
    QwenImage21Pipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImagePipeline,
)

from giantleap.models.generation.items import GenerationItem
from giantleap.models.generation.prompt_tokens import (
    own_prompt_length,
    truncated_by_clip,
    truncated_by_gemma,
    truncated_by_mistral,
    truncated_by_none,
    truncated_by_prx,
    truncated_by_qwen3,
    truncated_by_qwen25,
    truncated_by_t5,
)


@dataclass(frozen=True, slots=True)
class Family:
    """How one pipeline class differs from the others.

    Args:
        truncated_tokens: Number of tokens of a prompt that are cut off; negative if there is room left.
        image_pipeline: Its image-to-image class; None if diffusers has none.
        inpaint_pipeline: Its class for masks (inpainting); None if diffusers has none.
        max_mask_px: Pixels of an image above which that class would change its size; None for any.
        max_references: Maximum number of reference images.
        guidance: The argument that takes `GenerationItem.guidance_scale`.
        no_negative: The negative prompt that stands for none; None if the class takes no negative prompt.
        returns_raw: Whether `output_type="latent"` returns raw latents already.
        batches: Whether an item's result is the same in a batch of prompts of different lengths.
        refines: Whether it can start from a latent with noise, at a later step of its schedule.
        arguments: Further arguments of the call, in place of defaults that do not fit the pipeline or the item.
        prepare: Called once with the pipeline.
    """

    truncated_tokens: Callable[[Any, str], int]
    image_pipeline: type | None = None
    inpaint_pipeline: type | None = None
    max_mask_px: int | None = None
    max_references: int = 0
    guidance: str = "guidance_scale"
    no_negative: str | None = ""
    returns_raw: bool = False
    batches: bool = True
    refines: bool = True
    arguments: Callable[[Any, GenerationItem], dict[str, Any]] = lambda pipeline, item: {}
    prepare: Callable[[Any], object] = lambda pipeline: None


def _kontext_arguments(pipeline: Any, item: GenerationItem) -> dict[str, Any]:
    return {"max_area": item.width_px * item.height_px}  # the size of the item, not one of a megapixel


def _prx_arguments(pipeline: Any, item: GenerationItem) -> dict[str, Any]:
    return {"use_resolution_binning": False}  # the size of the item, not the nearest of a list


def _sana_arguments(pipeline: Any, item: GenerationItem) -> dict[str, Any]:
    return {"use_resolution_binning": False, **own_prompt_length(pipeline)}


def _sprint_arguments(pipeline: Any, item: GenerationItem) -> dict[str, Any]:
    # The time between two steps is a setting of two steps only.
    return _sana_arguments(pipeline, item) | ({} if item.steps == 2 else {"intermediate_timesteps": None})


def _repeat_timesteps(pipeline: Any) -> None:
    """Give the network a timestep for each image; PRXPipeline gives one for each half of a guided batch."""

    def repeat(network: Any, positional: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        timestep, count = named["timestep"], len(named["hidden_states"])
        return positional, named | {"timestep": timestep.repeat_interleave(count // len(timestep))}

    pipeline.transformer.register_forward_pre_hook(repeat, with_kwargs=True)


# As the classes behave in diffusers 0.42. Qwen-Image takes no guidance at all without a negative prompt, and a space is
# what its model card gives for none. In Qwen-Image 2.1 the place of the image among the tokens, and with it the image,
# moves with the longest prompt of the batch.
FAMILIES: Mapping[type, Family] = MappingProxyType(
    {
        StableDiffusionPipeline: Family(
            truncated_by_clip, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
        ),
        StableDiffusionXLPipeline: Family(
            truncated_by_clip, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
        ),
        StableDiffusion3Pipeline: Family(
            truncated_by_t5, StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline
        ),
        FluxPipeline: Family(truncated_by_t5, FluxImg2ImgPipeline, FluxInpaintPipeline, no_negative=None),
        FluxKontextPipeline: Family(
            truncated_by_t5, max_references=1, no_negative=None, refines=False, arguments=_kontext_arguments
        ),
        Flux2Pipeline: Family(truncated_by_mistral, max_references=8, no_negative=None, refines=False),
        Flux2KleinPipeline: Family(
            truncated_by_qwen3,
            inpaint_pipeline=Flux2KleinInpaintPipeline,
            max_mask_px=1024 * 1024,
            max_references=8,
            no_negative=None,
            returns_raw=True,
            refines=False,
        ),
        QwenImagePipeline: Family(
            truncated_by_qwen25,
            QwenImageImg2ImgPipeline,
            QwenImageInpaintPipeline,
            guidance="true_cfg_scale",
            no_negative=" ",
        ),
        ZImagePipeline: Family(truncated_by_qwen3, ZImageImg2ImgPipeline, ZImageInpaintPipeline),
        QwenImage21Pipeline: Family(truncated_by_none, guidance="true_cfg_scale", batches=False),
        PRXPipeline: Family(truncated_by_prx, arguments=_prx_arguments, prepare=_repeat_timesteps),
        SanaPipeline: Family(truncated_by_gemma, arguments=_sana_arguments),
        SanaSprintPipeline: Family(
            truncated_by_gemma,
            SanaSprintImg2ImgPipeline,
            no_negative=None,
            refines=False,
            arguments=_sprint_arguments,
        ),
    }
)
