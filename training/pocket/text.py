"""Train text encoder and UNet together: a rectified flow from noise to the frozen VAE's latents of scenes.

The result is a stock `StableDiffusionPipeline`. That pipeline passes only token states to the UNet, so the global
meaning of a caption enters through `addition_embed_type="text"` (attention-pooled tokens added to the time embedding)
and the local meaning through cross-attention. Captions come from `training/pocket/captions.py`, pictures from
`training/pocket/scenes.py`; `benchmarks/quality/prompt_following.py` measures the result.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from giantleap.training.optim import Budget, Ema, MuonAdamW, cosine_rate
from giantleap.training.pocket.captions import Slots, mirror, to_caption, vary_caption
from giantleap.training.pocket.scenes import read_pool
from giantleap.training.pocket.state import TrainState
from giantleap.training.pocket.tokenizer import MAX_TOKENS, open_tokenizer

LATENT_CHANNELS = 16
LATENT_SIDE = 16  # 128 px at stride 8
TEXT_WIDTH = 128
FLOW_SHIFT = 3.0  # shift of the sampler's noise levels towards high noise
EARLY_SHIFTS = (3.0, 8.0)  # shifts of the training samples, half each: colors and position are decided there
LATE_SHIFTS = (3.0, 1.0)  # once those are learned: edges and clean areas
LATE_FROM = 0.72  # share of the run
COMPASS_WEIGHT = 0.2
NOISE_LEVELS = 1000  # the network's timestep is sigma * NOISE_LEVELS
EMPTY_SHARE = 0.10  # captions replaced by "", for classifier-free guidance
FREEDOM = 0.6  # share of freely worded captions at the end of a run, from zero at its middle
HELD_OUT = 256  # last scenes of the pool, never trained on
SAVE_EVERY_S = 120.0


class TextToLatent(nn.Module):
    """The two networks trained together."""

    def __init__(self, vocabulary: int, channels: tuple[int, int, int] = (64, 128, 160)) -> None:
        super().__init__()
        self.text_encoder = make_text_encoder(vocabulary)
        self.unet = make_unet(channels)
        self.compass = nn.ModuleList(nn.Conv2d(channels[2], 1, 1) for _ in range(3))  # for training only

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """Return the velocity `noise - latent` at noise level sigma in 0..1.

        Args:
            noisy: [batch, 16, h, w].
            sigma: [batch].
            tokens: [batch, MAX_TOKENS].

        Returns:
            [batch, 16, h, w].
        """
        states = self.text_encoder(tokens).last_hidden_state
        velocity: Tensor = self.unet(noisy, sigma * NOISE_LEVELS, states).sample
        return velocity


def make_text_encoder(vocabulary: int) -> CLIPTextModel:
    """Return a CLIP text transformer of two layers."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    encoder = CLIPTextModel(config)
    words: Any = encoder.get_input_embeddings()
    nn.init.normal_(words.weight, std=0.05)  # large enough for words that are learned late
    return encoder


def make_unet(channels: tuple[int, int, int]) -> UNet2DConditionModel:
    """Return a UNet with levels of 16, 8 and 4 latent pixels; attention and most weights at 8 and 4.

    Every residual branch ends in a zero-initialized layer.
    """
    unet: UNet2DConditionModel = UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=tuple(width // 32 for width in channels),  # diffusers interprets this as the number of heads
        norm_num_groups=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "to_out.0", "ff.net.2", "conv_out")) and isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.zeros_(module.weight)
    return unet


@dataclass(frozen=True)
class LatentPool:
    """Latents of scenes and their mirror images.

    Attributes:
        latents: [count, 2, 16, 16, 16], float16; index 1 of the second axis is the mirror image.
    """

    latents: NDArray[np.float16]
    slots: list[Slots]

    def draw(
        self, rng: np.random.Generator, batch: int, tokenizer: CLIPTokenizer, freedom: float
    ) -> tuple[Tensor, Tensor]:
        """Draw latents and caption tokens; some captions are empty, the share `freedom` is freely worded."""
        index = rng.integers(0, len(self.slots) - HELD_OUT, size=batch)
        flip = rng.integers(0, 2, size=batch)
        latents = torch.from_numpy(self.latents[index, flip].astype(np.float32))
        shown = [mirror(self.slots[i]) if flipped else self.slots[i] for i, flipped in zip(index, flip, strict=True)]
        captions = [draw_caption(slots, rng, freedom) for slots in shown]
        return latents, to_tokens(tokenizer, captions)

    def held_out(self, tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor]:
        """Return the held-out scenes with plain captions."""
        latents = torch.from_numpy(self.latents[-HELD_OUT:, 0].astype(np.float32))
        return latents, to_tokens(tokenizer, [to_caption(slots) for slots in self.slots[-HELD_OUT:]])


def draw_caption(slots: Slots, rng: np.random.Generator, freedom: float) -> str:
    """Draw an empty, freely worded or plain caption. Runs start with plain ones, which are learned sooner."""
    if rng.random() < EMPTY_SHARE:
        return ""
    return vary_caption(slots, rng) if rng.random() < freedom else to_caption(slots)


def to_tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Tokenize to [batch, MAX_TOKENS], padded and cut as the stock pipeline does."""
    encoded = tokenizer(
        list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    tokens: Tensor = encoded.input_ids
    return tokens


@torch.no_grad()
def write_latents(vae: AutoencoderKL, scenes: Path, path: Path, batch: int = 32) -> None:
    """Encode each picture of a pool and its mirror image once, to posterior means in float16."""
    images, slots = read_pool(scenes)
    encoder: Any = vae  # missing in torch's annotations
    encoder.to(memory_format=torch.channels_last)  # 2x on a CPU
    partial = path.with_suffix(".partial")
    shape = (len(slots), 2, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE)
    latents = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    for start in tqdm(range(0, len(slots), batch), desc="encode scenes", unit="batch"):
        pictures = torch.from_numpy(images[start : start + batch].astype(np.float32)) / 127.5 - 1.0
        for side, view in enumerate((pictures, pictures.flip(-1))):
            with torch.autocast("cpu", torch.bfloat16):
                mean = vae.encode(view.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
            latents[start : start + batch, side] = mean.float().numpy()
    latents.flush()
    partial.rename(path)


def read_latents(scenes: Path, path: Path) -> LatentPool:
    """Read the pool into memory."""
    _, slots = read_pool(scenes)
    return LatentPool(np.load(path), slots)


def draw_sigma(
    count: int, shifts: tuple[float, float] = EARLY_SHIFTS, generator: torch.Generator | None = None
) -> Tensor:
    """Draw logit-normal noise levels [count] (arXiv 2403.03206, section 3.1), shifted towards high noise.

    A color that fills a third of the frame is visible in the noisy latent until almost only noise is left, so only high
    levels teach the network to use the text.
    """
    shift = torch.where(torch.rand(count, generator=generator) < 0.5, shifts[0], shifts[1])
    return torch.sigmoid(torch.randn(count, generator=generator) + shift.log())


def flow_loss(network: TextToLatent, latents: Tensor, tokens: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error of the velocity (rectified flow, arXiv 2209.03003, eq. 1, time from data to noise).

    Args:
        network: The networks.
        latents: [batch, 16, h, w].
        noise: [batch, 16, h, w].
        tokens: [batch, MAX_TOKENS].
        sigma: [batch].
    """
    level = sigma.view(-1, 1, 1, 1)
    noisy = (1.0 - level) * latents + level * noise
    with torch.autocast("cpu", torch.bfloat16):
        velocity = network(noisy, sigma, tokens)
    loss: Tensor = (velocity.float() - (noise - latents)).square().mean()
    return loss


@contextmanager
def low_level_features(unet: UNet2DConditionModel) -> Iterator[list[Tensor]]:
    """Collect the outputs of the last down, the middle and the first up block during one forward pass."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    blocks: list[Any] = [unet.down_blocks[-1], unet.mid_block, unet.up_blocks[0]]
    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def compass_loss(network: TextToLatent, features: Sequence[Tensor]) -> Tensor:
    """Return the error of linear probes that read the column (-1..1) from features [batch, channels, h, w].

    Scenes and mirror images are equally likely, so only the words "left" and "right" require a sense of sides, and
    without it these words carry no gradient: without this loss, position stays at chance for long.
    """
    losses = []
    for layer, values in zip(network.compass, features, strict=True):
        target = torch.linspace(-1.0, 1.0, values.shape[-1]).expand(values.shape[0], 1, *values.shape[-2:])
        losses.append((layer(values.float()) - target).square().mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def validate(network: TextToLatent, latents: Tensor, tokens: Tensor) -> float:
    """Return the loss on held-out scenes at fixed noise."""
    generator = torch.Generator().manual_seed(0)
    sigma = draw_sigma(len(latents), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    batches = zip(latents.split(64), tokens.split(64), sigma.split(64), noise.split(64), strict=True)
    return float(torch.stack([flow_loss(network, *batch) for batch in batches]).mean())


def make_optimizer(network: TextToLatent, muon_lr: float, adam_lr: float) -> MuonAdamW:
    """Use Muon for the inner matrices; AdamW for first and last layers, embeddings, biases and norms."""
    adam_names = ("conv_in", "conv_out", "token_embedding", "position_embedding", "positional_embedding", "compass")
    return MuonAdamW(network.named_parameters(), muon_lr, adam_lr, adam_names)


def train_text(
    out: Path,
    scenes: Path,
    vae_folder: Path,
    budget: Budget,
    seed: int,
    resume: bool,
    threads: int,
    batch: int = 64,
    muon_lr: float = 0.02,
    adam_lr: float = 2e-3,
) -> None:
    """Train; write `state.pt`, `log.jsonl` and the averaged weights as a pipeline in `out/pipeline`.

    May be stopped at any time and resumed. `scenes` is a pool written by `python -m giantleap.training.pocket.scenes`;
    `vae_folder` has the frozen autoencoder, whose latents of the pool are cached in `out/latents.npy`.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    if not (out / "latents.npy").exists():
        write_latents(vae, scenes, out / "latents.npy")
    pool, tokenizer = read_latents(scenes, out / "latents.npy"), open_tokenizer()
    network, averaged = TextToLatent(len(tokenizer)), TextToLatent(len(tokenizer))
    for model in (network, averaged):  # plain attention: the fused backward is slower on a CPU
        model.unet.set_attn_processor(AttnProcessor())
        model.text_encoder.set_attn_implementation("eager")
    unet: Any = network.unet  # missing in torch's annotations
    unet.to(memory_format=torch.channels_last)  # 1.2x on a CPU
    optimizer = make_optimizer(network, muon_lr, adam_lr)
    state = TrainState(network, optimizer, Ema(network, 0.998), np.random.default_rng(seed))
    if resume:
        state.read(out / "state.pt")
    run_steps(state, averaged, pool, tokenizer, budget, out, batch)
    state.ema.copy_to(averaged)
    write_pipeline(out / "pipeline", averaged, vae, open_tokenizer())  # a used tokenizer would also save its padding


def run_steps(
    state: TrainState,
    averaged: TextToLatent,
    pool: LatentPool,
    tokenizer: CLIPTokenizer,
    budget: Budget,
    out: Path,
    batch: int,
) -> None:
    """Train until the budget is spent; write state and log every two minutes and at the end."""
    held_latents, held_tokens = pool.held_out(tokenizer)
    network = state.network
    assert isinstance(network, TextToLatent)
    with tqdm(total=100, unit="%", desc="text", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}") as bar:
        while (progress := state.progress(budget)) < 1.0:
            drawn, tokens = pool.draw(state.rng, batch, tokenizer, FREEDOM * max(0.0, 2.0 * progress - 1.0))
            latents = drawn.contiguous(memory_format=torch.channels_last)
            with low_level_features(network.unet) as features:
                sigma = draw_sigma(batch, EARLY_SHIFTS if progress < LATE_FROM else LATE_SHIFTS)
                loss = flow_loss(network, latents, tokens, sigma, torch.randn_like(latents))
            torch.autograd.backward(loss + COMPASS_WEIGHT * compass_loss(network, features))
            state.optimizer.step(cosine_rate(progress, state.step))
            state.ema.update(network, state.step)
            state.tick()
            bar.set_postfix_str(f"step {state.step} loss {float(loss.detach()):.3f}", refresh=False)
            bar.update(min(100.0, 100.0 * state.progress(budget)) - bar.n)
            if state.is_due(budget, SAVE_EVERY_S):
                state.write(out / "state.pt")
                state.ema.copy_to(averaged)
                write_log(out, state, validate(averaged, held_latents, held_tokens), batch)


def write_log(out: Path, state: TrainState, held_out_loss: float, batch: int) -> None:
    """Append one line to `log.jsonl` and print it above the progress bar."""
    line = {"step": state.step, "samples": state.step * batch, "spent_s": round(state.spent_s, 1)}
    text = json.dumps({**line, "held_out_loss": round(held_out_loss, 5)})
    with (out / "log.jsonl").open("a") as log:
        log.write(text + "\n")
    tqdm.write(text)


def make_scheduler() -> DPMSolverMultistepScheduler:
    """Return a rectified-flow sampler for the stock Stable Diffusion pipeline: timesteps are sigma * 1000."""
    scheduler: DPMSolverMultistepScheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=NOISE_LEVELS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        steps_offset=1,
    )
    return scheduler


def write_pipeline(folder: Path, network: TextToLatent, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
    """Write the stock pipeline directory; UNet and VAE in half precision, the text encoder in float32.

    `from_pretrained` returns float32 modules: diffusers casts on loading, transformers keeps the stored dtype.
    """
    halves: dict[str, Any] = {"vae": copy.deepcopy(vae).half(), "unet": copy.deepcopy(network.unet).half()}
    halves["unet"].set_default_attn_processor()
    nothing: Any = None  # optional parts that the annotations require
    scheduler: Any = make_scheduler()
    pipeline = StableDiffusionPipeline(
        **halves,
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=nothing,
        feature_extractor=nothing,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
