"""Cases of `giantleap train evaluate`: pictures of a folder, or held-out pairs, one at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.pixels.images import to_signed
from giantleap.models.pixels.rgb import DAMAGE, open_picture, to_rgb
from giantleap.models.vae.autoencoder import Vae
from giantleap.training.data.frozen_vae import vae_hash
from giantleap.training.data.pairs_store import PairsStore
from giantleap.training.data.prepare import SUFFIXES, is_hidden, to_name, to_reason
from giantleap.training.evaluation.metrics import to_levels


class EvaluationError(ValueError):
    """The evaluation is not possible with these inputs."""


@dataclass(frozen=True)
class Case:
    """One picture: `target` [1, 3, height_px, width_px] in [-1, 1], raw latents [1, channels, h, w] by level."""

    name: str
    target: Tensor
    latents: Mapping[int, Tensor]
    is_photo: bool
    caption: str | None = None


def open_pairs(folder: Path, bundle: Bundle) -> PairsStore:
    """Open a store of the bundle's VAE.

    Raises:
        EvaluationError: It was made with another VAE.
        PairsError: The store cannot be read.
    """
    store = PairsStore.open(folder)
    if store.summary["vae_sha256"] != vae_hash(bundle):
        raise EvaluationError(f"{folder}: these pairs were made with another VAE than that of bundle {bundle.name}")
    return store


def read_pairs(store: PairsStore, tiles: int, vae: Vae) -> Iterator[Case]:
    """Yield the first pairs of a store; the targets are the decoded large latents."""
    for tile in range(tiles):
        latents = {level: values.to(vae.device) for level, values in store.read([tile]).items()}
        yield Case(f"tile {tile}", vae.decode(latents[1]), latents, is_photo=False)


def list_pictures(folder: Path) -> list[Path]:
    """List the pictures of a folder by name.

    Raises:
        EvaluationError: There is none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    pictures = [path for path in paths if not is_hidden(path.relative_to(folder))]
    if not pictures:
        raise EvaluationError(f"{folder}: no picture ({', '.join(SUFFIXES)}) is there; name a folder with some")
    return pictures


def read_pictures(
    paths: Sequence[Path], bundle: Bundle, vae: Vae, scales: Sequence[int], crop_px: int | None
) -> Iterator[Case]:
    """Yield pictures with their captions; each is its own target.

    Raises:
        EvaluationError: A picture is damaged or too small, or a caption is not UTF-8.
    """
    multiple_px = bundle.latent_space.multiple_px * max(scales)
    for path in paths:
        picture = read_picture(path, crop_px, multiple_px).to(vae.device)
        latents = {level: vae.encode(shrink(picture, level)) for level in (1, *scales)}
        yield Case(to_name(Path(path.name)), picture, latents, is_photo=True, caption=_read_caption(path))


def _read_caption(picture: Path) -> str | None:
    path = picture.with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8-sig").strip() if path.is_file() else None
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{to_name(path)}: the caption is not UTF-8; save it as UTF-8") from error


def read_picture(path: Path, crop_px: int | None, multiple_px: int) -> Tensor:
    """Read the upright center of a picture, sides multiples of `multiple_px`: [1, 3, height_px, width_px] in [-1, 1].

    Raises:
        EvaluationError: The picture is damaged or too small.
    """
    try:
        with open_picture(path.read_bytes())[0] as opened:
            pixels = np.array(to_rgb(opened))
    except DAMAGE as error:
        raise EvaluationError(f"{to_name(path)}: {to_reason(error)}; remove or replace it") from error
    height, width = (min(side, crop_px or side) // multiple_px * multiple_px for side in pixels.shape[:2])
    if not height or not width:
        raise EvaluationError(
            f"{to_name(path)}: {pixels.shape[1]}x{pixels.shape[0]} px is less than {multiple_px} px a side"
        )
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return to_signed(torch.from_numpy(np.ascontiguousarray(pixels[top : top + height, left : left + width])))[None]


def shrink(picture: Tensor, scale: int) -> Tensor:
    """Reduce a picture by an integer: antialiased bicubic, rounded to 8-bit levels; 1 returns it unchanged."""
    if scale == 1:
        return picture
    small = F.interpolate(picture, scale_factor=1.0 / scale, mode="bicubic", antialias=True)
    return to_levels(small).float() / 127.5 - 1.0
