"""Checks that a decoder is the one that `models/vae/decode.py` computes without calling its blocks.

The exact decode reads the weights and calls no `forward`. A part of another type, with another setting or with a hook
would be computed wrongly without an error, so every part is checked.
"""

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

KNOWN_PARTS = frozenset(
    {Attention, Decoder, ResnetBlock2D, UNetMidBlock2D, UpDecoderBlock2D, Upsample2D}
    | {nn.Conv2d, nn.Dropout, nn.GroupNorm, nn.Linear, nn.ModuleList, nn.SiLU}
)


class UnknownDecoderError(TypeError):
    """A decoder with blocks that the exact decode does not know."""


def check_decoder(vae: Any) -> None:
    """Check every part of a VAE's decoder.

    Raises:
        UnknownDecoderError: It names the part that is not known.
    """
    check_autoencoder(vae, AutoencoderKL, AutoencoderKLFlux2)
    decoder = vae.decoder
    _check_roles(decoder)
    parts = list(decoder.named_modules(prefix="decoder"))
    if vae.post_quant_conv is not None:
        parts.append(("post_quant_conv", vae.post_quant_conv))
    for name, module in parts:
        if type(module) not in KNOWN_PARTS:
            known = ", ".join(sorted(part.__name__ for part in KNOWN_PARTS))
            raise UnknownDecoderError(f"{name} is a {type(module).__name__}; an exact decode knows {known}")
        if has_hook(module):
            raise UnknownDecoderError(f"{name} has a hook, which an exact decode would not run; remove it")
        problem = _problem(module)
        if problem:
            raise UnknownDecoderError(f"{name} {problem}, which an exact decode does not compute")


def check_autoencoder(vae: Any, *expected: type[nn.Module]) -> None:
    """Check the class of an autoencoder.

    Raises:
        UnknownDecoderError: It is none of the expected classes.
    """
    if not isinstance(vae, expected):
        names = " or ".join(cls.__name__ for cls in expected)
        raise UnknownDecoderError(f"this decode is for {names}; found {type(vae).__name__}")


def has_hook(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def convolution_problem(conv: nn.Conv2d) -> str | None:
    """How a convolution differs from one of 1x1 or 3x3 that keeps the size; None if it does not."""
    side = conv.kernel_size[0]
    usual = ((side, side), (1, 1), (side // 2, side // 2), (1, 1), 1, "zeros")
    settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return None if side in (1, 3) and settings == usual else f"is {conv}"


def _check_roles(decoder: Any) -> None:
    """Check that the decoder's own parts have the expected types; the blocks check theirs."""
    if type(decoder) is not Decoder:
        raise UnknownDecoderError(f"decoder is a {type(decoder).__name__}; an exact decode knows Decoder")
    roles: list[tuple[str, Any, type[nn.Module]]] = [
        ("mid_block", decoder.mid_block, UNetMidBlock2D),
        ("conv_in", decoder.conv_in, nn.Conv2d),
        ("conv_norm_out", decoder.conv_norm_out, nn.GroupNorm),
        ("conv_act", decoder.conv_act, nn.SiLU),
        ("conv_out", decoder.conv_out, nn.Conv2d),
        *((f"up_blocks.{index}", block, UpDecoderBlock2D) for index, block in enumerate(decoder.up_blocks)),
    ]
    for name, module, expected in roles:
        if type(module) is not expected:
            raise UnknownDecoderError(
                f"decoder.{name} is a {type(module).__name__}; an exact decode knows {expected.__name__}"
            )
    for name in ("conv_in", "conv_out"):
        if getattr(decoder, name).kernel_size != (3, 3):
            raise UnknownDecoderError(f"decoder.{name} is {getattr(decoder, name)}; an exact decode knows a 3x3 kernel")


def _problem(module: nn.Module) -> str | None:
    """The setting of a known part that differs from the decoders of AutoencoderKL; None if there is none."""
    if isinstance(module, nn.Conv2d):
        return convolution_problem(module)
    if isinstance(module, nn.Dropout):
        return f"drops {module.p} while training" if module.training and module.p > 0 else None
    if isinstance(module, nn.GroupNorm):
        return None if module.affine else "has no weights"
    if isinstance(module, ResnetBlock2D):
        return _resnet_problem(module)
    if isinstance(module, Upsample2D):
        usual_layer = module.use_conv and not module.use_conv_transpose and module.interpolate and module.norm is None
        if usual_layer and module.name == "conv" and getattr(module.conv, "kernel_size", None) == (3, 3):
            return None
        return "is not a nearest-neighbor doubling and a 3x3 convolution"
    if isinstance(module, Attention):
        return _attention_problem(module)
    return None


def _resnet_problem(block: ResnetBlock2D) -> str | None:
    if block.time_emb_proj is not None or block.time_embedding_norm == "scale_shift":
        return "takes a time embedding"
    if block.upsample is not None or block.downsample is not None:
        return "changes the resolution"
    if block.output_scale_factor != 1.0:
        return f"divides its output by {block.output_scale_factor}"
    kernels = block.conv1.kernel_size, block.conv2.kernel_size, getattr(block.conv_shortcut, "kernel_size", (1, 1))
    if kernels != ((3, 3), (3, 3), (1, 1)):
        return f"has kernels of {kernels}"
    return None if type(block.nonlinearity) is nn.SiLU else f"has the activation {block.nonlinearity}"


def _attention_problem(attention: Attention) -> str | None:
    if type(attention.processor) not in (AttnProcessor, AttnProcessor2_0):
        return f"has the processor {type(attention.processor).__name__}"
    if attention.group_norm is None or attention.spatial_norm is not None:
        return "has no group norm of its own"
    if attention.norm_q is not None or attention.norm_k is not None or attention.fused_projections:
        return "normalizes or fuses its projections"
    if not attention.residual_connection or attention.rescale_output_factor != 1.0 or not attention.scale_qk:
        return "has no plain residual connection"
    return None
