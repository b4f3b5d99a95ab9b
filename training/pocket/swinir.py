"""Train the pocket bundle's pixel-space SwinIR networks, one per scale, on the adapter's pictures.

In use they upscale images that the pocket autoencoder decoded, so half of the inputs pass it and half are clean; the
target is the picture at full size, the loss L1. The network is an RGB `Lua` that starts as bicubic interpolation; its
file has the published single-head layout, which `models/engines/swinir.py` opens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from giantleap.models.atomic_file import replace_file
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.network import Lua, LuaSpec, ScaleHead
from giantleap.models.lua.released_layouts import RGB_MEAN
from giantleap.training.evaluation.cases import shrink
from giantleap.training.optim import Budget, Ema, MuonAdamW, cosine_rate
from giantleap.training.pocket.autoencoder import psnr_db
from giantleap.training.pocket.state import TrainState, smoothed, train_steps, write_log

Pixels = NDArray[np.uint8]

CROP_PX = 32  # side of a small crop: four windows
BATCH = 8
DECODED_SHARE = 0.5  # share of the inputs
MUON_LR = 0.01
EMA_DECAY = 0.998
SAVE_EVERY_S = 90.0
# Catmull-Rom at 0.75, 0.25 and 1.25 px; the fourth tap, -0.023, does not fit a 3x3 convolution.
DOUBLING = ((0.2266, 0.8672, -0.0703), (-0.0703, 0.8672, 0.2266))


def swinir_spec(scale: int) -> LuaSpec:
    """Return the spec (273 or 310 thousand weights); heads of width 16 train 1.4 times as fast as of width 8."""
    return LuaSpec(3, 48, (4, 4), 3, window=8, num_feat=32, scales=(scale,), image_mean=RGB_MEAN)


@torch.no_grad()
def start_as_bicubic(net: Lua) -> None:
    """Initialize the network as nearly bicubic interpolation, because SwinIR has no global skip.

    Three features carry red, green and blue past the blocks; six channels carry them and their negatives through the
    LeakyReLU, since leaky(v) - leaky(-v) = 1.01 v; the convolutions before the pixel shuffles contain the taps.
    """
    rgb = torch.arange(3)
    head = cast(ScaleHead, net.heads[f"x{net.spec.scales[0]}"])
    before = cast(nn.Conv2d, head.conv_before[0])
    doublings = [module for module in head.upsample if isinstance(module, nn.Conv2d)]
    for conv, rows in ((net.conv_first, 3), (net.conv_after_body, 3), (before, 6), *((c, 12) for c in doublings)):
        conv.weight[:rows] = 0.0
        cast(Tensor, conv.bias)[:rows] = 0.0
    nn.init.zeros_(head.conv_last.weight)
    nn.init.zeros_(cast(Tensor, head.conv_last.bias))
    for conv in (net.conv_first, before, head.conv_last):
        conv.weight[rgb, rgb, 1, 1] = 1.0
    before.weight[rgb + 3, rgb, 1, 1] = -1.0
    taps = torch.tensor(DOUBLING) / sum(DOUBLING[0])
    for place, conv in enumerate(doublings):
        for phase in range(4):
            kernel = torch.outer(taps[phase // 2], taps[phase % 2])
            conv.weight[4 * rgb + phase, rgb] = kernel if place else kernel / 1.01
            if place == 0:
                conv.weight[4 * rgb + phase, rgb + 3] = -kernel / 1.01


@dataclass(frozen=True)
class PicturePairs:
    """Large pictures [n, side, side, 3] and their reductions, clean and as the VAE decodes them."""

    large: Pixels
    clean: Pixels
    decoded: Pixels

    @property
    def scale(self) -> int:
        """Scale between small and large pictures."""
        return int(self.large.shape[1] // self.clean.shape[1])

    def draw(self, rng: np.random.Generator, count: int, crop_px: int) -> tuple[Tensor, Tensor]:
        """Cut aligned crops, mirrored and turned at random.

        Returns:
            Small [count, 3, crop_px, crop_px] and large [count, 3, scale * crop_px, scale * crop_px], in [0, 1].
        """
        scale, last = self.scale, self.clean.shape[1] - crop_px
        small: list[Pixels] = []
        large: list[Pixels] = []
        for index in rng.integers(0, len(self.clean), count):
            source = self.decoded if rng.random() < DECODED_SHARE else self.clean
            top, left = (int(v) for v in rng.integers(0, last + 1, 2))
            turns, mirrored = int(rng.integers(4)), rng.random() < 0.5
            for pictures, factor, crops in ((source, 1, small), (self.large, scale, large)):
                rows = slice(factor * top, factor * (top + crop_px))
                columns = slice(factor * left, factor * (left + crop_px))
                crop = np.rot90(pictures[index, rows, columns], turns)
                crops.append(crop[:, ::-1] if mirrored else crop)
        return to_images(np.stack(small)), to_images(np.stack(large))


def to_images(pixels: Pixels) -> Tensor:
    """Convert [n, height, width, 3], 0 to 255, to [n, 3, height, width] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2) / 255.0


def _to_pixels(images: Tensor) -> Pixels:
    """Convert pictures in [-1, 1] to bytes."""
    levels: Pixels = ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return levels


@torch.no_grad()
def read_pairs(vae: AutoencoderDC, files: Sequence[Path], scale: int) -> PicturePairs:
    """Read square pictures of one size, reduce them, and pass the reductions through the autoencoder."""
    large, clean, decoded = [], [], []
    for file in tqdm(files, desc=f"pairs x{scale}", unit="img", mininterval=5.0):
        images = to_images(np.array(Image.open(file).convert("RGB"))[None]) * 2.0 - 1.0
        small = shrink(images, scale)
        large.append(_to_pixels(images))
        clean.append(_to_pixels(small))
        decoded.append(_to_pixels(vae.decode(vae.encode(small).latent).sample))
    return PicturePairs(np.concatenate(large), np.concatenate(clean), np.concatenate(decoded))


def write_swinir(path: Path, net: Lua) -> None:
    """Write the published single-head layout in float16, without computed buffers (masks, indices), atomically."""
    (scale,) = net.spec.scales
    moves = {"conv_before.": "conv_before_upsample.", "upsample.": "upsample.", "conv_last.": "conv_last."}
    weights = {}
    for key, value in net.state_dict().items():
        own = key.removeprefix(f"heads.x{scale}.")
        name = (
            own
            if own == key
            else next(new + own.removeprefix(old) for old, new in moves.items() if own.startswith(old))
        )
        weights[name] = value.half().contiguous()
    provenance = {"trained_by": "python -m giantleap.training.pocket swinir", "license": "Apache-2.0"}
    replace_file(path, save(weights, provenance))


@torch.no_grad()
def validate(net: Lua, pairs: PicturePairs) -> dict[str, float]:
    """Return PSNR on held-out pairs of both kinds, and its gain over bicubic."""
    scores = {}
    target = to_images(pairs.large) * 2.0 - 1.0
    for name, pixels in (("clean", pairs.clean), ("decoded", pairs.decoded)):
        small = to_images(pixels)
        upscaled = torch.cat([net(part, pairs.scale) for part in small.split(4)])
        bicubic = F.interpolate(small, scale_factor=float(pairs.scale), mode="bicubic")
        scores[name] = psnr_db(upscaled * 2.0 - 1.0, target)
        scores[f"{name}_gain"] = scores[name] - psnr_db(bicubic * 2.0 - 1.0, target)
    return scores


def train_swinir(
    out: Path, pairs: PicturePairs, held_out: PicturePairs, start: Path | None, budget: Budget, seed: int, resume: bool
) -> None:
    """Train the network of one scale; write `state.pt`, `log.jsonl` and the averaged weights as `swinir_x<scale>`.

    May be stopped at any time and resumed. `start` is the file of another scale whose trunk initializes this network.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    scale = pairs.scale
    net, averaged = Lua(swinir_spec(scale)), Lua(swinir_spec(scale)).eval()
    start_as_bicubic(net)
    if start is not None:
        trunk = {k: v for k, v in read_lua(start).state_dict().items() if not k.startswith("heads.")}
        net.load_state_dict(trunk, strict=False)
    net.train()
    optimizer = MuonAdamW(net.named_parameters(), MUON_LR, MUON_LR * 0.1, ("conv_last", "bias_table", "conv_first"))
    state = TrainState(net, optimizer, Ema(net, EMA_DECAY), np.random.default_rng((seed, scale, 1)))
    if resume:
        state.read(out / "state.pt")
    smooth = math.nan
    for progress in train_steps(state, budget):
        small, large = pairs.draw(state.rng, BATCH, CROP_PX)
        with torch.autocast("cpu", torch.bfloat16):
            upscaled = net(small, scale)
        loss = (upscaled.float() - large).abs().mean()
        torch.autograd.backward(loss)
        optimizer.step(cosine_rate(progress, state.step))
        state.ema.update(net, state.step)
        state.tick()
        smooth = smoothed(smooth, float(loss.detach()))
        if state.is_due(budget, SAVE_EVERY_S):
            state.write(out / "state.pt")
            state.ema.copy_to(averaged)
            write_log(out, state, {"loss": smooth, **validate(averaged, held_out)})
            write_swinir(out / f"swinir_x{scale}.safetensors", averaged)
