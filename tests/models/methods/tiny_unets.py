"""Stock pipelines around small random UNets with the levels of the real ones: SD 1.5 has four, SDXL three."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from giantleap.models.generation.generator import Generator
from giantleap.models.generation.items import GenerationItem
from giantleap.models.latent_space import LATENT_SPACES, LatentSpace
from giantleap.models.methods.views import NoiseSource, Progress
from tests.tiny_pipelines import tiny_sana, tiny_sd15, tiny_sdxl

ITEM = GenerationItem("a red sphere", "", 3, width_px=64, height_px=64, steps=3, guidance_scale=3.0)
WIDE = GenerationItem("a red sphere", "fog", 3, width_px=96, height_px=64, steps=3, guidance_scale=3.0)
NO_PROGRESS = Progress(lambda to_clean: None, lambda: None)


def sd15_levels(sample_size: int = 16) -> Any:
    """Attention at levels 0 to 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = UNet2DConditionModel(
            sample_size=sample_size,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            block_out_channels=(8, 8, 16, 16),
            norm_num_groups=4,
            cross_attention_dim=32,
            attention_head_dim=4,
        )
    return network.eval()


def sdxl_levels(sample_size: int = 16) -> Any:
    """No attention at level 0, one and two transformer layers at levels 1 and 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = UNet2DConditionModel(
            sample_size=sample_size,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16, 16),
            transformer_layers_per_block=(1, 2, 2),
            norm_num_groups=4,
            cross_attention_dim=64,
            attention_head_dim=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
        )
    return network.eval()


def _with_unet(pipeline: Any, unet: Any) -> Any:
    config = dict(pipeline.scheduler.config) | {"clip_sample": False}
    pipeline.register_modules(unet=unet, scheduler=DDIMScheduler.from_config(config))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sana() -> Any:
    pipeline: Any = tiny_sana(max_tokens=90)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


PIPELINES: dict[str, tuple[Callable[[], Any], LatentSpace]] = {
    "sd15": (lambda: _with_unet(tiny_sd15(), sd15_levels(8)), LATENT_SPACES["sd15"]),
    "sdxl": (lambda: _with_unet(tiny_sdxl(), sdxl_levels(8)), LATENT_SPACES["sdxl"]),
    "sana": (_sana, LatentSpace("stride4", 24, 4, scale=0.5, side_multiple=8)),
}


def open_generator(name: str) -> Generator:
    build, space = PIPELINES[name]
    return Generator(build(), space)


def noise_of(seed: int) -> NoiseSource:
    return NoiseSource(torch.Generator("cpu").manual_seed(seed), torch.device("cpu"))


def stock_latent(pipeline: Any, item: GenerationItem, **arguments: Any) -> Tensor:
    """What the pipeline draws on its own."""
    latent: Tensor = pipeline(
        prompt=item.prompt,
        negative_prompt=item.negative_prompt or None,
        width=item.width_px,
        height=item.height_px,
        num_inference_steps=item.steps,
        guidance_scale=item.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(item.seed),
        output_type="latent",
        **arguments,
    ).images
    return latent
