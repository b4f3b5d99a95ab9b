"""Compare the distributions of latents and pictures with the true large ones, as table 5 of arXiv 2511.10629 does.

The mean and deviation of each channel of every picture are pooled over channels and pictures (D.1). The paper gives one
number per domain and no formula. Here: Wasserstein-1 distance and Jensen-Shannon divergence (base 2, kernel density
estimates) of the pooled means and of the pooled deviations, their average, and the relative difference of the mean
variance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
GRID = 1024  # points at which densities are compared
TAIL = 4.0  # kernel bandwidths beyond the outermost sample


@dataclass(frozen=True)
class Pool:
    """Mean and deviation of each channel per picture; both [pictures, channels]."""

    means: Floats
    deviations: Floats


def pool(pictures: Sequence[Tensor]) -> Pool:
    """Pool maps [1, channels, height, width]; heights and widths may differ."""
    means = np.stack([picture.double().mean(dim=(0, 2, 3)).cpu().numpy() for picture in pictures])
    deviations = [picture.double().std(dim=(0, 2, 3), correction=0).cpu().numpy() for picture in pictures]
    return Pool(means, np.stack(deviations))


@dataclass(frozen=True)
class Gap:
    """Distances of two pools in the units of the values; `jsd` in bits, `variance_gap` relative."""

    wasserstein: float
    wasserstein_means: float
    wasserstein_deviations: float
    jsd: float
    jsd_means: float
    jsd_deviations: float
    variance_gap: float


def compare(actual: Pool, expected: Pool) -> Gap:
    """Return the gap between a method's values and the true ones."""
    pairs = ((actual.means, expected.means), (actual.deviations, expected.deviations))
    w_means, w_deviations = (wasserstein(one.ravel(), two.ravel()) for one, two in pairs)
    jsd_means, jsd_deviations = (jensen_shannon(one.ravel(), two.ravel()) for one, two in pairs)
    variance, true_variance = (float(np.square(sample.deviations).mean()) for sample in (actual, expected))
    gap = 0.0 if variance == true_variance else abs(variance - true_variance) / true_variance
    return Gap(
        wasserstein=(w_means + w_deviations) / 2,
        wasserstein_means=w_means,
        wasserstein_deviations=w_deviations,
        jsd=(jsd_means + jsd_deviations) / 2,
        jsd_means=jsd_means,
        jsd_deviations=jsd_deviations,
        variance_gap=gap,
    )


def wasserstein(one: Floats, two: Floats) -> float:
    """Return the Wasserstein-1 distance of samples [n] and [m]: the area between their distribution functions."""
    values = np.sort(np.concatenate([one, two]))
    below_one, below_two = (np.searchsorted(np.sort(x), values[:-1], side="right") / len(x) for x in (one, two))
    area: np.float64 = np.sum(np.abs(below_one - below_two) * np.diff(values))
    return float(area)


def bandwidth(samples: Floats) -> float:
    """Return Scott's bandwidth in one dimension, with a floor for constant samples."""
    spread = float(samples.std(ddof=1)) if len(samples) > 1 else 0.0
    floor = 1e-6 * max(1.0, float(np.abs(samples).max()))
    return max(float(spread * len(samples) ** -0.2), floor)


def density(samples: Floats, grid: Floats) -> Floats:
    """Return the Gaussian kernel density estimate at the grid points."""
    width = bandwidth(samples)
    z = (grid[:, None] - samples[None]) / width
    estimate: Floats = np.exp(-0.5 * np.square(z)).mean(axis=1) / (width * np.sqrt(2.0 * np.pi))
    return estimate


def grid_over(*samples: Floats) -> Floats:
    """Return grid points that cover nearly all of every sample's density."""
    low = min(float(sample.min()) - TAIL * bandwidth(sample) for sample in samples)
    high = max(float(sample.max()) + TAIL * bandwidth(sample) for sample in samples)
    return np.linspace(low, high, GRID)


def jensen_shannon(one: Floats, two: Floats) -> float:
    """Return the Jensen-Shannon divergence of the samples' densities in bits: 0 if equal, 1 without overlap."""
    grid = grid_over(one, two)
    shares = [density(sample, grid) for sample in (one, two)]
    if any(share.sum() == 0.0 for share in shares):  # a sample so narrow that it falls between grid points
        return 0.0 if np.array_equal(np.sort(one), np.sort(two)) else 1.0
    p, q = (share / share.sum() for share in shares)
    middle = (p + q) / 2.0
    return float(sum(np.sum(x[x > 0] * np.log2(x[x > 0] / middle[x > 0])) for x in (p, q)) / 2.0)
