"""Trains the pocket autoencoder of stride 4: `python -m giantleap.training.pocket autoencoder`.

It starts at the PCA of 4 x 4 blocks (`training/pocket/network.py`) and is trained end to end on crops, encoder
and decoder together, with the rate falling to zero along a cosine. The average weights are written; `log.jsonl` has the
curve on crops of a photograph that no training sees. Stopped runs go on with `--resume`.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from torch import Tensor

from giantleap.training.losses import shrink
from giantleap.training.optim import Budget, Ema, MuonAdamW, cosine_rate
from giantleap.training.pocket.network import CHANNELS, BlockPca, make_autoencoder, start_at_pca
from giantleap.training.pocket.pictures import PictureCounts, PicturePools, read_held_out, read_pools
from giantleap.training.pocket.state import TrainState, smoothed, train_steps, write_log

SAVE_EVERY_S = 150.0
FLOOR = 1e-4  # square error at 46 dB: better pictures count less
PCA_CROPS = 600
MUON_NAMES_LEFT_OUT = ("conv_in", "conv_out")


@dataclass(frozen=True)
class Recipe:
    """What a run may vary."""

    muon_lr: float = 0.005
    adam_lr: float = 7e-4
    code_noise: float = 0.005
    ema_decay: float = 0.995
    batch: int = 4
    crop_px: int = 96
    is_bfloat16: bool = True


def psnr_db(prediction: Tensor, target: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio of 8-bit pictures; both in [-1, 1]."""
    levels = ((prediction.clamp(-1.0, 1.0) + 1.0) * 127.5).round() / 127.5 - 1.0
    mse = (levels - target).square().flatten(1).mean(dim=1) / 4.0
    return float((-10.0 * mse.log10()).mean())


@torch.no_grad()
def validate(network: AutoencoderDC, held_out: Tensor) -> dict[str, float]:
    """Round-trip PSNR of the held-out crops at full, half and quarter size."""
    scores = {}
    for name, factor in (("full", 1), ("half", 2), ("quarter", 4)):
        images = held_out if factor == 1 else shrink(held_out, factor)
        images = ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round() / 127.5 - 1.0
        parts = [network.decode(network.encode(part).latent).sample for part in images.split(4)]
        scores[name] = psnr_db(torch.cat(parts), images)
    return scores


def picture_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """A tenth of the mean logarithm of each picture's square error, plus the mean absolute error."""
    error = decoded - images
    square = error.square().flatten(1).mean(dim=1)
    return 0.1 * (square + FLOOR).log().mean() + error.abs().mean()


def start(pools: PicturePools, channels: int, seed: int) -> AutoencoderDC:
    """The network at the PCA of crops in their own colors."""
    rng = np.random.default_rng((seed, 1))
    crops = pools.crops(rng, PCA_CROPS, 96)
    network = make_autoencoder(channels)
    start_at_pca(network, BlockPca.fit(crops, channels))
    return network


def train_autoencoder(
    out: Path, pool: Path, budget: Budget, seed: int, resume: bool, recipe: Recipe, channels: int = CHANNELS
) -> None:
    """Runs the training; writes `state.pt`, `log.jsonl` and the average as `vae/` into `out`.

    Effects:
        Overwrites the three; safe to stop at any time and to repeat with `resume`.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    counts = PictureCounts()
    pools, held_out = read_pools(pool, counts, seed), read_held_out(pool, counts, seed)
    network, averaged = start(pools, channels, seed), make_autoencoder(channels)
    optimizer = MuonAdamW(network.named_parameters(), recipe.muon_lr, recipe.adam_lr, MUON_NAMES_LEFT_OUT)
    state = TrainState(network, optimizer, Ema(network, recipe.ema_decay), np.random.default_rng(seed))
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        state.read(out / "state.pt")
    else:
        write_log(out, state, validate(network, held_out))
    smooth = math.nan
    for progress in train_steps(state, budget):
        images = pools.crops(state.rng, recipe.batch, recipe.crop_px)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.is_bfloat16):
            codes = network.encoder(images).float()
            decoded = network.decoder(codes + recipe.code_noise * torch.randn_like(codes)).float()
        loss = picture_loss(decoded, images)
        torch.autograd.backward(loss)
        optimizer.step(cosine_rate(progress, state.step))
        state.ema.update(network, state.step)
        state.tick()
        smooth = smoothed(smooth, float(loss.detach()))
        if state.is_due(budget, SAVE_EVERY_S):
            state.write(out / "state.pt")
            state.ema.copy_to(averaged)
            write_log(out, state, {"cpu_s": time.process_time(), "loss": smooth, **validate(averaged, held_out)})
            averaged.save_pretrained(out / "vae")
