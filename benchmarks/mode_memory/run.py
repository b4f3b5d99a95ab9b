"""Prints the bytes that the weights of FLUX.1 take on the device by mode, from its networks without their weights.

`python -m benchmarks.mode_memory`. Activations come on top. `docs/memory-modes.md` has the same figures.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

NF4_BYTES: Final = 0.5 + 4 / 64  # a weight in 4 bits, and a float32 factor for each 64 of them


def flux1_networks() -> dict[str, nn.Module]:
    """The networks of FLUX.1, as their published configurations have them, on the device `meta`."""
    transformer: Any = FluxTransformer2DModel
    vae: Any = AutoencoderKL
    with torch.device("meta"):
        return {
            "transformer": transformer(guidance_embeds=True),
            "text_encoder_2": T5EncoderModel(
                T5Config(
                    vocab_size=32128,
                    d_model=4096,
                    d_kv=64,
                    d_ff=10240,
                    num_layers=24,
                    num_heads=64,
                    feed_forward_proj="gated-gelu",
                )
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            ),
            "vae": vae(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
        }


def size_bytes(network: nn.Module, layer_bytes: float = 2.0) -> int:
    """Bytes of a network in bfloat16 whose linear layers have `layer_bytes` for each weight."""
    linear = sum(each.weight.numel() for each in network.modules() if isinstance(each, nn.Linear))
    return int(2 * (sum(each.numel() for each in network.parameters()) - linear) + layer_bytes * linear)


def device_bytes(networks: Mapping[str, nn.Module]) -> dict[str, int]:
    """Bytes on the device by modes, as `GIANTLEAP_MODES` names them; of the parts that are there at once."""
    plain = {name: size_bytes(network) for name, network in networks.items()}
    fp8, nf4 = (size_bytes(networks["transformer"], each) for each in (1.0, NF4_BYTES))
    rest = sum(plain.values()) - plain["transformer"]
    return {
        "none": rest + plain["transformer"],
        "storage=fp8": rest + fp8,
        "quantize.transformer=bnb4": rest + nf4,
        "offload=model": plain["vae"] + max(plain.values()),
        "offload=model,storage=fp8": plain["vae"] + max(fp8, plain["text_encoder_2"]),
    }


def run() -> None:
    """Print one line for each choice of modes."""
    for modes, size in device_bytes(flux1_networks()).items():
        print(f"{modes:<28} {size / 1e9:5.1f} GB")
