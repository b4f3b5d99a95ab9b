"""Trains the text encoder and the UNet together: a rectified flow from noise to the frozen VAE's latents of scenes.

The result is a stock `StableDiffusionPipeline`. That pipeline hands the UNet nothing but the token states, so the
global sense of a caption reaches it through `addition_embed_type="text"` (attention-pooled tokens added to the time
embedding) and the local sense through cross-attention. Captions come from `training/pocket/captions.py`, pictures from
`training/pocket/scenes.py`; `benchmarks/quality/prompt_following.py` measures what was learned.
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
FLOW_SHIFT = 3.0  # the sampler's noise levels lean to high noise by this factor
EARLY_SHIFTS = (3.0, 8.0)  # of the training samples, half each: where colors and the object's place are decided
LATE_SHIFTS = (3.0, 1.0)  # once those are learned: edges and clean areas
LATE_FROM = 0.72  # of the run
COMPASS_WEIGHT = 0.2
NOISE_LEVELS = 1000  # the network's timestep is sigma * NOISE_LEVELS
EMPTY_SHARE = 0.10  # captions replaced by "", for classifier-free guidance
FREEDOM = 0.6  # share of freely worded captions at the end of a run; it grows from none at the middle
HELD_OUT = 256  # scenes at the end of the pool that are never trained on
SAVE_EVERY_S = 120.0


class TextToLatent(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, vocabulary: int, channels: tuple[int, int, int] = (64, 128, 160)) -> None:
        super().__init__()
        self.text_encoder = make_text_encoder(vocabulary)
        self.unet = make_unet(channels)
        self.compass = nn.ModuleList(nn.Conv2d(channels[2], 1, 1) for _ in range(3))  # for training only

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """The velocity `noise - latent` at noise level sigma in 0..1.

        **Shape**: noisy (B, 16, h, w), sigma (B,), tokens (B, MAX_TOKENS); returns (B, 16, h, w).
        """
        states = self.text_encoder(tokens).last_hidden_state
        velocity: Tensor = self.unet(noisy, sigma * NOISE_LEVELS, states).sample
        return velocity


def make_text_encoder(vocabulary: int) -> CLIPTextModel:
    """A CLIP text transformer of two layers."""
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
    nn.init.normal_(words.weight, std=0.05)  # far enough apart for words that matter late
    return encoder


def make_unet(channels: tuple[int, int, int]) -> UNet2DConditionModel:
    """Levels of 16, 8 and 4 latent pixels; attention and most weights at 8 and 4.

    Every residual branch ends in a zero-initialised layer, so the network starts as its own skip connections.
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
        attention_head_dim=tuple(width // 32 for width in channels),  # diffusers reads this as the number of heads
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
    """Latents of scenes and of their mirror images.

    **Shape**: latents (count, 2, 16, 16, 16) float16; index 1 of the second axis is the mirrored picture.
    """

    latents: NDArray[np.float16]
    slots: list[Slots]

    def draw(
        self, rng: np.random.Generator, batch: int, tokenizer: CLIPTokenizer, freedom: float
    ) -> tuple[Tensor, Tensor]:
        """A batch of latents and the tokens of captions: a share of them empty, the share `freedom` freely worded."""
        index = rng.integers(0, len(self.slots) - HELD_OUT, size=batch)
        flip = rng.integers(0, 2, size=batch)
        latents = torch.from_numpy(self.latents[index, flip].astype(np.float32))
        shown = [mirror(self.slots[i]) if flipped else self.slots[i] for i, flipped in zip(index, flip, strict=True)]
        captions = [draw_caption(slots, rng, freedom) for slots in shown]
        return latents, to_tokens(tokenizer, captions)

    def held_out(self, tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor]:
        """The scenes that are never trained on, with plain captions."""
        latents = torch.from_numpy(self.latents[-HELD_OUT:, 0].astype(np.float32))
        return latents, to_tokens(tokenizer, [to_caption(slots) for slots in self.slots[-HELD_OUT:]])


def draw_caption(slots: Slots, rng: np.random.Generator, freedom: float) -> str:
    """Empty, freely worded or plain. A run starts with plain captions: one order of words is learned much sooner."""
    if rng.random() < EMPTY_SHARE:
        return ""
    return vary_caption(slots, rng) if rng.random() < freedom else to_caption(slots)


def to_tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Padded and cut exactly as the stock pipeline does it. **Shape**: (B, MAX_TOKENS)."""
    encoded = tokenizer(
        list(captions), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    tokens: Tensor = encoded.input_ids
    return tokens


@torch.no_grad()
def write_latents(vae: AutoencoderKL, scenes: Path, path: Path, batch: int = 32) -> None:
    """Encode a pool of scenes once, each picture and its mirror image, to posterior means in float16."""
    images, slots = read_pool(scenes)
    encoder: Any = vae  # torch's annotations leave the next call out
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
    """The pool, read into memory."""
    _, slots = read_pool(scenes)
    return LatentPool(np.load(path), slots)


def draw_sigma(
    count: int, shifts: tuple[float, float] = EARLY_SHIFTS, generator: torch.Generator | None = None
) -> Tensor:
    """Logit-normal noise levels, as in arXiv 2403.03206 section 3.1, shifted to where the caption is needed.

    A color that fills a third of the frame can be read off the noisy latent itself until almost nothing but noise is
    left, so only high levels teach the network to listen to the text.

    **Shape**: (count,).
    """
    shift = torch.where(torch.rand(count, generator=generator) < 0.5, shifts[0], shifts[1])
    return torch.sigmoid(torch.randn(count, generator=generator) + shift.log())


def flow_loss(network: TextToLatent, latents: Tensor, tokens: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the velocity.

    **Ref**: rectified flow, arXiv 2209.03003, eq. 1, with time running from data to noise.

    **Shape**: latents and noise (B, 16, h, w), tokens (B, MAX_TOKENS), sigma (B,); returns ().
    """
    level = sigma.view(-1, 1, 1, 1)
    noisy = (1.0 - level) * latents + level * noise
    with torch.autocast("cpu", torch.bfloat16):
        velocity = network(noisy, sigma, tokens)
    loss: Tensor = (velocity.float() - (noise - latents)).square().mean()
    return loss


@contextmanager
def low_level_features(unet: UNet2DConditionModel) -> Iterator[list[Tensor]]:
    """Collect what the last down, the middle and the first up block put out during one forward pass."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    blocks: list[Any] = [unet.down_blocks[-1], unet.mid_block, unet.up_blocks[0]]
    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def compass_loss(network: TextToLatent, features: Sequence[Tensor]) -> Tensor:
    """Error of reading left..right = -1..1 from the features by one linear layer each.

    Scenes and their mirror images are equally likely, so nothing but the words "left" and "right" asks for a sense of
    sides, and the words mean nothing to a network without one: left alone, position stays at chance for long.

    **Shape**: features (B, channels, h, w) each; returns ().
    """
    losses = []
    for layer, values in zip(network.compass, features, strict=True):
        target = torch.linspace(-1.0, 1.0, values.shape[-1]).expand(values.shape[0], 1, *values.shape[-2:])
        losses.append((layer(values.float()) - target).square().mean())
    return torch.stack(losses).mean()


@torch.no_grad()
def validate(network: TextToLatent, latents: Tensor, tokens: Tensor) -> float:
    """The loss on held-out scenes at fixed noise."""
    generator = torch.Generator().manual_seed(0)
    sigma = draw_sigma(len(latents), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    batches = zip(latents.split(64), tokens.split(64), sigma.split(64), noise.split(64), strict=True)
    return float(torch.stack([flow_loss(network, *batch) for batch in batches]).mean())


def make_optimiser(network: TextToLatent, muon_lr: float, adam_lr: float) -> MuonAdamW:
    """Muon for the matrices between the first and last layers, AdamW for those, for embeddings, biases and norms."""
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
    """Run the training; leave `state.pt`, `log.jsonl` and the averaged weights as a pipeline in `out/pipeline`.

    Args:
        scenes: a pool written by `python -m giantleap.training.pocket.scenes`.
        vae_folder: the frozen autoencoder; its latents of the pool are kept in `out/latents.npy`.

    **Effects**: overwrites those files; safe to stop at any time and to repeat with `resume`.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    if not (out / "latents.npy").exists():
        write_latents(vae, scenes, out / "latents.npy")
    pool, tokenizer = read_latents(scenes, out / "latents.npy"), open_tokenizer()
    network, averaged = TextToLatent(len(tokenizer)), TextToLatent(len(tokenizer))
    for each in (network, averaged):  # plain products: the fused attention's backward is slower on a CPU
        each.unet.set_attn_processor(AttnProcessor())
        each.text_encoder.set_attn_implementation("eager")
    unet: Any = network.unet  # torch's annotations leave this call out
    unet.to(memory_format=torch.channels_last)  # 1.2x on a CPU
    optimiser = make_optimiser(network, muon_lr, adam_lr)
    state = TrainState(network, optimiser, Ema(network, 0.998), np.random.default_rng(seed))
    if resume:
        state.read(out / "state.pt")
    run_steps(state, averaged, pool, tokenizer, budget, out, batch)
    state.ema.copy_to(averaged)
    write_pipeline(out / "pipeline", averaged, vae, open_tokenizer())  # a used one would write its padding down too


def run_steps(
    state: TrainState,
    averaged: TextToLatent,
    pool: LatentPool,
    tokenizer: CLIPTokenizer,
    budget: Budget,
    out: Path,
    batch: int,
) -> None:
    """Train until the budget is spent; write the state and one log line every two minutes and at the end."""
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
            state.optimiser.step(cosine_rate(progress, state.step))
            state.ema.update(network, state.step)
            state.tick()
            bar.set_postfix_str(f"step {state.step} loss {float(loss.detach()):.3f}", refresh=False)
            bar.update(min(100.0, 100.0 * state.progress(budget)) - bar.n)
            if state.is_due(budget, SAVE_EVERY_S):
                state.write(out / "state.pt")
                state.ema.copy_to(averaged)
                write_log(out, state, validate(averaged, held_latents, held_tokens), batch)


def write_log(out: Path, state: TrainState, held_out_loss: float, batch: int) -> None:
    """Append one line of figures to `log.jsonl` and print it above the progress bar."""
    line = {"step": state.step, "samples": state.step * batch, "spent_s": round(state.spent_s, 1)}
    text = json.dumps({**line, "held_out_loss": round(held_out_loss, 5)})
    with (out / "log.jsonl").open("a") as log:
        log.write(text + "\n")
    tqdm.write(text)


def make_scheduler() -> DPMSolverMultistepScheduler:
    """A rectified-flow sampler that the stock Stable Diffusion pipeline accepts: its timesteps are sigma * 1000."""
    scheduler: DPMSolverMultistepScheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=NOISE_LEVELS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        steps_offset=1,
    )
    return scheduler


def write_pipeline(folder: Path, network: TextToLatent, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> None:
    """Write the stock pipeline directory; UNet and VAE in half precision, for their size, the text encoder as it is.

    `from_pretrained` gives float32 modules back: diffusers casts its own on loading, transformers keeps what it finds.
    """
    halves: dict[str, Any] = {"vae": copy.deepcopy(vae).half(), "unet": copy.deepcopy(network.unet).half()}
    halves["unet"].set_default_attn_processor()
    nothing: Any = None  # the optional parts, which the library's annotations call required
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
