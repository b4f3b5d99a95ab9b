"""A bundle of random weights, small enough to be written and run in a second, in the layout of a real one."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from giantleap.models.bundle.bundle import write_bundle
from giantleap.models.bundle.descriptor import (
    About,
    Defaults,
    Descriptor,
    LatentSpaceSource,
    Limits,
    LuaFile,
    PipelineSource,
    SwinirFiles,
    Vocabulary,
)
from giantleap.models.bundle.digests import file_hashes
from giantleap.models.lua.checkpoints import write_lua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from giantleap.training.pocket.tokenizer import open_tokenizer

NAME = "tiny"
LATENT_CHANNELS = 16
STRIDE_PX = 8
BASE_PX = 64
SCALING_FACTOR = 0.5
STEPS = 4
WINDOW = 4


def write_tiny_bundle(directory: Path, name: str = NAME, seed: int = 0) -> None:
    """Write a bundle: pipeline, LUA with heads x2 and x4, SwinIRs, `bundle.toml`. A seed gives the same weights."""
    directory.mkdir(parents=True)
    write_tiny_pipeline(directory / "pipeline", seed)
    write_tiny_lua(directory / "lua.safetensors", seed)
    for scale in (2, 4):
        write_tiny_swinir(directory / f"swinir_x{scale}.safetensors", scale)
    files = file_hashes(directory)
    descriptor = Descriptor(
        bundle=About(name=name, title="Tiny", license="Apache-2.0", provenance="Random weights, for tests only."),
        pipeline=PipelineSource(path="pipeline"),
        latent_space=LatentSpaceSource(name=NAME, channels=LATENT_CHANNELS, stride_px=STRIDE_PX, scale=SCALING_FACTOR),
        lua=LuaFile(file="lua.safetensors", scales=(2, 4), sha256=files["lua.safetensors"]),
        swinir=SwinirFiles(x2="swinir_x2.safetensors", x4="swinir_x4.safetensors"),
        defaults=Defaults(steps=STEPS, guidance_scale=3.0, base_width_px=BASE_PX, base_height_px=BASE_PX, scale=2),
        limits=Limits(min_base_px=32, max_base_px=256, multiple_px=STRIDE_PX, max_steps=50, max_direct_px=256),
        vocabulary=Vocabulary(closed=True),
        files=files,
    )
    write_bundle(directory, descriptor)


def write_tiny_lua(path: Path, seed: int = 0) -> None:
    """Write a LUA whose weights all matter: a fresh network's heads would start at zero."""
    spec = LuaSpec(LATENT_CHANNELS, 12, (2,), 2, window=WINDOW, num_feat=8, bicubic_skip=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Lua(spec)
        for head in net.heads.values():
            torch.nn.init.normal_(head.get_parameter("conv_last.weight"), std=0.1)
    write_lua(path, net)


def write_tiny_swinir(path: Path, scale: int) -> None:
    """Write a network that enlarges pixels by one scale."""
    spec = LuaSpec(3, 12, (2,), 2, window=WINDOW, num_feat=8, scales=(scale,))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(scale)
        write_lua(path, Lua(spec))


def write_tiny_pipeline(directory: Path, seed: int = 0) -> None:
    """Write a stock diffusers pipeline directory: 16 latent channels, stride 8, a base size of 64 px.

    Effects: seeds torch's global generator for the length of the call only.
    """
    tokenizer = open_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            scaling_factor=SCALING_FACTOR,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            sample_size=BASE_PX,
        )
        unet = UNet2DConditionModel(
            sample_size=BASE_PX // STRIDE_PX,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 16),
            norm_num_groups=4,
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=8,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    pipeline: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory, safe_serialization=True)
