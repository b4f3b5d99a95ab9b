"""The decodes: plain, exact in bounded memory, diffusers' tiles, and a tiny preview decoder.

`decode_exact` returns what `vae.decode(latents).sample` returns, but keeps the feature maps of one stage only, in
strips (`models/vae/strips.py`) of the heights that a plan sets (`models/vae/strip_plan.py`). It knows every part of the
decoders that it takes (`models/vae/decoder_check.py`). The tiled and the tiny decode change the image.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import AutoencoderKLQwenImage21
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from giantleap.models.device import PartCallback, part_of
from giantleap.models.latent_space import LatentSpace
from giantleap.models.vae.decoder_check import check_autoencoder, check_decoder
from giantleap.models.vae.parts import report_layers
from giantleap.models.vae.strip_plan import DecodePlan, DecoderShape, plan_decode
from giantleap.models.vae.strips import Normalization, StripMap, convolve, convolve_activated, convolve_upsampled

STRIP_CLASSES = (AutoencoderKL, AutoencoderKLFlux2)
DC_CLASSES = (AutoencoderDC,)  # in strips of their own (`models/vae/dc_strips.py`); codes without a distribution
FRAME_CLASSES = (AutoencoderKLQwenImage, AutoencoderKLQwenImage21, AutoencoderKLWan)
OnStrip = Callable[[], None]


@torch.inference_mode()
def decode_plain(vae: Any, latents: Tensor, on_part: PartCallback | None = None) -> Tensor:
    """Call `vae.decode` on whole latents, without tiling or slicing whatever the VAE's switches are.

    Args:
        vae: One of STRIP_CLASSES, DC_CLASSES or FRAME_CLASSES. The last decode videos and get one frame. A fourth
            image channel, transparency, is dropped.
        latents: Raw ones.
        on_part: Called after each layer.

    Shape:
        [batch, channels, h, w] -> [batch, 3, stride * h, stride * w].

    Raises:
        UnknownDecoderError: The VAE is of another class.
    """
    return _decode_with_tiling(vae, latents, False, on_part)


@torch.inference_mode()
def decode_tiled(vae: Any, latents: Tensor, on_part: PartCallback | None = None) -> Tensor:
    """Decode in the tiles of diffusers. It changes the image: a tile has its own attention and statistics.

    Shape:
        [batch, channels, h, w] -> [batch, 3, stride * h, stride * w].

    Raises:
        UnknownDecoderError: As `decode_plain`.
    """
    return _decode_with_tiling(vae, latents, True, on_part)


def _decode_with_tiling(vae: Any, latents: Tensor, enabled: bool, on_part: PartCallback | None) -> Tensor:
    check_autoencoder(vae, *STRIP_CLASSES, *DC_CLASSES, *FRAME_CLASSES)
    frames = isinstance(vae, FRAME_CLASSES)
    if isinstance(vae, DC_CLASSES):  # its norms take the channels of a position, which then lie together
        latents = latents.contiguous(memory_format=choose_memory_format(latents))
    with _tiling(vae, enabled), report_layers(vae.decoder, on_part, once=not enabled):
        image: Tensor = vae.decode(latents[:, :, None] if frames else latents, return_dict=False)[0]
    return (image[:, :, 0] if frames else image)[:, :3]


@contextmanager
def _tiling(vae: Any, enabled: bool) -> Iterator[None]:
    """Switch diffusers' tiling on or off, and back afterwards."""
    before = vae.use_tiling
    vae.use_tiling = enabled
    try:
        yield
    finally:
        vae.use_tiling = before


@torch.inference_mode()
def encode_mean(vae: Any, images: Tensor, on_part: PartCallback | None = None) -> Tensor:
    """Encode whole images to the mean of the posterior, without tiling.

    Args:
        vae: As for `decode_plain`. One with transparency gets opaque images.
        images: In [-1, 1].
        on_part: Called after each layer.

    Shape:
        [batch, 3, stride * h, stride * w] -> [batch, channels, h, w].

    Raises:
        UnknownDecoderError: As `decode_plain`.
    """
    check_autoencoder(vae, *STRIP_CLASSES, *DC_CLASSES, *FRAME_CLASSES)
    if isinstance(vae, AutoencoderKLQwenImage21):
        images = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
    frames = isinstance(vae, FRAME_CLASSES)
    with _tiling(vae, enabled=False), report_layers(vae.encoder, on_part):
        codes = vae.encode(images[:, :, None] if frames else images, return_dict=False)[0]
        mean: Tensor = codes if isinstance(vae, DC_CLASSES) else codes.mode()
    return mean[:, :, 0] if frames else mean


@torch.inference_mode()
def decode_tiny(
    tiny: AutoencoderTiny, latents: Tensor, space: LatentSpace, on_part: PartCallback | None = None
) -> Tensor:
    """Decode a preview with a decoder of the TAESD family, trained on scaled latents. It changes the image.

    Args:
        tiny: Trained for the latents of `space`.
        latents: Raw ones, as for the other methods.
        space: Converts raw latents to scaled ones.
        on_part: Called after each layer.

    Shape:
        [batch, channels, h, w] -> [batch, 3, stride * h, stride * w], in [-1, 1] like the others.
    """
    check_autoencoder(tiny, AutoencoderTiny)
    scaled = replace(space, packing="none").from_raw(latents)
    with report_layers(tiny.decoder, on_part):
        image: Tensor = tiny.decode(scaled, return_dict=False)[0]
    return image


@torch.inference_mode()
def decode_exact(
    vae: Any,
    latents: Tensor,
    budget_bytes: int | None = None,
    plan: DecodePlan | None = None,
    on_part: PartCallback | None = None,
) -> Tensor:
    """Decode to the image of `decode_plain` in a third of its memory.

    Images are decoded one after the other. Differences are those of float arithmetic in another order.

    Args:
        vae: One of STRIP_CLASSES, in the dtype and on the device of the latents. Its switches for tiling and slicing
            are ignored.
        latents: Raw ones.
        budget_bytes: Memory that the decode may use beyond weights and latents; None for the default strips.
        plan: A plan to use instead of a budget.
        on_part: Called after each strip.

    Shape:
        [batch, channels, h, w] -> [batch, 3, stride * h, stride * w].

    Raises:
        UnknownDecoderError: The VAE has a part that this decode does not know.
        DecodeBudgetError: The budget is too small for this size.
        ValueError: The latents have another shape, dtype or device than the VAE.
    """
    check_decoder(vae)
    _check_latents(vae, latents)
    batch, _, height, width = latents.shape
    shape = DecoderShape.from_config(vae.config)
    if plan is None:
        dtype = str(latents.dtype).removeprefix("torch.")
        plan = plan_decode(shape, height, width, dtype, batch=batch, budget_bytes=budget_bytes)
    images = latents.new_empty((batch, shape.image_channels, height * shape.stride_px, width * shape.stride_px))
    for index, (latent, image) in enumerate(zip(latents.split(1), images.split(1), strict=True)):
        on_strip = _count_strips(vae.decoder, plan, height, part_of(on_part, index, batch))
        _decode_one(vae, latent, image, plan, on_strip)
    return images


def _count_strips(decoder: Any, plan: DecodePlan, latent_height: int, on_part: PartCallback | None) -> OnStrip:
    """A function to call after each strip of `_decode_one`, which reports the fraction of the strips that is done."""
    strips = [-(-(latent_height << stage) // rows) for stage, rows in enumerate(plan.strip_rows)]
    middle = decoder.mid_block
    total = strips[0] * (1 + 2 * len(middle.resnets) + sum(each is not None for each in middle.attentions))
    for stage, block in enumerate(decoder.up_blocks):
        total += 2 * strips[stage] * len(block.resnets) + (0 if block.upsamplers is None else strips[stage + 1])
    total += strips[-1]
    done = 0

    def on_strip() -> None:
        nonlocal done
        done += 1
        if on_part is not None:
            on_part(done / total)

    return on_strip


def _decode_one(vae: Any, latent: Tensor, image: Tensor, plan: DecodePlan, on_strip: OnStrip) -> None:
    if vae.post_quant_conv is not None:
        latent = vae.post_quant_conv(latent)
    decoder: Any = vae.decoder  # `check_decoder` has checked every part
    current = _first_map(decoder.conv_in, latent, plan.strip_rows[0], on_strip)
    first, *rest = decoder.mid_block.resnets
    current = _residual_block(first, current, on_strip)
    for attention, resnet in zip(decoder.mid_block.attentions, rest, strict=True):
        if attention is not None:
            current = _attend(attention, current, plan.attention_queries, on_strip)
        current = _residual_block(resnet, current, on_strip)
    for stage, block in enumerate(decoder.up_blocks):
        for resnet in block.resnets:
            current = _residual_block(resnet, current, on_strip)
        if block.upsamplers is not None:
            current = _upsample(block.upsamplers[0].conv, current, plan.strip_rows[stage + 1], on_strip)
    top = 0
    for index, strip in enumerate(convolve_activated(current, decoder.conv_norm_out, decoder.conv_out)):
        image[:, :, top : top + strip.shape[2]] = strip
        top += strip.shape[2]
        current.take(index)
        on_strip()


def _first_map(conv: nn.Conv2d, latent: Tensor, strip_rows: int, on_strip: OnStrip) -> StripMap:
    height = latent.shape[2]
    padded = F.pad(latent, (0, 0, 1, 1)).contiguous(memory_format=choose_memory_format(latent))
    made = StripMap(height, strip_rows)
    for top in range(0, height, strip_rows):
        made.append(convolve(conv, padded[:, :, top : min(top + strip_rows, height) + 2]))
        on_strip()
    return made


def _residual_block(block: ResnetBlock2D, source: StripMap, on_strip: OnStrip) -> StripMap:
    """Compute x + conv2(silu(norm2(conv1(silu(norm1(x)))))); x goes through a 1x1 convolution if the channels change.

    Both convolutions run once: the hidden map is kept, since the second norm needs all of it before the first strip.
    With fewer channels than the input, it and the shortcut use the memory that the input frees.
    """
    hidden = StripMap(source.height, source.strip_rows)
    for index, strip in enumerate(convolve_activated(source, block.norm1, block.conv1)):
        hidden.append(strip)
        if block.conv_shortcut is not None:
            source.strips[index] = block.conv_shortcut(source.take(index))
        on_strip()
    made = StripMap(source.height, source.strip_rows)
    for index, strip in enumerate(convolve_activated(hidden, block.norm2, block.conv2)):
        hidden.take(index)
        made.append(source.take(index).add_(strip))
        on_strip()
    return made


def _upsample(conv: nn.Conv2d, source: StripMap, strip_rows: int, on_strip: OnStrip) -> StripMap:
    made = StripMap(2 * source.height, strip_rows)
    for strip in convolve_upsampled(source, conv, strip_rows):
        made.append(strip)
        on_strip()
    return made


def _attend(attention: Attention, source: StripMap, chunk_queries: int, on_strip: OnStrip) -> StripMap:
    """Compute x + project(softmax(q k^T / sqrt(d)) v): keys and values of the whole map, queries in chunks."""
    normalization = Normalization.of(source, attention.group_norm)
    keys, values = _keys_and_values(attention, source, normalization)
    made = StripMap(source.height, source.strip_rows)
    for index in range(len(source.strips)):
        strip = source.take(index)
        tokens = _to_tokens(normalization.apply(strip))
        answers = [_answer(attention, chunk, keys, values) for chunk in tokens.split(chunk_queries, dim=1)]
        made.append(strip.add_(torch.cat(answers, dim=1).mT.unflatten(2, strip.shape[2:])))
        on_strip()
    return made


def _keys_and_values(attention: Attention, source: StripMap, normalization: Normalization) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole map, each [1, heads, pixels, head width]."""
    shape = (1, sum(source.pixels), attention.inner_dim)
    keys, values = source.strip(0).new_empty(shape), source.strip(0).new_empty(shape)
    first = 0
    for index, pixels in enumerate(source.pixels):
        tokens = _to_tokens(normalization.apply(source.strip(index)))
        keys[:, first : first + pixels] = attention.to_k(tokens)
        values[:, first : first + pixels] = attention.to_v(tokens)
        first += pixels
    return _split_heads(attention, keys), _split_heads(attention, values)


def _answer(attention: Attention, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    queries = _split_heads(attention, attention.to_q(tokens))
    joined = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
    projected: Tensor = attention.to_out[0](joined)
    return projected


def _split_heads(attention: Attention, tokens: Tensor) -> Tensor:
    split: Tensor = tokens.unflatten(2, (attention.heads, -1))
    return split.transpose(1, 2)


def _to_tokens(rows: Tensor) -> Tensor:
    """Shape: [1, channels, rows, width] -> [1, rows * width, channels]."""
    return rows.flatten(2).mT


def choose_memory_format(latents: Tensor) -> torch.memory_format:
    """Channels last, in which convolutions of strips need no reordering; on a GPU only for half types."""
    if latents.is_cuda and latents.dtype == torch.float32:
        return torch.contiguous_format
    return torch.channels_last


def _check_latents(vae: Any, latents: Tensor) -> None:
    weight = vae.decoder.conv_in.weight
    channels = weight.shape[1]
    if latents.ndim != 4 or latents.shape[1] != channels or min(latents.shape) < 1:
        raise ValueError(f"latents must be [batch, {channels}, h, w]; found {list(latents.shape)}")
    if latents.dtype != weight.dtype or latents.device != weight.device:
        raise ValueError(
            f"latents are {latents.dtype} on {latents.device}, the VAE is {weight.dtype} on {weight.device}: move one"
        )
