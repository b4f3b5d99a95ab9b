"""Freeze the pocket VAE's encoder with normalized codes, then train the decoder alone.

Freezing folds the codes' statistics into the last convolution of the encoder and the first of the decoder, so that a
stock pipeline with `scaling_factor` 1 and no shift sees zero mean and unit deviation. The latent space is fixed from
here on. Follows `training/pocket/vae.py`.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from giantleap.training.losses import reconstruction
from giantleap.training.optim import Budget, Ema, MuonAdamW, cosine_rate
from giantleap.training.pocket.state import TrainState, smoothed
from giantleap.training.pocket.vae import SAVE_EVERY_S, Pool, train_steps, validate, write_vae

CODE_NOISE = 0.015  # simulates the residual noise of a diffusion model
EMA_DECAY = 0.997
PEAK_SHARE = 0.35  # factor on the end-to-end rates: a full restart would undo that run


@torch.no_grad()
def measure_codes(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation, both [channels], of the posterior means of images [n, 3, height, width] in [-1, 1]."""
    codes = torch.cat([vae.encode(part).latent_dist.mode() for part in tqdm(images.split(8), desc="codes")])
    return codes.mean(dim=(0, 2, 3)), codes.std(dim=(0, 2, 3))


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, mean: Tensor, deviation: Tensor) -> None:
    """Rescale the codes in place to (code - mean) / deviation, both [channels], without changing the decoded images.

    Exact except for the outermost ring of latents: the decoder's zero padding meant zero and now means `mean`.
    """
    out, first = vae.encoder.conv_out, vae.decoder.conv_in
    assert out.bias is not None and first.bias is not None
    channels = len(mean)
    out.bias[:channels].sub_(mean).div_(deviation)
    out.weight[:channels].div_(deviation.view(-1, 1, 1, 1))
    out.bias[channels:].sub_(2.0 * deviation.log())
    first.bias.add_((first.weight * mean.view(1, -1, 1, 1)).sum(dim=(1, 2, 3)))
    first.weight.mul_(deviation.view(1, -1, 1, 1))


def freeze_encoder(vae_dir: Path, out: Path, pool: Pool, seed: int, count: int = 256) -> dict[str, object]:
    """Write the folded VAE to `out` and, last, its figures to `out/READY` as JSON.

    Weights are rounded to float16 first, as the bundle ships them, so that latents equal those of the shipped file.
    """
    vae = AutoencoderKL.from_pretrained(vae_dir).eval()
    pictures, held_out = pool.read(seed), pool.read_held_out(seed)
    images = pictures.crops(np.random.default_rng((seed, 2)), count, 128)
    before = validate(vae, held_out)
    fold_statistics(vae, *measure_codes(vae, images))
    vae.half().float()
    vae.register_to_config(scaling_factor=1.0)
    vae.save_pretrained(out)
    scenes = torch.from_numpy(np.array(pictures.scenes[:count])).permute(0, 3, 1, 2) / 127.5 - 1.0
    figures: dict[str, object] = {"psnr_db_before_fold": before, "psnr_db": validate(vae, held_out)}
    for name, sample in (("mixed", images), ("scenes", scenes)):
        mean, deviation = measure_codes(vae, sample)
        figures[f"{name}_mean"] = [round(float(v), 4) for v in mean]
        figures[f"{name}_std"] = [round(float(v), 4) for v in deviation]
    (out / "READY").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def batch_shape(progress: float, draw: float) -> tuple[int, int]:
    """Return batch and crop size in pixels; `draw` in 0..1 selects small crops, which include scenes, or large ones.

    The last large crops are nearly whole pictures, because group norms average over the picture.
    """
    if progress < 0.3 or draw < 0.3:
        return 4, 128
    return (1, 256) if progress < 0.8 else (1, 384)


def train_decoder(
    out: Path, frozen: Path, pool: Pool, budget: Budget, seed: int, resume: bool, muon_lr: float = 0.012 * PEAK_SHARE
) -> None:
    """Train the decoder on codes of the frozen encoder; write `state.pt`, `log.jsonl` and the EMA as `vae/` in `out`.

    May be stopped at any time and resumed.
    """
    torch.manual_seed(seed)
    pictures, held_out = pool.read(seed), pool.read_held_out(seed)
    vae = AutoencoderKL.from_pretrained(frozen).to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    averaged = AutoencoderKL.from_pretrained(frozen).to(memory_format=torch.channels_last)
    optimizer = MuonAdamW(vae.decoder.named_parameters(), muon_lr, muon_lr / 12.0)
    state = TrainState(vae, optimizer, Ema(vae, EMA_DECAY), np.random.default_rng((seed, 3)))
    if resume:
        state.read(out / "state.pt")
    smooth = math.nan
    for progress in train_steps(state, budget, "decoder"):
        images = pictures.crops(state.rng, *batch_shape(progress, state.rng.random()))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                codes = vae.encoder(images).float().chunk(2, dim=1)[0]
                codes = codes + CODE_NOISE * torch.randn_like(codes)
            decoded = vae.decoder(codes.contiguous(memory_format=torch.channels_last))
        loss = reconstruction(decoded.float(), images)
        torch.autograd.backward(loss)
        optimizer.step(cosine_rate(progress, state.step))
        state.ema.update(vae, state.step)
        state.tick()
        smooth = smoothed(smooth, float(loss.detach()))
        if state.is_due(budget, SAVE_EVERY_S):
            write_vae(out, state, averaged, held_out, smooth, is_done=state.progress(budget) >= 1.0)
