"""Train the pocket VAE, a stock diffusers AutoencoderKL of stride 8 with 16 channels, on procedural images only.

1. The encoder learns the principal components of 8 x 8 blocks while the decoder learns to invert them (PCA teacher).
2. Encoder and decoder are trained end to end.
3. The codes are normalized to zero mean and unit deviation per channel (folded into the weights), and the encoder is
   frozen. Other networks can be trained in this latent space from here on.
4. The decoder alone is trained further.

`training/pocket/__main__.py` holds the commands, `docs/lab/vae.md` the figures. With another number of channels this
module trains the target VAE of `benchmarks/transfer.py`.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from giantleap.training.losses import reconstruction
from giantleap.training.optim import Budget, Ema, MuonAdamW, cosine_rate
from giantleap.training.pocket.leaves import read_leaf_pool
from giantleap.training.pocket.parallel import Peers
from giantleap.training.pocket.scenes import draw_scene, render
from giantleap.training.pocket.state import TrainState, smoothed

LATENT_CHANNELS = 16
STRIDE_PX = 8
TEACHER_SHARE = 0.3  # share of the run in which the encoder copies the teacher
WHITENING = 0.7  # codes are divided by deviation**WHITENING
CODE_NOISE = 0.03
SCENE_SHARE = 0.2  # share of each batch
SAVE_EVERY_S = 90.0


def make_vae(channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    """Build the network with zero-initialized residual branches and a nearly noiseless posterior."""
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        sample_size=128,
        scaling_factor=1.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for name, module in vae.named_modules():
        if name.endswith("conv2") and isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    with torch.no_grad():
        vae.encoder.conv_out.bias[channels:] = -7.0
    built: AutoencoderKL = vae.to(memory_format=torch.channels_last)
    return built


@dataclass(frozen=True)
class Pictures:
    """Pools from which batches are cut."""

    leaves: NDArray[np.uint8]
    scenes: NDArray[np.uint8]

    def crops(self, rng: np.random.Generator, count: int, size_px: int) -> Tensor:
        """Cut random crops [count, 3, size_px, size_px] in [-1, 1], channels last, with flips, turns and gain."""
        size_px = min(size_px, self.leaves.shape[1])
        batch = np.empty((count, size_px, size_px, 3), dtype=np.float32)
        for index in range(count):
            small_enough = size_px <= self.scenes.shape[1]
            pool = self.scenes if small_enough and rng.random() < SCENE_SHARE else self.leaves
            top, left = rng.integers(0, pool.shape[1] - size_px + 1, 2)
            crop = pool[rng.integers(len(pool)), top : top + size_px, left : left + size_px]
            if rng.random() < 0.5:
                crop = crop[:, ::-1]
            if pool is self.leaves:
                crop = np.rot90(crop, int(rng.integers(4)))
            batch[index] = crop
        batch *= (rng.uniform(0.75, 1.1, (count, 1, 1, 1)) / 127.5).astype(np.float32)
        images = torch.from_numpy(batch).permute(0, 3, 1, 2) - 1.0
        return images.clamp_(-1.0, 1.0)


@dataclass(frozen=True)
class Pool:
    """Location, number and size of the procedural pictures."""

    folder: Path
    leaf_count: int = 480
    scene_count: int = 400
    held_out_count: int = 24
    leaf_px: int = 512
    scene_px: int = 128

    def read(self, seed: int) -> Pictures:
        """Return the training pictures, drawn on first use."""
        return self._read(seed, self.leaf_count, self.scene_count)

    def read_held_out(self, seed: int) -> Pictures:
        """Return pictures of another seed, for validation."""
        return self._read(seed + 1, self.held_out_count, self.held_out_count)

    def _read(self, seed: int, leaf_count: int, scene_count: int) -> Pictures:
        path = self.folder / f"scenes_{seed}_{self.scene_px}_{scene_count}.npy"
        leaves = read_leaf_pool(self.folder, leaf_count, self.leaf_px, seed)
        if not path.is_file():
            parts = []
            for start in tqdm(range(0, scene_count, 8), desc="scenes", unit="8 img"):
                rng = np.random.default_rng((seed, start))
                images, _ = render([draw_scene(rng) for _ in range(min(8, scene_count - start))], self.scene_px)
                parts.append((images * 255.0).round().byte().permute(0, 2, 3, 1).numpy())
            np.save(path, np.concatenate(parts), allow_pickle=False)
        return Pictures(leaves, np.load(path, mmap_mode="r", allow_pickle=False))


class PcaTeacher:
    """Principal components of 8 x 8 color blocks as a strided convolution and its inverse."""

    def __init__(self, images: Tensor, channels: int = LATENT_CHANNELS) -> None:
        """Fit `channels` components on images [n, 3, height, width] with sides that are multiples of 8."""
        blocks = F.unfold(images, STRIDE_PX, stride=STRIDE_PX).transpose(1, 2).reshape(-1, 3 * STRIDE_PX**2).double()
        mean = blocks.mean(dim=0)
        variances, axes = torch.linalg.eigh(torch.cov((blocks - mean).T))
        order = variances.argsort(descending=True)[:channels]
        deviations = variances[order].sqrt()
        gains = deviations**-WHITENING
        gains = gains / (deviations * gains).square().mean().sqrt()
        self.weight = (axes[:, order] * gains).T.reshape(channels, 3, STRIDE_PX, STRIDE_PX).float()
        self.bias = -(self.weight.flatten(1) @ mean.float())
        self.inverse = (axes[:, order] / gains).T.reshape_as(self.weight).float()
        self.mean = mean.float()

    def encode(self, images: Tensor) -> Tensor:
        """Encode [n, 3, h, w] to [n, channels, h / 8, w / 8], zero mean over the fitted images."""
        return F.conv2d(images, self.weight, self.bias, stride=STRIDE_PX)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode [n, channels, h, w] to [n, 3, 8 h, 8 w]."""
        mean = self.mean.view(1, 3, STRIDE_PX, STRIDE_PX).tile(1, 1, codes.shape[2], codes.shape[3])
        return F.conv_transpose2d(codes, self.inverse, stride=STRIDE_PX) + mean


def psnr_db(prediction: Tensor, target: Tensor) -> float:
    """Return the mean PSNR over images in [-1, 1], the prediction clamped and rounded."""
    levels = ((prediction.clamp(-1.0, 1.0) + 1.0) * 127.5).round() / 127.5 - 1.0
    mse = (levels - target).square().flatten(1).mean(dim=1) / 4.0
    return float((-10.0 * mse.log10()).mean())


@torch.no_grad()
def validate(vae: AutoencoderKL, pictures: Pictures) -> dict[str, float]:
    """Return the round-trip PSNR on held-out procedural pictures."""
    scores = {}
    for name, pool, crop_px in (("leaves", pictures.leaves[:6], 256), ("scenes", pictures.scenes[:8], 128)):
        images = torch.from_numpy(np.array(pool[:, :crop_px, :crop_px])).permute(0, 3, 1, 2) / 127.5 - 1.0
        parts = [psnr_db(vae.decode(vae.encode(x).latent_dist.mode()).sample, x) for x in images.split(4)]
        scores[name] = float(np.mean(parts))
    return scores


def batch_shape(progress: float) -> tuple[int, int]:
    """Return batch and crop size in pixels: small crops first, large ones at the end.

    Group norms average over the whole picture, so a network trained on small crops only is 2.5 dB worse on a whole
    photograph than on its tiles.
    """
    if progress < 0.6:
        return 16, 64
    return (8, 96) if progress < 0.8 else (1, 256)


def vae_loss(vae: AutoencoderKL, teacher: PcaTeacher, images: Tensor, progress: float) -> tuple[Tensor, Tensor]:
    """Return the loss of one batch and its picture part."""
    codes = teacher.encode(images)
    teaching = progress < TEACHER_SHARE
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = vae.encoder(images).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20.0, 10.0)
        deviation = torch.exp(0.5 * log_variance)
        latent = codes + CODE_NOISE * torch.randn_like(codes) if teaching else mean + deviation * torch.randn_like(mean)
        decoded = vae.decoder(latent.contiguous(memory_format=torch.channels_last))
    picture = reconstruction(decoded.float(), images)
    kl = 0.5 * (mean.square() + deviation.square() - 1.0 - log_variance).mean()
    weight = 1.0 if teaching else 0.1 * max(0.0, 1.0 - (progress - TEACHER_SHARE) / (1.0 - TEACHER_SHARE))
    copy = (mean - codes).abs().mean() + (mean - codes).square().mean()
    return picture + weight * copy + 3e-5 * kl, picture


def train_steps(state: TrainState, budget: Budget, label: str, quiet: bool = False) -> Iterator[float]:
    """Yield the progress before each step until the budget is spent, with a progress bar."""
    layout = "{l_bar}{bar}| {elapsed}<{remaining} {postfix}"
    with tqdm(total=100.0, desc=label, bar_format=layout, mininterval=5.0, disable=quiet) as bar:
        progress = state.progress(budget)
        bar.update(100.0 * min(1.0, progress))
        while progress < 1.0:
            yield progress
            before, progress = progress, state.progress(budget)
            bar.set_postfix_str(f"step {state.step}", refresh=False)
            bar.update(100.0 * (min(1.0, progress) - before))


def train_vae(
    peers: Peers, out: Path, pool: Pool, budget: Budget, seed: int, resume: bool, channels: int = LATENT_CHANNELS
) -> None:
    """Run teacher phase and end-to-end phase; write `state.pt`, `log.jsonl` and the EMA as `vae/` in `out`.

    May be stopped at any time and resumed.
    """
    torch.manual_seed(seed)
    pictures, held_out = pool.read(seed), pool.read_held_out(seed)
    teacher = PcaTeacher(pictures.crops(np.random.default_rng(seed), 400, 64), channels)
    vae, averaged = make_vae(channels), make_vae(channels)
    optimizer = MuonAdamW(vae.named_parameters(), muon_lr=0.012, adam_lr=1e-3)
    state = TrainState(vae, optimizer, Ema(vae), np.random.default_rng(seed))
    if resume:
        state.read(out / "state.pt")
    if not peers.is_first:
        state.rng = np.random.default_rng((seed, peers.rank, state.step))
        torch.manual_seed(seed + peers.rank + state.step)
    smooth = math.nan
    for progress in train_steps(state, budget, "vae", quiet=not peers.is_first):
        count, size_px = batch_shape(progress)
        images = pictures.crops(state.rng, count // peers.count, size_px)
        loss, picture = vae_loss(vae, teacher, images, progress)
        torch.autograd.backward(loss)
        clock_s = peers.average_gradients(optimizer.weights, state.spent_s)
        optimizer.step(cosine_rate(progress, state.step))
        state.tick(clock_s)
        if not peers.is_first:
            continue
        state.ema.update(vae, state.step)
        smooth = smoothed(smooth, float(picture.detach()))
        if state.is_due(budget, SAVE_EVERY_S):
            write_vae(out, state, averaged, held_out, smooth, is_done=state.progress(budget) >= 1.0)


def write_vae(
    out: Path, state: TrainState, averaged: AutoencoderKL, held_out: Pictures, loss: float, is_done: bool
) -> None:
    """Write the state, a log line and the average as `vae/`; at the end the last weights if they are better.

    Overwrites `averaged`.
    """
    vae = state.network
    assert isinstance(vae, AutoencoderKL)
    state.write(out / "state.pt")
    state.ema.copy_to(averaged)
    scores = keep_better(vae, averaged, held_out) if is_done else validate(averaged, held_out)
    write_log(out, state, {"picture_loss": loss, **scores})
    averaged.save_pretrained(out / "vae")


def keep_better(vae: AutoencoderKL, averaged: AutoencoderKL, held_out: Pictures) -> dict[str, float]:
    """Copy the last weights into `averaged` if they beat it on held-out pictures; return its scores.

    After a cosine to zero the last weights have converged, while the average still contains older ones.
    """
    last, mean = validate(vae, held_out), validate(averaged, held_out)
    if sum(last.values()) > sum(mean.values()):
        averaged.load_state_dict(vae.state_dict())
        return last
    return mean


def write_log(out: Path, state: TrainState, scores: dict[str, float]) -> None:
    """Append one line to `log.jsonl` and print it above the progress bar."""
    line = {"step": state.step, "spent_s": round(state.spent_s, 1), **{k: round(v, 4) for k, v in scores.items()}}
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")
    tqdm.write(json.dumps(line))
