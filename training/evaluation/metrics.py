"""What an evaluation measures: pairs of pictures (PSNR, SSIM) and sets of features (FID, KID).

FID and KID take features that were extracted before, whatever the extractor
(`training/evaluation/feature_extractors.py`). What cannot be measured is a `NotAvailableError` with its reason, and
never a number.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

BORDER_PX = 2  # left out on each side of PSNR and SSIM, as the super-resolution field does
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000


class NotAvailableError(RuntimeError):
    """A metric without its weights, its package or enough samples."""


class Features(Protocol):
    """Features of pictures for FID and KID."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor) -> Tensor:
        """**Shape** [n, 3, height_px, width_px], uint8 -> [n, d], float."""
        ...


class PairDistance(Protocol):
    """A distance between two pictures, such as LPIPS."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """**Shape** both [n, 3, height_px, width_px], uint8 -> [n]."""
        ...


class TextScore(Protocol):
    """How well a picture shows a text, such as CLIP score."""

    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """**Shape** [n, 3, height_px, width_px], uint8 -> [n]."""
        ...


@dataclass(frozen=True)
class Networks:
    """What perceptual metrics look through; in place of a network, why there is none."""

    features: Features | str = "no weights were given (--inception)"
    distance: PairDistance | str = "no weights were given (--lpips)"
    text: TextScore | str = "no weights were given (--clip)"

    def names(self) -> dict[str, str | None]:
        each = {"features": self.features, "distance": self.distance, "text": self.text}
        return {key: None if isinstance(value, str) else value.name for key, value in each.items()}


def to_levels(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as the 8-bit levels that a file would hold; clamped."""
    return ((pictures.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def psnr_db(image: Tensor, target: Tensor, border_px: int = BORDER_PX) -> float:
    """Peak signal-to-noise ratio over all channels of RGB pictures in [0, 1]; infinite for equal ones.

    **Shape** both [n, 3, height_px, width_px], uint8.

    **Raises** ValueError: shapes differ, or nothing is left inside the border.
    """
    inside, expected = (_inner(values, border_px).double() / 255.0 for values in _alike(image, target))
    mse = float((inside - expected).square().mean())
    return math.inf if mse == 0.0 else -10.0 * math.log10(mse)


def ssim(image: Tensor, target: Tensor, border_px: int = BORDER_PX) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 px, sigma 1.5, RGB in [0, 1]; by torchmetrics.

    **Raises** ValueError: as `psnr_db`, or a side is below the window.
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
    """What torchmetrics takes for a feature network when the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(features: Tensor, targets: Tensor) -> float:
    """Frechet distance of the Gaussians that fit two sets of features (Heusel et al. 2017), by torchmetrics.

    With no more samples than features the covariances are singular and the value is biased upwards: it compares
    methods on the same set, and nothing else.

    **Shape** [n, d] and [m, d].

    **Raises** NotAvailableError: a set has less than two samples, or features that are not finite.
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
    """Squared maximum mean discrepancy with the cubic kernel (x.y / d + 1)^3 over random subsets, by torchmetrics.

    **Ref** Binkowski et al. 2018; unbiased, so it may be negative.

    **Shape** [n, d] and [m, d].

    **Raises** NotAvailableError: a subset would be larger than a set, or features are not finite.

    **Effects** leaves torch's generator as it was.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    _check_features(features, targets, max(subset_size, 2), f"KID over subsets of {subset_size}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features: they are in memory already
        metric = KernelInceptionDistance(_AsTheyAre(features.shape[1]), subsets=subsets, subset_size=subset_size)
    metric.update(targets.double(), real=True)
    metric.update(features.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return Kid(float(mean), float(std))


def _check_features(features: Tensor, targets: Tensor, least: int, what: str) -> None:
    if features.dim() != 2 or targets.dim() != 2 or features.shape[1] != targets.shape[1]:
        raise ValueError(f"features are [n, d]; found {list(features.shape)} and {list(targets.shape)}")
    fewest = min(len(features), len(targets))
    if fewest < least:
        raise NotAvailableError(f"{what} needs {least} samples a set; there are {fewest}")
    if not bool(features.isfinite().all() and targets.isfinite().all()):
        raise NotAvailableError(f"{what}: features are not finite")


def crop_places(
    height_px: int, width_px: int, side_px: int, count: int, seed: int, index: int
) -> list[tuple[int, int]]:
    """Top and left of random squares in the picture number `index`; the same for every method.

    **Raises** NotAvailableError: the picture is smaller.
    """
    if min(height_px, width_px) < side_px:
        raise NotAvailableError(f"patches of {side_px} px do not fit into a picture of {height_px}x{width_px} px")
    rng = np.random.default_rng((seed, index))
    tops = rng.integers(0, height_px - side_px + 1, count)
    lefts = rng.integers(0, width_px - side_px + 1, count)
    return [(int(top), int(left)) for top, left in zip(tops, lefts, strict=True)]


def crop(image: Tensor, places: Sequence[tuple[int, int]], side_px: int) -> Tensor:
    """**Shape** [1, 3, height_px, width_px] -> [places, 3, side_px, side_px]."""
    return torch.cat([image[..., top : top + side_px, left : left + side_px] for top, left in places])
