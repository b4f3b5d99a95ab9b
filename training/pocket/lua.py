"""Trains the pocket LUA in the latent space of the frozen pocket VAE.

Stages 1 to 3 are those of arXiv 2511.10629: latents, then decoded pictures at low weight, then decoded pictures
alone. Stages "linear" and "square" are ours and what the bundle was trained with: the square error of the picture,
first through a linear stand-in for the decoder (`picture_map`), then through the decoder itself. A stage starts from
the average weights of the one before. Pairs come from `training/pocket/pairs.py`, the network is
`models/lua/network.py`, the losses are in `training/losses.py`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.network import PRESETS, Lua
from giantleap.training.losses import downsampled_l1, eagle, fourier_l1, high_frequency_l1
from giantleap.training.optim import Budget, Ema, MuonAdamW, cosine_rate
from giantleap.training.pocket.pairs import SCALES, Pairs, read_pairs, shrink
from giantleap.training.pocket.state import TrainState, smoothed
from giantleap.training.pocket.vae import psnr_db, train_steps, write_log

__all__ = ["STAGES", "shrink", "train_lua"]

EMA_DECAY = 0.998
SAVE_EVERY_S = 420.0
X4_UNITS = 2.5  # an x4 step takes so many times the pictures of an x2 step: its small latents are a quarter
FLOOR = 1e-2  # square error at 26 dB, about that of the photographs: better pictures count less
CLIPPED = 0.97  # four levels from black or white, where the noise of a camera or a JPEG leaves what was clipped


@dataclass(frozen=True)
class Stage:
    """Loss weights and rates of one stage.

    Ref: arXiv 2511.10629, A.1 for the weights of 1 to 3; rates and batches are ours, for one CPU core.
    """

    muon_lr: float
    units: float  # squares of 256 px in an x2 batch
    latent_l1: float = 0.0
    latent_fourier: float = 0.0
    picture_shrunk: float = 0.0
    picture_high: float = 0.0
    picture_l1: float = 0.0
    picture_fourier: float = 0.0
    picture_eagle: float = 0.0
    picture_square: float = 0.0
    is_linear: bool = False  # the square of the latent error as `picture_map` shows it

    @property
    def decodes(self) -> bool:
        return max(self.picture_shrunk, self.picture_high, self.picture_l1, self.picture_square) > 0.0

    def batch(self, pairs: Pairs, scale: int) -> int:
        """Pictures of this size in a batch; where pictures are decoded, both scales cost the same."""
        units = self.units * (X4_UNITS if scale == 4 and not self.decodes else 1.0)
        return max(1, round(units / pairs.units))


STAGES = {
    "1": Stage(0.02, 16.0, latent_l1=1.0, latent_fourier=0.1),
    "2": Stage(0.004, 2.0, latent_l1=1.0, latent_fourier=0.1, picture_shrunk=0.1, picture_high=0.05),
    "3": Stage(0.008, 2.0, picture_l1=10.0, picture_fourier=1.0, picture_eagle=5e-5),
    "linear": Stage(0.01, 8.0, is_linear=True),
    "square": Stage(0.003, 2.0, picture_square=1.0),
}


def mean_log_square(error: Tensor) -> Tensor:
    """Mean over the batch of the logarithm of each picture's mean square: what a mean of decibels weighs."""
    return (error.square().flatten(1).mean(dim=1) + FLOOR).log().mean()


def shown_error(decoded: Tensor, pictures: Tensor) -> Tensor:
    """The error of a decoded picture, zero where it lies beyond black or white and the picture is black or white.

    Such values are clamped when shown. A clamp of all values would lose the gradient of those that are wrong.
    """
    is_hidden = ((decoded < -1.0) & (pictures < -CLIPPED)) | ((decoded > 1.0) & (pictures > CLIPPED))
    return (decoded - pictures).masked_fill(is_hidden, 0.0)


def stage_loss(
    stage: Stage, upscaled: Tensor, large: Tensor, decoded: Tensor | None, pictures: Tensor | None
) -> Tensor:
    """The weighted sum of one stage's terms; terms of weight zero are not computed.

    Shape:
        upscaled and large [batch, 16, h, w]; decoded and pictures [batch, 3, 8 h, 8 w], for stages that decode.
    """
    terms = []
    if stage.latent_l1:
        terms += [stage.latent_l1 * (upscaled - large).abs().mean(), stage.latent_fourier * fourier_l1(upscaled, large)]
    if decoded is not None and pictures is not None:
        terms += picture_terms(stage, decoded, pictures)
    return torch.stack(terms).sum()


def picture_terms(stage: Stage, decoded: Tensor, pictures: Tensor) -> list[Tensor]:
    """The terms of `stage_loss` that need the decoded picture."""
    terms = []
    if stage.picture_shrunk:
        terms += [
            stage.picture_shrunk * downsampled_l1(decoded, pictures),
            stage.picture_high * high_frequency_l1(decoded, pictures),
        ]
    if stage.picture_l1:
        terms += [
            stage.picture_l1 * (decoded - pictures).abs().mean(),
            stage.picture_fourier * fourier_l1(decoded, pictures),
            stage.picture_eagle * eagle(decoded, pictures),
        ]
    if stage.picture_square:
        terms.append(stage.picture_square * mean_log_square(shown_error(decoded, pictures)))
    return terms


@torch.no_grad()
def picture_map(vae: AutoencoderKL, groups: list[Pairs], seed: int, count: int = 2) -> Tensor:
    """Fits the linear map from latent errors to the errors of the decoded picture, by least squares.

    Each 8 x 8 block of pixels is explained by the 3 x 3 codes round it. The codes are disturbed as an upscaler would:
    a part of the way to the bicubic enlargement, and by white noise. The square of the mapped error costs one
    convolution, while the decoder costs ten times as much as the adapter.

    Args:
        count: pictures of each size to fit on.

    Shape:
        returns [192, 16, 3, 3], a convolution's weight.
    """
    rng = np.random.default_rng((seed, 2))
    gram, cross = torch.zeros(144, 144, dtype=torch.double), torch.zeros(144, 192, dtype=torch.double)
    for pairs in groups:
        for scale in SCALES:
            small, large = pairs.latents_at(rng.integers(0, len(pairs.pictures), count), scale)
            way = torch.from_numpy(rng.uniform(0.0, 0.6, (len(small), 1, 1, 1))).float()
            noise = torch.from_numpy(rng.normal(0.0, 0.1, large.shape)).float()
            error = way * (F.interpolate(small, scale_factor=scale, mode="bicubic") - large) + noise
            shown = vae.decode(large + error).sample - vae.decode(large).sample
            codes = F.unfold(error, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
            blocks = F.unfold(shown, 8, stride=8).transpose(1, 2).flatten(0, 1).double()
            gram += codes.T @ codes
            cross += codes.T @ blocks
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(144, dtype=torch.double)
    weight: Tensor = torch.linalg.solve(gram + ridge, cross)
    return weight.T.reshape(192, 16, 3, 3).float()


def channel_weights(weight: Tensor) -> Tensor:
    """How much an error in each latent channel costs in the picture, by `picture_map`; mean 1.

    A latent L1 over channels of equal deviation spends the network on fine texture that hardly shows.

    Shape:
        weight [192, 16, 3, 3]; returns [1, 16, 1, 1].
    """
    costs = weight.square().sum(dim=(0, 2, 3)).sqrt()
    return (costs / costs.mean()).view(1, -1, 1, 1)


@torch.no_grad()
def validate(net: Lua, vae: AutoencoderKL, groups: list[Pairs]) -> dict[str, float]:
    """Mean PSNR of the decoded pictures of all pairs, per scale, and what it gains over decode-then-bicubic."""
    net.eval()
    scores: dict[str, float] = {}
    for scale in SCALES:
        values, gains = [], []
        for pairs in groups:
            for index in range(len(pairs.pictures)):
                place = np.array([index])
                (small, _), target = pairs.latents_at(place, scale), pairs.pictures_at(place)
                with torch.autocast("cpu", torch.bfloat16):
                    decoded, base = (vae.decode(latent).sample.float() for latent in (net(small, scale), small))
                value = psnr_db(decoded, target)
                bicubic = F.interpolate(base, scale_factor=float(scale), mode="bicubic")
                values.append(value)
                gains.append(value - psnr_db(bicubic, target))
        scores[f"x{scale}"] = float(np.mean(values))
        scores[f"x{scale}_gain"] = float(np.mean(gains))
    net.train()
    return scores


def train_lua(
    out: Path, vae_dir: Path, pairs_dir: Path, name: str, start: Path | None, budget: Budget, seed: int, resume: bool
) -> None:
    """Runs one stage; writes `state.pt`, `log.jsonl` and the average weights as `lua.safetensors` into `out`.

    Args:
        pairs_dir: what `python -m giantleap.training.pocket pairs` wrote: `train/` and `held_out/`.
        name: a key of `STAGES`.
        start: weights to start from; none builds the pocket preset.

    Effects:
        Overwrites the three; safe to stop at any time and to repeat with `resume`.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    stage, groups, held_out = STAGES[name], read_pairs(pairs_dir / "train"), read_pairs(pairs_dir / "held_out")
    vae = AutoencoderKL.from_pretrained(vae_dir).float().requires_grad_(False).eval()
    vae.to(memory_format=torch.channels_last)
    net = Lua(PRESETS["pocket"]) if start is None else read_lua(start)
    if start is None:
        large = groups[0].latents[1].float()
        net.set_latent_statistics(large.mean(dim=(0, 2, 3)), large.std(dim=(0, 2, 3)))
    to_picture = picture_map(vae, groups, seed)
    weights = channel_weights(to_picture)
    averaged = Lua(net.spec)
    net.train()
    optimizer = MuonAdamW(
        net.named_parameters(), stage.muon_lr, stage.muon_lr * 0.1, ("conv_last", "bias_table", "conv_first")
    )
    state = TrainState(net, optimizer, Ema(net, EMA_DECAY), np.random.default_rng((seed, list(STAGES).index(name))))
    if resume:
        state.read(out / "state.pt")
    smooth = dict.fromkeys(SCALES, math.nan)
    for progress in train_steps(state, budget, f"lua stage {name}"):
        scale = SCALES[state.step % 2]
        pairs = groups[int(state.rng.integers(len(groups)))]
        places = state.rng.integers(0, len(pairs.pictures), stage.batch(pairs, scale))
        small, large = pairs.latents_at(places, scale)
        with torch.autocast("cpu", torch.bfloat16):
            upscaled = net(small, scale).float()
            decoded = vae.decode(upscaled).sample.float() if stage.decodes else None
        if stage.is_linear:
            loss = mean_log_square(F.conv2d(upscaled - large, to_picture, padding=1))
        else:
            pictures = pairs.pictures_at(places) if stage.decodes else None
            loss = stage_loss(stage, upscaled * weights, large * weights, decoded, pictures)
        torch.autograd.backward(loss)
        optimizer.step(cosine_rate(progress, state.step))
        state.ema.update(net, state.step)
        state.tick()
        smooth[scale] = smoothed(smooth[scale], float(loss.detach()))
        if state.is_due(budget, SAVE_EVERY_S):
            state.write(out / "state.pt")
            state.ema.copy_to(averaged)
            losses = {f"loss_x{scale}": value for scale, value in smooth.items()}
            write_log(out, state, {**losses, **validate(averaged, vae, held_out)})
            write_lua(out / "lua.safetensors", averaged, {"training": json.dumps({"stage": name, "step": state.step})})
