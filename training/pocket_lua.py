"""Trains the pocket LUA in the latent space of the frozen pocket VAE, by the three stages of arXiv 2511.10629.

Stage I matches latents, stage II adds decoded pictures at low weight, stage III matches decoded pictures alone; each
stage starts from the average weights of the one before. Pairs are encoded once (`write_pairs`); the gradient of the
picture losses flows through the frozen decoder. The network is `models/lua.py`, the losses `training/losses.py`.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from models.checkpoints import read_lua, write_lua
from models.lua import PRESETS, Lua
from training.losses import downsampled_l1, eagle, fourier_l1, high_frequency_l1
from training.optim import Budget, Ema, MuonAdamW, cosine_rate
from training.pocket_vae import Pictures, psnr_db, train_steps, write_log
from training.state import TrainState

SCALES = (2, 4)
CROP_PX = 256
ENCODE_BATCH = 8
EMA_DECAY = 0.998
SAVE_EVERY_S = 150.0


@dataclass(frozen=True)
class Stage:
    """Loss weights and rates of one stage.

    Ref: arXiv 2511.10629, A.1 for the weights; rates, batch and crop are ours, for one CPU core.
    """

    latent_square: float
    latent_l1: float
    latent_fourier: float
    picture_shrunk: float
    picture_high: float
    picture_l1: float
    picture_fourier: float
    picture_eagle: float
    muon_lr: float
    batch: int
    crop_latent: int  # side of the enlarged latent at x2
    x4_every: int = 3  # one step in so many trains x4

    def batch_shape(self, scale: int) -> tuple[int, int]:
        """Batch and crop: at x4 a small crop is doubled, so that the small latent still fills a window."""
        if scale == 2 or self.crop_latent == CROP_PX // 8:
            return self.batch, self.crop_latent
        return max(1, self.batch // 4), 2 * self.crop_latent

    @property
    def decodes(self) -> bool:
        return max(self.picture_shrunk, self.picture_high, self.picture_l1) > 0.0


STAGES = {
    "1": Stage(0.0, 1.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, muon_lr=0.02, batch=16, crop_latent=32),
    "2": Stage(0.0, 1.0, 0.1, 0.1, 0.05, 0.0, 0.0, 0.0, muon_lr=0.004, batch=4, crop_latent=16),
    "3": Stage(0.0, 0.0, 0.0, 0.0, 0.0, 10.0, 1.0, 5e-5, muon_lr=0.008, batch=4, crop_latent=16),
    # Ours, not the paper's: the weighted latent square stands for the pixel square without a decode.
    "square": Stage(1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, muon_lr=0.01, batch=16, crop_latent=32, x4_every=2),
}


@dataclass(frozen=True)
class Pairs:
    """Encoded pairs: `latents[1]` of the large pictures, `latents[2]` and `latents[4]` of the shrunk ones."""

    latents: dict[int, Tensor]
    pictures: NDArray[np.uint8]

    def draw(self, rng: np.random.Generator, scale: int, count: int, crop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cuts aligned crops.

        Shape:
            small [count, 16, crop / scale, crop / scale], large [count, 16, crop, crop], pictures
            [count, 3, 8 * crop, 8 * crop] in [-1, 1].
        """
        side = self.latents[1].shape[-1]
        small, large, pictures = [], [], []
        for index in rng.integers(0, len(self.pictures), count):
            top, left = (int(v) * scale for v in rng.integers(0, (side - crop) // scale + 1, 2))
            rows, columns = slice(top // scale, (top + crop) // scale), slice(left // scale, (left + crop) // scale)
            small.append(self.latents[scale][index, :, rows, columns])
            large.append(self.latents[1][index, :, top : top + crop, left : left + crop])
            area = self.pictures[index, 8 * top : 8 * (top + crop), 8 * left : 8 * (left + crop)]
            pictures.append(torch.from_numpy(np.array(area)))
        images = torch.stack(pictures).permute(0, 3, 1, 2) / 127.5 - 1.0
        return torch.stack(small).float(), torch.stack(large).float(), images


def shrink(images: Tensor, scale: int) -> Tensor:
    """Antialiased bicubic, to 8-bit levels, as a camera or a browser would hand it over; [-1, 1]."""
    small = F.interpolate(images, scale_factor=1.0 / scale, mode="bicubic", antialias=True)
    return ((small.clamp(-1.0, 1.0) + 1.0) * 127.5).round() / 127.5 - 1.0


@torch.no_grad()
def write_pairs(vae: AutoencoderKL, source: Pictures, path: Path, count: int, seed: int) -> None:
    """Cuts `count` pictures and encodes each at full, half and quarter size.

    Effects:
        Writes the pictures as `<path>.npy` and the latents, float16, as `<path>.pt`.
    """
    rng = np.random.default_rng((seed, 1))
    pictures = np.empty((count, CROP_PX, CROP_PX, 3), dtype=np.uint8)
    parts: dict[int, list[Tensor]] = {scale: [] for scale in (1, *SCALES)}
    for start in tqdm(range(0, count, ENCODE_BATCH), desc="encode pairs", unit=f"{ENCODE_BATCH} img"):
        images = source.crops(rng, min(ENCODE_BATCH, count - start), CROP_PX)
        images = ((images + 1.0) * 127.5).round() / 127.5 - 1.0
        rows = ((images + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1)
        pictures[start : start + len(rows)] = rows.numpy()
        for scale, latents in parts.items():
            small = images if scale == 1 else shrink(images, scale)
            # bfloat16 is 10 times faster here and moves a code by 0.2 to 0.9 % of its deviation.
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(vae.encode(small).latent_dist.mode().half().contiguous())
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path.with_suffix(".npy"), pictures, allow_pickle=False)
    torch.save({str(scale): torch.cat(latents) for scale, latents in parts.items()}, path.with_suffix(".pt"))


def read_pairs(path: Path) -> Pairs:
    """Opens what `write_pairs` wrote."""
    latents = torch.load(path.with_suffix(".pt"), weights_only=True)
    pictures = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
    return Pairs({int(scale): value for scale, value in latents.items()}, pictures)


def stage_loss(stage: Stage, grown: Tensor, large: Tensor, decoded: Tensor | None, pictures: Tensor) -> Tensor:
    """The weighted sum of one stage; terms of weight zero are not computed.

    Shape:
        grown and large [batch, 16, h, w]; decoded and pictures [batch, 3, 8 h, 8 w].
    """
    terms = []
    if stage.latent_square:
        terms.append(stage.latent_square * (grown - large).square().mean())
    if stage.latent_l1:
        terms += [stage.latent_l1 * (grown - large).abs().mean(), stage.latent_fourier * fourier_l1(grown, large)]
    if decoded is not None and stage.picture_shrunk:
        terms += [
            stage.picture_shrunk * downsampled_l1(decoded, pictures),
            stage.picture_high * high_frequency_l1(decoded, pictures),
        ]
    if decoded is not None and stage.picture_l1:
        terms += [
            stage.picture_l1 * (decoded - pictures).abs().mean(),
            stage.picture_fourier * fourier_l1(decoded, pictures),
            stage.picture_eagle * eagle(decoded, pictures),
        ]
    return torch.stack(terms).sum()


@torch.no_grad()
def channel_weights(vae: AutoencoderKL, latents: Tensor, noise: float = 0.1) -> Tensor:
    """How much an error in each latent channel costs in the decoded picture; mean 1.

    A latent L1 over channels of equal deviation spends the network on fine texture that hardly shows. With these
    weights a latent error counts about what it costs in pixels, at a fraction of the price of decoding.

    Shape:
        latents [n, 16, h, w]; returns [1, 16, 1, 1].
    """
    clean = vae.decode(latents).sample
    costs = []
    for channel in range(latents.shape[1]):
        disturbed = latents.clone()
        disturbed[:, channel] += noise * torch.randn_like(disturbed[:, channel])
        costs.append((vae.decode(disturbed).sample - clean).square().mean().sqrt())
    weights = torch.stack(costs)
    return (weights / weights.mean()).view(1, -1, 1, 1)


@torch.no_grad()
def validate(net: Lua, vae: AutoencoderKL, pairs: Pairs, count: int = 8) -> dict[str, float]:
    """Decoded PSNR on held-out pairs, per scale, beside decode-then-bicubic."""
    net.eval()
    images = torch.from_numpy(np.array(pairs.pictures[:count])).permute(0, 3, 1, 2) / 127.5 - 1.0
    scores: dict[str, float] = {}
    for scale in SCALES:
        gains, values = [], []
        for start in range(0, count, 4):
            small, target = pairs.latents[scale][start : start + 4].float(), images[start : start + 4]
            value = psnr_db(vae.decode(net(small, scale)).sample, target)
            bicubic = F.interpolate(vae.decode(small).sample, scale_factor=float(scale), mode="bicubic")
            values.append(value)
            gains.append(value - psnr_db(bicubic, target))
        scores[f"x{scale}"] = float(np.mean(values))
        scores[f"x{scale}_gain"] = float(np.mean(gains))
    net.train()
    return scores


def train_lua(
    out: Path, vae_dir: Path, pairs_path: Path, held_out_path: Path, name: str, start: Path | None, budget: Budget,
    seed: int, resume: bool,
) -> None:  # fmt: skip
    """Runs one stage; writes `state.pt`, `log.jsonl` and the average weights as `lua.safetensors` into `out`.

    Args:
        name: a key of `STAGES`.
        start: weights to start from; none builds the pocket preset.

    Effects:
        Overwrites the three; safe to stop at any time and to repeat with `resume`.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    stage, pairs, held_out = STAGES[name], read_pairs(pairs_path), read_pairs(held_out_path)
    vae = AutoencoderKL.from_pretrained(vae_dir).float().requires_grad_(False).eval()
    net = Lua(PRESETS["pocket"]) if start is None else read_lua(start)
    if start is None:
        large = pairs.latents[1].float()
        net.set_latent_statistics(large.mean(dim=(0, 2, 3)), large.std(dim=(0, 2, 3)))
    weights = channel_weights(vae, pairs.latents[1][:2].float())
    tqdm.write(f"channel weights {[round(float(w), 2) for w in weights.flatten()]}")
    averaged = Lua(net.spec)
    net.train()
    optimiser = MuonAdamW(
        net.named_parameters(), stage.muon_lr, stage.muon_lr * 0.1, ("conv_last", "bias_table", "conv_first")
    )
    state = TrainState(net, optimiser, Ema(net, EMA_DECAY), np.random.default_rng((seed, list(STAGES).index(name))))
    if resume:
        state.read(out / "state.pt")
    saved_s, smooth = state.spent_s, math.nan
    for progress in train_steps(state, budget, f"lua stage {name}"):
        scale = 4 if state.step % stage.x4_every == 0 else 2
        small, large, pictures = pairs.draw(state.rng, scale, *stage.batch_shape(scale))
        with torch.autocast("cpu", torch.bfloat16):
            grown = net(small, scale).float()
            decoded = vae.decode(grown).sample.float() if stage.decodes else None
        loss = stage_loss(stage, grown * weights, large * weights, decoded, pictures)
        torch.autograd.backward(loss)
        optimiser.step(cosine_rate(progress, state.step))
        state.ema.update(net, state.step)
        state.tick()
        value = float(loss.detach())
        smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
        if state.spent_s - saved_s > SAVE_EVERY_S or state.progress(budget) >= 1.0:
            saved_s = state.spent_s
            state.write(out / "state.pt")
            state.ema.copy_to(averaged)
            write_log(out, state, {"loss": smooth, **validate(averaged, vae, held_out)})
            write_lua(out / "lua.safetensors", averaged, {"training": json.dumps({"stage": name, "step": state.step})})
