"""Text to latent in the space of the stride-4 autoencoder: a stock SanaPipeline, trained from random weights.

A rectified flow whose network predicts the clean latents: these lie near a surface of few dimensions, while velocities
fill the space (T. Li and K. He, "Back to basics", arXiv 2511.13720). So 16 x 16 px can be one token, 64 of a picture,
although a token has more values than the network is wide. The text encoder first learns to read the slots of captions,
which takes a minute, and then goes on with the flow.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor, nn
from torch.optim import AdamW
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from giantleap.training.optim import Budget, Ema, MuonAdamW
from giantleap.training.pocket.drawing.captions import DROP_SHARE
from giantleap.training.pocket.drawing.prompts import CHOICES, SECOND, Prompt, draw_prompt, prompt_caption, vary_prompt
from giantleap.training.pocket.network import CHANNELS, SCALING_FACTOR
from giantleap.training.pocket.state import TrainState, smoothed, train_steps, write_log
from giantleap.training.pocket.studio import StudioPool, read_pool
from giantleap.training.pocket.tokenizer import MAX_TOKENS, open_sana_tokenizer
from giantleap.training.pocket.tokens import halve_patches, patch_of

LATENT_SIDE = 32  # 128 px at stride 4
TEXT_WIDTH = 128
PLACES = 8  # of the position embedding, along a side of the picture
NOISE_LEVELS = 1000  # the network's timestep is sigma * NOISE_LEVELS
FLOW_SHIFT = 3.0  # of the sampler's noise levels towards high noise
COARSE_PATCH = 4  # of the first runs; the last ones have tokens of half the side
SIGMA_FLOOR = 0.2  # errors count by 1 / sigma^2 down to this noise level, which is the error of the velocity
EMPTY_SHARE = 0.10  # captions replaced by "", for classifier-free guidance
HELD_OUT = 64  # last scenes of the pool, never trained on
SAVE_EVERY_S = 240.0
ADAM_NAMES = ("patch_embed", "proj_out", "embed_tokens", "conv_depth", "scale_shift_table")
GAIN_STEP, GAIN_SCENES = 0.05, 4
READER_STEPS, READER_BATCH = 500, 64


@dataclass(frozen=True)
class Recipe:
    """What a run may vary."""

    batch: int = 64
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    ema_decay: float = 0.998
    width: int = 256
    depth: int = 6
    patch: int = COARSE_PATCH
    is_bfloat16: bool = True
    is_compiled: bool = False


@dataclass(frozen=True)
class Schedule:
    """Learning rate and noise levels in the course of a run.

    Args:
        peak: Share of the recipe's rates at the highest.
        decay_share: Last part of the run, in which the rate falls to zero.
        early_shifts: Shifts of the noise levels at first, half of the samples each (`draw_sigma`).
        late_shifts: The same later.
        late_from: Share of the run after which `late_shifts` hold.
        early_freedom: Share of freely worded captions in the first half; plain ones are learned sooner.
        late_freedom: The same at the end; it rises in the second half.
        drop_share: Share of the free captions of one object that leave slots out.
    """

    peak: float
    decay_share: float
    early_shifts: tuple[float, float]
    late_shifts: tuple[float, float]
    late_from: float
    early_freedom: float = 0.0
    late_freedom: float = 0.6
    drop_share: float = DROP_SHARE

    def rate(self, progress: float, step: int, warmup_steps: int = 50) -> float:
        """Return the share of the recipe's rates: linear warm-up, level, then linear to zero at progress 1."""
        return self.peak * min(1.0, (step + 1) / warmup_steps, max(0.0, (1.0 - progress) / self.decay_share))

    def shifts(self, progress: float) -> tuple[float, float]:
        """Return the shifts of the noise levels."""
        return self.early_shifts if progress < self.late_from else self.late_shifts

    def freedom(self, progress: float) -> float:
        """Return the share of freely worded captions."""
        return self.early_freedom + (self.late_freedom - self.early_freedom) * max(0.0, 2.0 * progress - 1.0)


# High noise first, where colors and positions are decided; then edges and clean areas.
FRESH = Schedule(peak=1.0, decay_share=0.65, early_shifts=(4.0, 12.0), late_shifts=(4.0, 1.0), late_from=0.15)
CONTINUED = Schedule(peak=0.4, decay_share=1.0, early_shifts=(4.0, 1.0), late_shifts=(2.0, 0.5), late_from=0.5)
HALVED = Schedule(peak=0.2, decay_share=1.0, early_shifts=(4.0, 0.7), late_shifts=(2.0, 0.5), late_from=0.5)
# Short prompts: where a caption leaves the place open, the network must choose one at high noise.
SHORT = Schedule(
    peak=0.15,
    decay_share=1.0,
    early_shifts=(8.0, 1.5),
    late_shifts=(4.0, 0.6),
    late_from=0.5,
    early_freedom=0.7,
    late_freedom=0.7,
    drop_share=0.7,
)


def choose_schedule(start_patch: int, patch: int) -> Schedule:
    """Return the schedule of a run that begins with the weights of another one."""
    if start_patch == 2 * patch:
        return HALVED
    return CONTINUED if patch == COARSE_PATCH else SHORT


@dataclass(frozen=True)
class Captions:
    """Tokenized captions: tokens and mask, [batch, MAX_TOKENS] each."""

    tokens: Tensor
    mask: Tensor


class TextToLatent(nn.Module):
    """The two networks trained together."""

    def __init__(self, vocabulary: int, recipe: Recipe) -> None:
        super().__init__()
        self.text_encoder = make_text_encoder(vocabulary)
        self.transformer = make_transformer(recipe)

    def forward(self, noisy: Tensor, sigma: Tensor, captions: Captions) -> Tensor:
        """Return the clean latents at noise level sigma in 0..1.

        Args:
            noisy: [batch, channels, h, w].
            sigma: [batch].
            captions: Of the batch.

        Returns:
            [batch, channels, h, w].
        """
        states = self.text_encoder(captions.tokens, attention_mask=captions.mask).last_hidden_state
        clean: Tensor = self.transformer(
            noisy, states, sigma * NOISE_LEVELS, encoder_attention_mask=captions.mask, return_dict=False
        )[0]
        return clean


def make_text_encoder(vocabulary: int) -> Gemma2Model:
    """Return a Gemma 2 of two layers, which a SanaPipeline takes."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=TEXT_WIDTH // 4,
            query_pre_attn_scalar=TEXT_WIDTH // 4,
            max_position_embeddings=512,
            attn_logit_softcapping=None,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def make_transformer(recipe: Recipe) -> SanaTransformer2DModel:
    """Return the denoiser; it knows places relative to a picture of 128 px, and its last layer starts at zero."""
    heads = recipe.width // 32
    network: SanaTransformer2DModel = SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=heads,
        attention_head_dim=32,
        num_layers=recipe.depth,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=32,
        cross_attention_dim=recipe.width,
        caption_channels=TEXT_WIDTH,
        sample_size=LATENT_SIDE,
        patch_size=recipe.patch,
        interpolation_scale=LATENT_SIDE // recipe.patch // PLACES,  # places are 0 to 7 at any patch size
    )
    nn.init.zeros_(network.proj_out.weight)
    nn.init.zeros_(network.proj_out.bias)
    return network


class SlotReader(nn.Module):
    """Reads the slots of a caption from the states of its words, to train the text encoder."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [1 + len(CHOICES[slot]) for slot in (*CHOICES, *SECOND)]
        self.attention = nn.Linear(TEXT_WIDTH, len(sizes))
        self.heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, size) for size in sizes)

    def forward(self, states: Tensor, mask: Tensor) -> list[Tensor]:
        """Map states [batch, tokens, width] to logits [batch, choices] per slot."""
        scores = self.attention(states).masked_fill(mask.unsqueeze(-1) == 0, -1e4)
        pooled = torch.einsum("bts,btw->bsw", scores.softmax(dim=1), states)
        return [head(pooled[:, index]) for index, head in enumerate(self.heads)]


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> Captions:
    """Tokenize as the stock pipeline does with `max_sequence_length=MAX_TOKENS`."""
    encoded = tokenizer(
        [caption.lower().strip() for caption in captions],
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    )
    return Captions(encoded.input_ids, encoded.attention_mask)


def train_reader(encoder: Gemma2Model, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> float:
    """Teach the text encoder to read the slots of captions; returns the share read rightly in the last 50 steps."""
    rng = np.random.default_rng((seed, 3))
    reader = SlotReader()
    weights = [*encoder.parameters(), *reader.parameters()]
    optimizer = AdamW(weights, 1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    shares: list[float] = []
    for _ in tqdm(range(steps), desc="reader", unit="step", mininterval=10.0):
        prompts = [draw_prompt(rng) for _ in range(READER_BATCH)]
        # Plain and free wording; a caption that leaves slots out has other labels, so those are not drawn here.
        free = [prompt.second is not None and rng.random() < 0.5 for prompt in prompts]
        texts = [
            vary_prompt(p, rng) if is_free else prompt_caption(p) for p, is_free in zip(prompts, free, strict=True)
        ]
        captions = tokenize(tokenizer, texts)
        labels = torch.tensor([prompt.labels() for prompt in prompts])
        states = encoder(captions.tokens, attention_mask=captions.mask).last_hidden_state
        logits = reader(states, captions.mask)
        torch.autograd.backward(torch.stack([F.cross_entropy(x, labels[:, i]) for i, x in enumerate(logits)]).sum())
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        shares.append(float(torch.stack([(x.argmax(1) == labels[:, i]).float() for i, x in enumerate(logits)]).mean()))
    return float(np.mean(shares[-50:]))


def draw_caption(prompt: Prompt, rng: np.random.Generator, freedom: float, drop_share: float) -> str:
    """Draw an empty, freely worded or plain caption."""
    if rng.random() < EMPTY_SHARE:
        return ""
    return vary_prompt(prompt, rng, drop_share) if rng.random() < freedom else prompt_caption(prompt)


def draw_batch(
    pool: StudioPool,
    rng: np.random.Generator,
    batch: int,
    tokenizer: PreTrainedTokenizerFast,
    freedom: float,
    drop_share: float = DROP_SHARE,
) -> tuple[Tensor, Captions]:
    """Draw scaled latents [batch, channels, h, w] and captions (`Schedule`); half of the pictures are mirrored."""
    index = rng.integers(0, len(pool.prompts) - HELD_OUT, size=batch)
    flip = rng.integers(0, 2, size=batch)
    latents = torch.from_numpy(pool.latents[index, flip].astype(np.float32)) * SCALING_FACTOR
    shown = [pool.prompts[i].mirrored() if flipped else pool.prompts[i] for i, flipped in zip(index, flip, strict=True)]
    return latents, tokenize(tokenizer, [draw_caption(prompt, rng, freedom, drop_share) for prompt in shown])


def draw_sigma(count: int, shifts: tuple[float, float], generator: torch.Generator | None = None) -> Tensor:
    """Draw logit-normal noise levels [count] (arXiv 2403.03206, section 3.1), shifted towards high noise.

    A color that fills a third of the frame is visible in the noisy latent until almost only noise is left, so only high
    levels teach the network to use the text.
    """
    shift = torch.where(torch.rand(count, generator=generator) < 0.5, shifts[0], shifts[1])
    return torch.sigmoid(torch.randn(count, generator=generator) + shift.log())


@torch.no_grad()
def picture_gains(vae: AutoencoderDC, latents: Tensor) -> Tensor:
    """Return how much an error of each channel changes the picture: mean squares, [channels], their mean one.

    The autoencoder lifts faint detail into channels of their own. What nobody sees and no prompt says would be most of
    an error that counts all channels alike.
    """
    signs = torch.randn(latents[:, :1].shape, generator=torch.Generator().manual_seed(0)).sign() * GAIN_STEP
    whole = vae.decode(latents).sample
    gains = []
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, channel : channel + 1] += signs
        gains.append((vae.decode(moved).sample - whole).square().mean())
    found = torch.stack(gains)
    return found / found.mean()


def flow_loss(
    network: TextToLatent,
    latents: Tensor,
    captions: Captions,
    sigma: Tensor,
    noise: Tensor,
    gains: Tensor,
    is_bfloat16: bool,
) -> Tensor:
    """Return the mean squared error of the velocity (rectified flow, arXiv 2209.03003, eq. 1), limited at low noise.

    Channels count by `gains`, of `picture_gains`.
    """
    level = sigma.view(-1, 1, 1, 1)
    noisy = (1.0 - level) * latents + level * noise
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bfloat16):
        clean = network(noisy, sigma, captions)
    error = (clean.float() - latents) / level.clamp(min=SIGMA_FLOOR)
    loss: Tensor = (error.square() * gains.view(1, -1, 1, 1)).mean()
    return loss


@torch.no_grad()
def validate(
    network: TextToLatent, pool: StudioPool, tokenizer: PreTrainedTokenizerFast, gains: Tensor, is_bfloat16: bool
) -> dict[str, float]:
    """Return the loss on held-out scenes with plain captions, at fixed noise: high levels, low ones."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.from_numpy(pool.latents[-HELD_OUT:, 0].astype(np.float32)) * SCALING_FACTOR
    captions = tokenize(tokenizer, [prompt_caption(prompt) for prompt in pool.prompts[-HELD_OUT:]])
    noise = torch.randn(latents.shape, generator=generator)
    scores = {}
    for name, shifts in (("high", FRESH.early_shifts), ("low", (1.0, 0.3))):
        sigma = draw_sigma(len(latents), shifts, generator)
        scores[f"{name}_loss"] = float(flow_loss(network, latents, captions, sigma, noise, gains, is_bfloat16))
    return scores


def train_text(
    out: Path,
    scenes: Path,
    vae: AutoencoderDC,
    budget: Budget,
    seed: int,
    resume: bool,
    recipe: Recipe,
    start: Path | None = None,
) -> None:
    """Train; write `state.pt`, `log.jsonl` and the averaged weights as a pipeline in `out/pipeline`.

    May be stopped at any time and resumed. `scenes` is a pool written by the command `scenes`. `start` is the state of
    another run, of tokens of the same or twice the size, whose averaged weights this one begins with, at a lower rate.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    pool, tokenizer = read_pool(scenes), open_sana_tokenizer()
    network, averaged = TextToLatent(len(tokenizer), recipe), TextToLatent(len(tokenizer), recipe)
    optimizer = MuonAdamW(network.named_parameters(), recipe.muon_lr, recipe.adam_lr, ADAM_NAMES, recipe.is_bfloat16)
    schedule = FRESH
    if start is not None:
        weights = torch.load(start, weights_only=True)["ema"]
        schedule = choose_schedule(patch_of(weights), recipe.patch)
        network.load_state_dict(halve_patches(weights) if schedule is HALVED else weights)
    elif not resume:
        share = train_reader(network.text_encoder, tokenizer, READER_STEPS, seed)
        tqdm.write(json.dumps({"slots_read": round(share, 4)}))
    state = TrainState(network, optimizer, Ema(network, recipe.ema_decay), np.random.default_rng(seed))
    if resume:
        state.read(out / "state.pt")
    gains = picture_gains(vae, torch.from_numpy(pool.latents[:GAIN_SCENES, 0].astype(np.float32)))
    if recipe.is_compiled:
        network.transformer.compile(dynamic=False)
    smooth = math.nan
    for progress in train_steps(state, budget):
        latents, captions = draw_batch(
            pool, state.rng, recipe.batch, tokenizer, schedule.freedom(progress), schedule.drop_share
        )
        sigma = draw_sigma(recipe.batch, schedule.shifts(progress))
        loss = flow_loss(network, latents, captions, sigma, torch.randn_like(latents), gains, recipe.is_bfloat16)
        torch.autograd.backward(loss)
        optimizer.step(schedule.rate(progress, state.step))
        state.ema.update(network, state.step)
        state.tick()
        smooth = smoothed(smooth, float(loss.detach()))
        if state.is_due(budget, SAVE_EVERY_S):
            state.write(out / "state.pt")
            state.ema.copy_to(averaged)
            write_log(out, state, {"loss": smooth, **validate(averaged, pool, tokenizer, gains, recipe.is_bfloat16)})
            write_pipeline(out / "pipeline", averaged, vae, open_sana_tokenizer())


def make_scheduler() -> DPMSolverMultistepScheduler:
    """Return a rectified-flow sampler for a network that predicts the clean latents.

    It adds fresh noise in each step (SDE-DPM-Solver++, arXiv 2211.01095): where a prompt leaves the place open, the
    deterministic solver mixes places into lobed objects.
    """
    scheduler: DPMSolverMultistepScheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=NOISE_LEVELS,
        prediction_type="sample",
        algorithm_type="sde-dpmsolver++",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
    )
    return scheduler


def write_pipeline(folder: Path, network: TextToLatent, vae: AutoencoderDC, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the stock pipeline directory; denoiser and VAE in half precision, the text encoder in float32.

    `from_pretrained` returns float32 modules: diffusers casts on loading, transformers keeps the stored dtype.
    """
    halves: dict[str, Any] = {"vae": AutoencoderDC.from_config(vae.config), "transformer": None}
    halves["vae"].load_state_dict(vae.state_dict())
    halves["vae"].register_to_config(scaling_factor=SCALING_FACTOR, _name_or_path="giantleap/pocket")
    halves["transformer"] = SanaTransformer2DModel.from_config(network.transformer.config)
    halves["transformer"].load_state_dict(network.transformer.state_dict())
    scheduler: Any = make_scheduler()
    pipeline = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=network.text_encoder,
        scheduler=scheduler,
        **{name: part.half() for name, part in halves.items()},
    )
    pipeline.save_pretrained(folder)
