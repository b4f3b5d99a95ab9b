"""Peak memory of one pass through each kind of network, from its configuration: formulas, no torch.

Every formula counts the feature maps that are alive together at the worst moment of the forward pass in inference,
read off the code of the network and checked against live tensors (`tests/models/memory/test_plan.py`,
`benchmarks/memory.py`). Weights and inputs are not counted. Attention is taken to keep no matrix of scores, as
PyTorch's fused kernels do on a CPU and a GPU. Decoders of AutoencoderKL are in `models/vae/strip_plan.py`; what makes
one figure of all this is `models/memory/plan.py`.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from giantleap.models.lua.spec import LIIF_POINTS, LuaSpec
from giantleap.models.vae.strip_plan import ELEMENT_BYTES

Config = Mapping[str, Any]


class UnknownNetworkError(ValueError):
    """A network whose memory cannot be told from its configuration."""


@dataclass(frozen=True, slots=True)
class DenoiserCost:
    """Feature maps at the peak of a transformer, each as wide as its hidden state; a token is 2x2 latent pixels.

    Args:
        image_maps: Per image token.
        text_maps: Per text token.
        half_maps: Added per token of either kind below float32, for what a transformer computes in float32 anyway.
        text_tokens: Of one prompt, as the pipeline pads it; the most that it takes where it does not pad.
        doubles: Whether guidance doubles the batch; the other pipelines run the model twice instead.
    """

    image_maps: float
    text_maps: float
    half_maps: float
    text_tokens: int
    doubles: bool


# Fitted to live tensors at 512 to 2048 px, full width: `python -m benchmarks.memory`.
TRANSFORMERS: Mapping[str, DenoiserCost] = MappingProxyType(
    {
        "SD3Transformer2DModel": DenoiserCost(13.0, 3.0, 0.0, 333, doubles=True),
        "FluxTransformer2DModel": DenoiserCost(15.1, 15.1, 2.1, 512, doubles=False),
        "Flux2Transformer2DModel": DenoiserCost(21.3, 21.3, 0.2, 512, doubles=False),
        "QwenImageTransformer2DModel": DenoiserCost(15.1, 1.0, 0.1, 1024, doubles=False),
        "ZImageTransformer2DModel": DenoiserCost(15.8, 15.8, 0.1, 512, doubles=True),
    }
)
UNET = "UNet2DConditionModel"
CLIP_TOKENS = 77
# Maps as wide as the base width at full resolution, at the peak of a plain decode of one frame, and of its encoding.
VIDEO_DECODER_MAPS: Mapping[str, float] = MappingProxyType(
    {"AutoencoderKLQwenImage": 18.0, "AutoencoderKLWan": 18.0, "AutoencoderKLQwenImage21": 21.5}
)
VIDEO_ENCODER_MAPS = 10.0
PREPARED_TOKENS = {
    "float32": 512,
    "bfloat16": 1024,
}  # TOKENS_AT_ONCE of giantleap.models.engines.packed_lua, which imports torch
VIDEO_TILE_PX, VIDEO_TILE_STEP_PX = 256, 192  # of diffusers' tiled decode of these


def guided_batch(config: Config, items: int, guidance_scale: float) -> int:
    """Images that one call of the denoiser computes: twice the items where guidance runs in the same batch.

    Raises:
        UnknownNetworkError: the class of the denoiser is not known.
    """
    name = config.get("_class_name")
    doubles = name == UNET or _transformer_cost(config).doubles
    return items * (2 if doubles and guidance_scale > (0.0 if name == "ZImageTransformer2DModel" else 1.0) else 1)


def prompt_tokens(config: Config) -> int:
    """Tokens of one prompt that the denoiser takes, at most."""
    return CLIP_TOKENS if config.get("_class_name") == UNET else _transformer_cost(config).text_tokens


def denoiser_elements(config: Config, batch: int, latent_height: int, latent_width: int, dtype: str) -> int:
    """Elements alive at the peak of one denoising step.

    Args:
        config: `config.json` of the UNet or the transformer.
        batch: Images of one call, guidance included (`guided_batch`).
        latent_height: Of the raw latent.
        latent_width: Of the raw latent.
        dtype: That it computes in.

    Raises:
        UnknownNetworkError: the class, or a block of it, is not known.
    """
    if config.get("_class_name") == UNET:
        return batch * _unet_elements(config, latent_height, latent_width)
    cost = _transformer_cost(config)
    extra = 0.0 if dtype == "float32" else cost.half_maps
    image_tokens = -(-latent_height // 2) * -(-latent_width // 2)
    maps = (cost.image_maps + extra) * image_tokens + (cost.text_maps + extra) * cost.text_tokens
    if config.get("dual_attention_layers"):  # SD3.5 medium attends twice in these blocks
        maps += image_tokens
    return int(batch * maps * hidden_width(config))


def hidden_width(config: Config) -> int:
    """Width of a transformer's hidden state."""
    if "dim" in config:
        return int(config["dim"])
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def _transformer_cost(config: Config) -> DenoiserCost:
    name = str(config.get("_class_name"))
    if name not in TRANSFORMERS:
        raise UnknownNetworkError(f"no memory formula for a denoiser of class {name}; known: {UNET}, {[*TRANSFORMERS]}")
    return TRANSFORMERS[name]


def _unet_elements(config: Config, height: int, width: int) -> int:
    """Walks the blocks of UNet2DConditionModel.forward for one image; `held` are the skip connections so far."""
    channels: list[int] = list(config["block_out_channels"])
    attends_down = [_attends(kind, "Down") for kind in config["down_block_types"]]
    attends_up = [_attends(kind, "Up") for kind in config["up_block_types"]]
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") not in (None, "UNetMidBlock2DCrossAttn"):
        raise UnknownNetworkError(f"no memory formula for a UNet's middle block {config['mid_block_type']}")
    said = config["layers_per_block"]
    layers: list[int] = [said] * len(channels) if isinstance(said, int) else list(said)
    pixels: list[int] = [-(-height // 2**level) * -(-width // 2**level) for level in range(len(channels))]

    now, skips = channels[0], [channels[0]]
    held, peak = now * pixels[0], 0
    for level, (kept, attends) in enumerate(zip(channels, attends_down, strict=True)):
        for _ in range(layers[level]):
            peak = max(peak, held + _layer_maps(now, kept, attends) * pixels[level])
            now = kept
            skips.append(kept)
            held += kept * pixels[level]
        if level + 1 < len(channels):
            skips.append(kept)
            held += kept * pixels[level + 1]
    peak = max(peak, held + _layer_maps(now, now, attends=True) * pixels[-1])

    for level, attends in zip(reversed(range(len(channels))), attends_up, strict=True):
        area, kept, given = pixels[level], channels[level], now  # what a block is given stays until it ends
        taken = 0
        for _ in range(layers[level] + 1):
            skip = skips.pop()
            taken += skip
            joined = now + skip
            worst = max(now + joined, joined + _layer_maps(joined, kept, attends=False))
            if attends:
                worst = max(worst, _attention_maps(kept))
            peak = max(peak, held + (given + worst) * area)
            now = kept
        if level:
            # the block's last map, its enlargement and the convolution of that
            peak = max(peak, held + (given + kept) * area + 2 * kept * pixels[level - 1])
        held -= taken * area
    return peak


def _layer_maps(incoming: int, kept: int, attends: bool) -> int:
    """Channels alive beside the input of a ResnetBlock2D, and of the Transformer2DModel that may follow it.

    Norm and SiLU; activation and convolution; then hidden map, shortcut, their sum and its division.
    """
    residual = max(2 * incoming, incoming + kept, (3 if incoming == kept else 4) * kept)
    return max(residual, _attention_maps(kept)) if attends else residual


def _attention_maps(channels: int) -> int:
    """Input, tokens, residual, norm, attention's answer, and the gated MLP: 8 projected, 4 gates, 4 products."""
    return 21 * channels


def _attends(kind: str, way: str) -> bool:
    if kind not in (f"{way}Block2D", f"CrossAttn{way}Block2D"):
        raise UnknownNetworkError(f"no memory formula for a UNet's block {kind}")
    return kind.startswith("CrossAttn")


def text_encoder_elements(config: Config, prompts: int, tokens: int) -> int:
    """Elements alive at the peak of one call of a text encoder: CLIP, T5, or a language model that gives every layer.

    Args:
        config: Its `config.json`.
        prompts: Of one call.
        tokens: Of one prompt; CLIP's own number of positions is less and counts instead.

    Raises:
        UnknownNetworkError: it has none of the known forms.
    """
    if "d_model" in config and "num_heads" in config:  # T5 keeps scores: its attention adds a bias of its own
        return int(prompts * tokens * (12 * config["d_model"] + 1.5 * config["num_heads"] * tokens))
    inner = config.get("text_config") or config
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if any(not isinstance(inner.get(key), int) for key in needed):
        raise UnknownNetworkError(f"no memory formula for a text encoder of model type {config.get('model_type')}")
    hidden, layers = inner["hidden_size"], inner["num_hidden_layers"]
    if str(config.get("model_type", "")).startswith("clip"):
        return int(prompts * min(tokens, inner["max_position_embeddings"]) * (14 + layers) * hidden)
    head_dim = inner.get("head_dim") or hidden // inner["num_attention_heads"]
    cached = 2 * head_dim * (inner.get("num_key_value_heads") or inner["num_attention_heads"])
    peak = 2.5 * hidden + 3 * inner["intermediate_size"]
    if any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in config.get("architectures") or ()):
        peak = max(peak, 3 * hidden + inner["vocab_size"])  # scores of every word that could come next
    return int(prompts * tokens * (peak + layers * (hidden + cached)))


def lua_bytes(spec: LuaSpec, batch: int, height: int, width: int, scale: float, dtype: str, device: str) -> int:
    """Bytes alive at the peak of `giantleap.models.lua.network.Lua`, whose weights are float32 and compute in `dtype`
    under autocast.

    The worst moment is in a block's attention, or after the last pixel shuffle, or at the finished latents.

    Args:
        spec: Of the network.
        batch: Latents of one call.
        height: Of the latent that goes in, before padding to the window.
        width: As `height`.
        scale: 2 or 4; with a LIIF head any.
        dtype: That it computes in.
        device: "cpu" or "cuda".
    """
    full = dtype == "float32"
    window, heads = spec.window, max(spec.layer_heads)
    pixels = (-(-height // window) * window) * (-(-width // window) * window)
    scores = heads * window**2  # per latent pixel
    # Biases with their shift mask: one per window, shared by the batch; below float32 they are kept in both types.
    biases = (window**2 + scores) * pixels * (4 if full else 6)
    stream = batch * pixels * spec.embed_dim * (13 * 4 if full else 22)
    attention = biases + stream + batch * pixels * spec.channels * 4
    if keeps_scores(spec, dtype, device):
        attention += 2 * batch * pixels * scores * 4
    element_bytes = 4 if full else 2
    if spec.head == "liif":
        points = batch * pixels * scale**2
        # The features and the first layer's maps; values of one portion of points, at each of four corners; all of them
        # in parts, joined and laid out anew.
        maps = batch * pixels * (2 * spec.embed_dim + 2 * spec.num_feat) * 4
        portion = min(points, LIIF_POINTS) * 4 * 4 * spec.num_feat * element_bytes
        return int(max(attention, maps + portion + 3 * points * spec.channels * 4))
    # Before and after the last pixel shuffle; the latents, restored and with their bicubic part.
    shuffle = 2 * spec.num_feat * scale**2 * element_bytes + 2 * spec.embed_dim * 4
    added = 2 if spec.bicubic_skip else 1
    finished = spec.channels * scale**2 * (element_bytes + 4 * added) + spec.embed_dim * 4
    return int(max(attention, batch * pixels * (max(shuffle, finished) + spec.channels * 4)))


def prepared_lua_bytes(
    spec: LuaSpec, batch: int, height: int, width: int, scale: int, dtype: str, threads: int | None = None
) -> int:
    """As `lua_bytes` for the form that runs on a CPU (`giantleap.models.engines.packed_lua.PreparedLua`).

    Five maps are alive while a block's portions are joined, or four and what one portion needs: queries, keys, values,
    their answer, and the biases of masked windows; where two products attend, below float32 and on several threads,
    queries, keys and values once more and the scores before and after softmax.

    Args:
        spec: As `lua_bytes`, and so on.
        batch: Of it.
        height: Of it.
        width: Of it.
        scale: Of it.
        dtype: Of it.
        threads: Of the worker; None for as many as there are processors.
    """
    element_bytes = ELEMENT_BYTES[dtype]
    window = spec.window
    pixels = batch * (-(-height // window) * window) * (-(-width // window) * window)
    threads = threads or os.cpu_count() or 1
    tokens = PREPARED_TOKENS["float32" if dtype == "float32" else "bfloat16"] * threads
    portion = min(pixels, max(window**2, tokens // window**2 * window**2))
    needs = []
    for heads in set(spec.layer_heads):
        inner, scores = heads * (-(-spec.embed_dim // heads // 8) * 8), heads * window**2
        fused = dtype == "float32" and threads == 1
        needs.append(spec.embed_dim + (4 * inner + scores if fused else 6 * inner + 2 * scores))
    attention = max(5 * pixels * spec.embed_dim, 4 * pixels * spec.embed_dim + portion * max(needs)) * element_bytes
    shuffle = 2 * spec.num_feat * scale**2 * element_bytes + 2 * spec.embed_dim * element_bytes
    finished = spec.channels * scale**2 * (element_bytes * (dtype != "float32") + (12 if spec.bicubic_skip else 8))
    return int(max(attention, pixels * (max(shuffle, finished) + spec.channels * 4)))


def keeps_scores(spec: LuaSpec, dtype: str, device: str) -> bool:
    """Whether window attention keeps its scores: a GPU's fused kernels want heads in multiples of 16 bytes."""
    widths = {spec.embed_dim // heads for heads in spec.layer_heads}
    return device == "cuda" and any(width % (4 if dtype == "float32" else 8) for width in widths)


def lua_kept_bytes(spec: LuaSpec) -> int:
    """What a LUA keeps between calls beside its weights: the attention bias of every block (`BiasCache`)."""
    return sum(depth * heads * spec.window**4 * 4 for depth, heads in zip(spec.depths, spec.layer_heads, strict=True))


def video_decoder_elements(config: Config, latent_height: int, latent_width: int, stride_px: int) -> int:
    """Elements alive at the peak of a plain decode of one image by a video VAE.

    Raises:
        UnknownNetworkError: the class is not known.
    """
    name = str(config.get("_class_name"))
    if name not in VIDEO_DECODER_MAPS:
        raise UnknownNetworkError(f"no memory formula for a VAE of class {name}")
    width = config.get("decoder_base_dim") or config["base_dim"]
    return int(VIDEO_DECODER_MAPS[name] * width * latent_height * latent_width * stride_px**2)


def video_tiled_elements(config: Config, latent_height: int, latent_width: int, stride_px: int) -> int:
    """As `video_decoder_elements` for diffusers' tiles: one is decoded at a time, all stay until the image is made.

    Raises:
        UnknownNetworkError: the class is not known.
    """
    tile = VIDEO_TILE_PX // stride_px
    one = video_decoder_elements(config, min(tile, latent_height), min(tile, latent_width), stride_px)
    image = 4 * latent_height * latent_width * stride_px**2
    if max(latent_height, latent_width) <= tile:
        return one
    return max(one + int(image * (VIDEO_TILE_PX / VIDEO_TILE_STEP_PX) ** 2), 3 * image)


def encoder_elements(config: Config, height_px: int, width_px: int) -> int:
    """Elements alive at the peak of a VAE's encoding of one image: in a residual block at full resolution.

    Raises:
        UnknownNetworkError: the class is not known.
    """
    if config.get("_class_name") in VIDEO_DECODER_MAPS:
        return int(VIDEO_ENCODER_MAPS * config["base_dim"] * height_px * width_px)
    if "block_out_channels" not in config or "layers_per_block" not in config:
        raise UnknownNetworkError(f"no memory formula for the encoder of a VAE of class {config.get('_class_name')}")
    maps = 5 if config["layers_per_block"] > 1 else 4  # a second block's input is not the encoder's own
    return int(maps * config["block_out_channels"][0] * height_px * width_px)
