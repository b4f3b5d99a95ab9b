"""The decoders and settings of the decode benchmark. Nothing here loads torch, which `--help` does not need."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

DecodeMethod = Literal["plain", "exact", "tiled", "tiny"]
METHODS: tuple[DecodeMethod, ...] = get_args(DecodeMethod)
DTYPES = ("float32", "bfloat16")
RESULT = Path("benchmarks/results/decode.json")

_KL: Mapping[str, Any] = MappingProxyType(
    {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "sample_size": 1024,
    }
)
_SANA_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
VAE_CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sdxl": {**_KL, "latent_channels": 4},
        "flux1": {**_KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        "pocket24": {
            "latent_channels": 24,
            "encoder_block_out_channels": (32, 32, 64),
            "decoder_block_out_channels": (32, 32, 64),
            "encoder_layers_per_block": (0, 1, 1),
            "decoder_layers_per_block": (0, 2, 2),
            "encoder_qkv_multiscales": ((),) * 3,
            "decoder_qkv_multiscales": ((),) * 3,
            "encoder_out_shortcut": False,
            "decoder_in_shortcut": False,
        },
        "sana": {
            "latent_channels": 32,
            "encoder_block_types": _SANA_BLOCKS,
            "decoder_block_types": _SANA_BLOCKS,
            "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
            "downsample_block_type": "Conv",
            "upsample_block_type": "interpolate",
        },
    }
)


def stride_px(family: str) -> int:
    """Image pixels per latent pixel."""
    config = VAE_CONFIGS[family]
    return int(2 ** (len(config.get("encoder_block_out_channels") or config["block_out_channels"]) - 1))


@dataclass(frozen=True)
class Case:
    """Settings shared by all rows. `channels_last` is the memory format of the weights; strips choose their own."""

    family: str
    dtype: str
    channels_last: bool
    threads: int
    runs: int

    @property
    def options(self) -> list[str]:
        """The settings as command-line options."""
        options = ["--family", self.family, "--dtype", self.dtype, "--threads", str(self.threads)]
        return [*options, "--runs", str(self.runs), *(["--channels-last"] if self.channels_last else [])]
