"""Enlarge a small picture by every method of the pocket bundle and by resizing, and compare with the large one.

The rival that counts is `resized`: decode the small latent, then resize the picture (bicubic). Latents do not survive
interpolation, so beating `latent bicubic` proves little.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.engines.swinir import PixelUpscaler
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.network import Lua
from giantleap.models.vae.autoencoder import read_vae_model
from giantleap.training.evaluation import metrics
from giantleap.training.evaluation.metrics import NotAvailableError
from giantleap.training.evaluation.perceptual import Jod, flip, ms_ssim

SCALES = (2, 4)
METHODS = ("lua", "resized", "swinir", "latent bicubic")
CPU = torch.device("cpu")

Scores = dict[str, dict[str, float]]  # method -> metric -> value


@dataclass(frozen=True)
class Networks:
    """The parts of a bundle that enlarge; pictures are [1, 3, height, width] in [-1, 1]."""

    vae: Any
    lua: Lua
    swinir: PixelUpscaler

    @classmethod
    def open(cls, directory: Path, lua: Path | None = None) -> Self:
        """Open a bundle in float32, with other LUA weights where a file is given."""
        bundle = read_bundle(directory)
        files = {scale: directory / f"swinir_x{scale}.safetensors" for scale in SCALES}
        adapter = read_lua(lua or directory / "lua.safetensors").float()
        vae = read_vae_model(bundle, CPU, torch.float32).eval()
        return cls(vae, adapter, PixelUpscaler.open(files, CPU, torch.float32))

    @torch.no_grad()
    def round_trip(self, picture: Tensor) -> Tensor:
        """Encode and decode."""
        return self._decode(self._encode(picture))

    @torch.no_grad()
    def enlarge(self, small: Tensor, scale: int) -> dict[str, Tensor]:
        """Enlarge by each of `METHODS`; all start at the latent of the small picture."""
        latent = self._encode(small)
        decoded = self._decode(latent)
        return {
            "lua": self._decode(self.lua(latent, scale)),
            "resized": _resize(decoded, scale).clamp(-1.0, 1.0),
            "swinir": self.swinir.upscale(decoded / 2.0 + 0.5, scale) * 2.0 - 1.0,
            "latent bicubic": self._decode(_resize(latent, scale)),
        }

    def _encode(self, picture: Tensor) -> Tensor:
        latent: Tensor = self.vae.encode(picture).latent
        return latent

    def _decode(self, latent: Tensor) -> Tensor:
        picture: Tensor = self.vae.decode(latent).sample
        return picture.clamp(-1.0, 1.0)


def _resize(maps: Tensor, scale: int) -> Tensor:
    return F.interpolate(maps, scale_factor=float(scale), mode="bicubic")


def psnr_db(picture: Tensor, original: Tensor) -> float:
    """Peak signal-to-noise ratio over all channels of 8-bit pictures; both in [-1, 1]."""
    return metrics.psnr_db(metrics.to_levels(picture), metrics.to_levels(original), border_px=0)


def open_jod() -> Jod | None:
    """Open ColorVideoVDP; None where it is not installed."""
    with suppress(NotAvailableError):
        return Jod()
    return None


def score(pictures: dict[str, Tensor], original: Tensor, jod: Jod | None = None) -> Scores:
    """Return the metrics of every picture, JOD if it is given; all but FLIP are better when larger."""
    expected = metrics.to_levels(original)
    scores: Scores = {}
    for name, picture in pictures.items():
        seen = metrics.to_levels(picture)
        scores[name] = {
            "psnr_db": psnr_db(picture, original),
            "ms_ssim": ms_ssim(seen, expected),
            "flip": flip(seen, expected),
        } | ({} if jod is None else {"jod": jod(seen, expected)})
    return scores


def mean_scores(scores: list[Scores]) -> Scores:
    """Return the mean of every metric over pictures."""
    return {
        name: {metric: sum(each[name][metric] for each in scores) / len(scores) for metric in scores[0][name]}
        for name in scores[0]
    }
