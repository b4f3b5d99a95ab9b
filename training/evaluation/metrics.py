"""Metrics on pairs of pictures (PSNR, SSIM) and on sets of features (FID, KID).

FID and KID take features of any extractor (`training/evaluation/feature_extractors.py`). A metric that cannot be
computed raises `NotAvailableError` with the reason.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

BORDER_PX = 2  # excluded border for PSNR and SSIM, the convention in super-resolution
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000


class NotAvailableError(RuntimeError):
    """A metric lacks its weights, its package or enough samples."""


class Features(Protocol):
    """Extractor of features for FID and KID."""

    @property
    def name(self) -> str:
        """Name in the report."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 pictures [n, 3, height_px, width_px] to features [n, d], float."""
        ...


class PairDistance(Protocol):
    """Distance between two pictures, such as LPIPS."""

    @property
    def name(self) -> str:
        """Name in the report."""
        ...

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Map two batches of uint8 pictures [n, 3, height_px, width_px] to distances [n]."""
        ...


class TextScore(Protocol):
    """Agreement of pictures with texts, such as CLIP score."""

    @property
    def name(self) -> str:
        """Name in the report."""
        ...

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Map uint8 pictures [n, 3, height_px, width_px] and texts to scores [n]."""
        ...


@dataclass(frozen=True)
class Networks:
    """Networks of the perceptual metrics, or the reason why one is missing."""

    features: Features | str = "no weights were given (--inception)"
    distance: PairDistance | str = "no weights were given (--lpips)"
    text: TextScore | str = "no weights were given (--clip)"

    def names(self) -> dict[str, str | None]:
        """Return the name of each network, None where it is missing."""
        networks = {"features": self.features, "distance": self.distance, "text": self.text}
        return {key: None if isinstance(value, str) else value.name for key, value in networks.items()}


def to_levels(pictures: Tensor) -> Tensor:
    """Convert pictures in [-1, 1] to 8-bit levels, clamped."""
    return ((pictures.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def psnr_db(image: Tensor, target: Tensor, border_px: int = BORDER_PX) -> float:
    """Return the peak signal-to-noise ratio of uint8 RGB pictures [n, 3, height_px, width_px]; infinite if equal.

    Raises:
        ValueError: Shapes differ, or nothing is left inside the border.
    """
    inside, expected = (_inner(values, border_px).double() / 255.0 for values in _alike(image, target))
    mse = float((inside - expected).square().mean())
    return math.inf if mse == 0.0 else -10.0 * math.log10(mse)


def ssim(image: Tensor, target: Tensor, border_px: int = BORDER_PX) -> float:
    """Return the structural similarity (Wang et al. 2004): Gaussian window of 11 px, sigma 1.5, RGB in [0, 1].

    Raises:
        ValueError: As `psnr_db`, or a side is below the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    inside, expected = (_inner(values, border_px).double() / 255.0 for values in _alike(image, target))
    if min(inside.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs sides of 11 px inside a border of {border_px}; found {list(image.shape[-2:])}")
    value = structural_similarity_index_measure(inside, expected, data_range=1.0)
    return float(value if isinstance(value, Tensor) else value[0])


def _alike(image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if image.shape != target.shape or image.dtype != torch.uint8 or target.dtype != torch.uint8:
        raise ValueError(
            f"found {image.dtype} {list(image.shape)} and {target.dtype} {list(target.shape)}; expected equal uint8"
        )
    return image, target


def _inner(values: Tensor, border_px: int) -> Tensor:
    height, width = values.shape[-2:]
    if min(height, width) <= 2 * border_px:
        raise ValueError(f"nothing of {height}x{width} px is left inside a border of {border_px} px")
    return values[..., border_px : height - border_px, border_px : width - border_px]


class _AsTheyAre(nn.Module):
    """Identity in place of torchmetrics' feature network, for precomputed features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(features: Tensor, targets: Tensor) -> float:
    """Return the Frechet distance of Gaussians fitted to features [n, d] and [m, d] (Heusel et al. 2017).

    With no more samples than features the covariances are singular and the value is biased upwards: it only compares
    methods on the same set.

    Raises:
        NotAvailableError: A set has fewer than two samples or non-finite features.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    _check_features(features, targets, 2, "FID")
    metric = FrechetInceptionDistance(_AsTheyAre(features.shape[1]))
    metric.update(targets.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


@dataclass(frozen=True)
class Kid:
    """Mean and standard deviation over the subsets."""

    mean: float
    std: float


def kid(
    features: Tensor, targets: Tensor, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET_SIZE, seed: int = 0
) -> Kid:
    """Return the squared maximum mean discrepancy of [n, d] and [m, d] over random subsets.

    Cubic kernel (x.y / d + 1)^3, Binkowski et al. 2018; unbiased, so it may be negative. torch's generator state is
    restored.

    Raises:
        NotAvailableError: A subset would be larger than a set, or features are not finite.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    _check_features(features, targets, max(subset_size, 2), f"KID over subsets of {subset_size}")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # torchmetrics warns that it keeps all features; they are in memory already
        metric = KernelInceptionDistance(_AsTheyAre(features.shape[1]), subsets=subsets, subset_size=subset_size)
    metric.update(targets.double(), real=True)
    metric.update(features.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return Kid(float(mean), float(std))


def _check_features(features: Tensor, targets: Tensor, min_samples: int, what: str) -> None:
    if features.dim() != 2 or targets.dim() != 2 or features.shape[1] != targets.shape[1]:
        raise ValueError(f"features are [n, d]; found {list(features.shape)} and {list(targets.shape)}")
    samples = min(len(features), len(targets))
    if samples < min_samples:
        raise NotAvailableError(f"{what} needs {min_samples} samples a set; there are {samples}")
    if not bool(features.isfinite().all() and targets.isfinite().all()):
        raise NotAvailableError(f"{what}: features are not finite")


def crop_places(
    height_px: int, width_px: int, side_px: int, count: int, seed: int, index: int
) -> list[tuple[int, int]]:
    """Return top and left of random squares in picture `index`, equal for every method.

    Raises:
        NotAvailableError: The picture is smaller than a square.
    """
    if min(height_px, width_px) < side_px:
        raise NotAvailableError(f"patches of {side_px} px do not fit into a picture of {height_px}x{width_px} px")
    rng = np.random.default_rng((seed, index))
    tops = rng.integers(0, height_px - side_px + 1, count)
    lefts = rng.integers(0, width_px - side_px + 1, count)
    return [(int(top), int(left)) for top, left in zip(tops, lefts, strict=True)]


def crop(image: Tensor, places: Sequence[tuple[int, int]], side_px: int) -> Tensor:
    """Crop [1, 3, height_px, width_px] to [places, 3, side_px, side_px]."""
    return torch.cat([image[..., top : top + side_px, left : left + side_px] for top, left in places])
