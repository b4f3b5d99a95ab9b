"""Score averaged weights on held-out tiles during a run, with sample pictures.

`training/run.py` calls it periodically; `training/evaluation/evaluate.py` is the full report on finished weights.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.lua.network import Lua
from giantleap.models.pixels.images import psnr_db
from giantleap.models.vae.autoencoder import Vae
from giantleap.training.data.pairs_store import PairsStore

SAMPLES = 4  # tiles on a sheet
MAX_DB = 100.0  # cap per tile, so that one perfect tile does not dominate the mean


@torch.no_grad()
def evaluate(net: Lua, vae: Vae, store: PairsStore, tiles: Sequence[int]) -> tuple[dict[str, float], Tensor]:
    """Measure averaged weights on held-out tiles.

    Returns:
        By scale the latent L1, the PSNR in dB of the decoded picture against the decoded large latent, and its gain
        over decode-then-bicubic; and a sheet [3, height_px, width_px] in [-1, 1] of the first tiles: target, then
        bicubic and LUA for each scale.
    """
    scores: dict[str, list[float]] = {}
    rows: list[Tensor] = []
    for tile in tiles:
        latents = {level: tensor.to(vae.device) for level, tensor in store.read([tile]).items()}
        target = vae.decode(latents[1]).clamp(-1.0, 1.0)
        pictures = [target]
        for scale in net.spec.scales:
            upscaled = net(latents[scale], scale)
            picture = vae.decode(upscaled).clamp(-1.0, 1.0)
            size = (target.shape[-2], target.shape[-1])
            bicubic = F.interpolate(vae.decode(latents[scale]), size=size, mode="bicubic").clamp(-1.0, 1.0)
            psnr = psnr_db(picture, target, MAX_DB)
            scores.setdefault(f"x{scale}_held_out_latent_l1", []).append(float((upscaled - latents[1]).abs().mean()))
            scores.setdefault(f"x{scale}_held_out_psnr_db", []).append(psnr)
            scores.setdefault(f"x{scale}_held_out_gain_db", []).append(psnr - psnr_db(bicubic, target, MAX_DB))
            pictures += [bicubic, picture]
        if len(rows) < SAMPLES:
            rows.append(torch.cat(pictures, dim=3)[0].cpu())
    return {name: sum(values) / len(values) for name, values in scores.items()}, torch.cat(rows, dim=1)
