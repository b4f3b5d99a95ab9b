"""The stock pipelines of diffusers, built in the test: random weights, a few channels wide, with their own tokenizers.

Each function builds one class that a bundle may name, the same weights each time, in about a second and without a
network. The sizes are those of the real models only where the pipeline relies on them: latent channels and stride, the
layers of the text encoder that FLUX.2 reads, and how long a prompt may be.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines import prx
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5Tokenizer,
)

CLIP_TOKENS = 77
GEMMA_TOKENS = 8192
PRX_TOKENS = 256
WIDTH = 32
NO_SHORTCUTS = {"encoder_out_shortcut": False, "decoder_in_shortcut": False}  # where latents have too many channels

# The placeholders of the real templates that matter here: who speaks, and where an answer would begin.
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content[0].text }}[/{{ message.role }}]{% endfor %}"
)


def tiny_sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5: one CLIP encoder, a UNet, DDIM."""
    with _seeded():
        return StableDiffusionPipeline(
            vae=_image_vae(4, scaling_factor=0.18215),
            text_encoder=CLIPTextModel(_clip_config()),
            tokenizer=_clip_tokenizer(),
            unet=_unet(4, cross_attention_dim=WIDTH),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tiny_sdxl(**vae_config: Any) -> StableDiffusionXLPipeline:
    """SDXL: two CLIP encoders. `vae_config` is that of a variant, such as `latents_mean` and `latents_std`."""
    with _seeded():
        return StableDiffusionXLPipeline(
            vae=_image_vae(4, **{"scaling_factor": 0.13025} | vae_config),
            text_encoder=CLIPTextModel(_clip_config()),
            text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
            tokenizer=_clip_tokenizer(),
            tokenizer_2=_clip_tokenizer(),
            unet=_unet(
                4,
                cross_attention_dim=2 * WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + WIDTH,
                use_linear_projection=True,
            ),
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
            ),
        )


def tiny_sd3(t5: bool = True) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 and 3.5: two CLIP encoders and T5, which may be left out."""
    with _seeded():
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=16,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=2 * WIDTH,
                caption_projection_dim=16,
                pooled_projection_dim=2 * WIDTH,
                pos_embed_max_size=16,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_flow_vae(scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=CLIPTextModelWithProjection(_clip_config()),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=_t5_encoder(2 * WIDTH) if t5 else None,
            tokenizer_3=_t5_tokenizer() if t5 else None,
        )


def tiny_flux1(guidance_embeds: bool = True) -> FluxPipeline:
    """FLUX.1: CLIP and T5, packed latents; dev and Krea embed the guidance, schnell has none."""
    with _seeded():
        return FluxPipeline(
            scheduler=_shifting_scheduler(),
            vae=_flow_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=CLIPTextModel(_clip_config()),
            tokenizer=_clip_tokenizer(),
            text_encoder_2=_t5_encoder(WIDTH),
            tokenizer_2=_t5_tokenizer(),
            transformer=FluxTransformer2DModel(
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 4, 8),
            ),
        )


def tiny_flux1_kontext() -> FluxKontextPipeline:
    """FLUX.1 Kontext: the networks of FLUX.1 dev, which also read the tokens of an image."""
    plain: Any = tiny_flux1()
    return FluxKontextPipeline(**plain.components)


def tiny_flux2() -> Flux2Pipeline:
    """FLUX.2 dev: Mistral 3, of which it reads the layers 10, 20 and 30.

    In the real pipeline a `PixtralProcessor` stands around the tokenizer. It needs torchvision, which we do not have,
    and all that the pipeline asks of it for a prompt is `apply_chat_template`, which the tokenizer has as well.
    """
    with _seeded():
        tokenizer = _mistral_tokenizer()
        return Flux2Pipeline(
            scheduler=_shifting_scheduler(),
            vae=_flux2_vae(),
            text_encoder=Mistral3ForConditionalGeneration(
                Mistral3Config(
                    text_config=MistralConfig(**_decoder_config(tokenizer), num_hidden_layers=30),
                    vision_config=PixtralVisionConfig(
                        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32
                    ),
                )
            ).eval(),
            tokenizer=tokenizer,
            transformer=_flux2_transformer(guidance_embeds=True),
        )


def tiny_flux2_klein(is_distilled: bool = False) -> Flux2KleinPipeline:
    """FLUX.2 Klein: Qwen 3, of which it reads the layers 9, 18 and 27; the distilled one takes no guidance."""
    with _seeded():
        tokenizer = _qwen_tokenizer()
        return Flux2KleinPipeline(
            scheduler=_shifting_scheduler(),
            vae=_flux2_vae(),
            text_encoder=Qwen3ForCausalLM(Qwen3Config(**_decoder_config(tokenizer), num_hidden_layers=27)).eval(),
            tokenizer=tokenizer,
            transformer=_flux2_transformer(guidance_embeds=False),
            is_distilled=is_distilled,
        )


def tiny_qwen_image() -> QwenImagePipeline:
    """Qwen-Image: the language model of Qwen 2.5 VL, packed latents of a video VAE."""
    with _seeded():
        tokenizer = _qwen_tokenizer()
        return QwenImagePipeline(
            scheduler=_shifting_scheduler(),
            vae=AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
            text_encoder=Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(
                    text_config={**_vl_config(tokenizer), "num_hidden_layers": 2},
                    vision_config={
                        "depth": 1,
                        "hidden_size": 8,
                        "intermediate_size": 8,
                        "num_heads": 1,
                        "out_hidden_size": WIDTH,
                    },
                    **_image_tokens(tokenizer),
                )
            ).eval(),
            tokenizer=tokenizer,
            transformer=QwenImageTransformer2DModel(
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(4, 4, 8),
            ),
        )


def tiny_z_image() -> ZImagePipeline:
    """Z-Image: Qwen 3, latents in a list, guidance counted from 0 instead of 1."""
    with _seeded():
        tokenizer = _qwen_tokenizer()
        transformer: Any = ZImageTransformer2DModel(
            dim=WIDTH,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[4, 4, 8],
            axes_lens=[1024, 64, 64],
        )
        for padding in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(padding)  # the class leaves them as the memory was
        return ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_flow_vae(scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=Qwen3Model(Qwen3Config(**_decoder_config(tokenizer), num_hidden_layers=2)).eval(),
            tokenizer=tokenizer,
            transformer=transformer,
        )


def tiny_qwen_image_21() -> QwenImage21Pipeline:
    """Qwen-Image 2.1: Qwen 3 VL, latents of 64 channels at a stride of 16 pixels, each a token."""
    with _seeded():
        tokenizer = _qwen_tokenizer()
        return QwenImage21Pipeline(
            scheduler=_shifting_scheduler(),
            vae=AutoencoderKLQwenImage21(base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1),
            text_encoder=Qwen3VLForConditionalGeneration(
                Qwen3VLConfig(
                    text_config={**_vl_config(tokenizer), "num_hidden_layers": 2},
                    vision_config={
                        "depth": 1,
                        "hidden_size": 8,
                        "intermediate_size": 8,
                        "num_heads": 1,
                        "out_hidden_size": WIDTH,
                        "num_position_embeddings": 16,
                        "deepstack_visual_indexes": [0],
                    },
                    **_image_tokens(tokenizer),
                )
            ).eval(),
            processor=TextProcessor(tokenizer),
            transformer=_for_inference(
                QwenImage21Transformer2DModel(
                    num_layers=2,
                    attention_head_dim=16,
                    num_attention_heads=2,
                    context_in_dim=WIDTH,
                    axes_dims_rope=(4, 4, 8),
                )
            ),
        )


def tiny_prx(flux_vae: bool = False) -> PRXPipeline:
    """PRX: T5Gemma, a transformer over patches of 2x2; the VAE of FLUX.1, or an AutoencoderDC with a stride of 4."""
    with _seeded():
        tokenizer = _gemma_tokenizer(PRX_TOKENS)
        vae = (
            _flow_vae(scaling_factor=0.3611, shift_factor=0.1159)
            if flux_vae
            else tiny_dc_vae(24, (8, 8, 16), attention=0, **NO_SHORTCUTS)
        )
        transformer: Any = PRXTransformer2DModel(
            in_channels=vae.config.latent_channels,
            context_in_dim=WIDTH,
            hidden_size=WIDTH,
            mlp_ratio=2.0,
            num_heads=2,
            depth=2,
            axes_dim=[8, 8],
        )
        for block in transformer.blocks:
            torch.nn.init.normal_(block.modulation.lin.weight, std=0.3)  # the class starts with blocks that add nothing
        return PRXPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=prx.T5GemmaEncoder(_t5gemma_config(tokenizer).encoder).eval(),
            tokenizer=tokenizer,
            vae=vae,
        )


def save_pipeline(pipeline: Any, directory: Path, variant: str | None = None) -> None:
    """Write a pipeline as the public repositories have it."""
    pipeline.save_pretrained(directory, safe_serialization=True, variant=variant)
    if type(pipeline) is PRXPipeline:  # diffusers writes an index and a configuration that it does not read
        stock: Any = pipeline
        index = json.loads((directory / "model_index.json").read_text())
        index["text_encoder"] = ["prx", "T5GemmaEncoder"]
        (directory / "model_index.json").write_text(json.dumps(index))
        _t5gemma_config(stock.tokenizer).save_pretrained(directory / "text_encoder")


def tiny_sana(max_tokens: int = GEMMA_TOKENS) -> SanaPipeline:
    """Sana: Gemma 2 behind an instruction of its own, linear attention, a stride of 32 pixels.

    One with a tokenizer for `max_tokens` below 300 has no instruction, and here a stride of 4.
    """
    with _seeded():
        parts = _sana_parts(max_tokens)
        if max_tokens < 300:
            parts["vae"] = tiny_dc_vae(24, (8, 8, 16), attention=0, scaling_factor=0.5, **NO_SHORTCUTS)
        return SanaPipeline(
            transformer=_sana_transformer(parts["vae"].config.latent_channels),
            scheduler=DPMSolverMultistepScheduler(
                flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
            ),
            **parts,
        )


def tiny_sana_sprint() -> SanaSprintPipeline:
    """Sana-Sprint: as Sana, in few steps that add fresh noise, with the guidance as an input of the network."""
    with _seeded():
        return SanaSprintPipeline(
            transformer=_sana_transformer(32, guidance_embeds=True, qk_norm="rms_norm_across_heads"),
            scheduler=SCMScheduler(),
            **_sana_parts(GEMMA_TOKENS),
        )


def tiny_dc_vae(latent_channels: int, channels: tuple[int, ...], attention: int, **config: Any) -> Any:
    """An AutoencoderDC with attention in the last stages."""
    count = len(channels)
    types = ("ResBlock",) * (count - attention) + ("EfficientViTBlock",) * attention
    scales: Any = ((),) * (count - attention) + ((5,),) * attention
    network = AutoencoderDC(
        latent_channels=latent_channels,
        attention_head_dim=8,
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1,) * count,
        decoder_layers_per_block=(1,) * count,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        **config,
    )
    return _for_inference(network)


class TextProcessor:
    """The part of `Qwen3VLProcessor` that prompts without images go through; the real one needs torchvision."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        """As the real one does, gives a list for each conversation, also where there is one."""
        return self.tokenizer.apply_chat_template([messages], **options)


@contextmanager
def _seeded() -> Iterator[None]:
    """The same random weights each time; torch's global generator is as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _for_inference(network: Any) -> Any:
    """The network in evaluation mode. Type checkers see empty classes here: diffusers imports them lazily."""
    return network.eval()


def _image_vae(latent_channels: int, **config: Any) -> Any:
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=latent_channels,
        **config,
    )
    return _for_inference(network)


def _flow_vae(**config: Any) -> Any:
    return _image_vae(16, use_quant_conv=False, use_post_quant_conv=False, **config)


def _flux2_vae() -> Any:
    vae = _for_inference(AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1))
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 4.0)
    return vae


def _t5gemma_config(tokenizer: Any) -> Any:
    half: Any = {**_decoder_config(tokenizer), "num_hidden_layers": 2, "query_pre_attn_scalar": 16}
    return T5GemmaConfig(encoder=half, decoder=half)


def _sana_parts(max_tokens: int) -> dict[str, Any]:
    """What Sana and Sana-Sprint share; the VAE is the real one but for its widths."""
    tokenizer = _gemma_tokenizer(max_tokens)
    text_config = Gemma2Config(**_decoder_config(tokenizer), num_hidden_layers=2, query_pre_attn_scalar=16)
    return {
        "tokenizer": tokenizer,
        "text_encoder": Gemma2Model(text_config).eval(),
        "vae": tiny_dc_vae(
            32,
            (8, 8, 8, 8, 8, 32),
            attention=3,
            scaling_factor=0.41407,
            downsample_block_type="Conv",
            upsample_block_type="interpolate",
        ),
    }


def _sana_transformer(channels: int, **config: Any) -> Any:
    network = SanaTransformer2DModel(
        in_channels=channels,
        out_channels=channels,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        **config,
    )
    return _for_inference(network)


def _unet(channels: int, **config: Any) -> Any:
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=8,
        **config,
    )
    return _for_inference(network)


def _flux2_transformer(guidance_embeds: bool) -> Any:
    network = Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return _for_inference(network)


def _shifting_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _clip_config() -> CLIPTextConfig:
    tokenizer = _clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_encoder(width: int) -> Any:
    network = T5EncoderModel(
        T5Config(
            vocab_size=len(_t5_tokenizer()),
            d_model=width,
            d_kv=8,
            d_ff=WIDTH,
            num_layers=1,
            num_heads=2,
            is_decoder=False,
        )
    )
    return _for_inference(network)


def _decoder_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }


def _vl_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """As `_decoder_config`; positions in time, height and width, of which text uses one for all three."""
    return _decoder_config(tokenizer) | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}


def _image_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def _byte_vocabulary(*special: str) -> dict[str, int]:
    """One token per byte, as byte-level encodings write bytes."""
    return {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}


def _clip_tokenizer() -> CLIPTokenizer:
    """Each letter is a token; the last one of a word is another than the same within it."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([start, end, *letters, *(f"{c}</w>" for c in letters)])}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=end,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        model_max_length=CLIP_TOKENS,
    )


def _t5_tokenizer() -> T5Tokenizer:
    """Each letter is a token, and so is the space before a word."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789,.-"]
    return T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, additional_special_tokens=[])


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """Each byte is a token; the ends of a message are one each."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vision = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = Qwen2Tokenizer(vocab=_byte_vocabulary(*special, *vision), merges=[], chat_template=QWEN_TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special[1:], *vision]})
    return tokenizer


def _gemma_tokenizer(max_tokens: int) -> GemmaTokenizer:
    """Each letter is a token, and so is each space; capitals and rare signs are unknown."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789,.:-"]
    return GemmaTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=max_tokens)


def _mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token; FLUX.2 pads on the left, as its tokenizer says."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = Tokenizer(BPE(vocab=_byte_vocabulary(*special), merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special[4:],
        padding_side="left",
        chat_template=MISTRAL_TEMPLATE,
    )
