"""Networks small enough to be exported: the shape of a LUA of each kind, a VAE of random weights of each family."""

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan

from giantleap.models.lua.spec import LuaSpec
from tests.tiny_pipelines import tiny_dc_vae

SPECS = {
    "published": LuaSpec(4, 12, (2,), 2, window=4, num_feat=8),
    "pocket": LuaSpec(4, 12, (2,), 2, window=4, num_feat=8, bicubic_skip=True, latent_norm=True),
    "linear": LuaSpec(4, 12, (2,), 2, window=4, num_feat=8, linear_skip=True, latent_norm=True),
    "rgb": LuaSpec(3, 12, (2,), 2, window=4, num_feat=8, image_mean=(0.4, 0.5, 0.6)),
}


def random_vae(name: str) -> Any:
    torch.manual_seed(0)
    kl: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    video = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    video |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae: Any = {
        "kl": lambda: AutoencoderKL(**kl, latent_channels=4),
        "flux2": lambda: AutoencoderKLFlux2(**kl, latent_channels=4),
        "qwen": lambda: AutoencoderKLQwenImage(**video),
        "wan": lambda: AutoencoderKLWan(**video),
        "dc": lambda: tiny_dc_vae(4, (8, 8), attention=0),
        "dc-attention": lambda: tiny_dc_vae(4, (8, 8), attention=1),
    }[name]()
    return vae.eval()
