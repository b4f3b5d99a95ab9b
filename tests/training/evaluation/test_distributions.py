"""Distances of distributions at values that are known, and against SciPy."""

import numpy as np
import pytest
import torch
from scipy import stats

from giantleap.training.evaluation.distributions import (
    Pool,
    compare,
    density,
    grid_over,
    jensen_shannon,
    pool,
    wasserstein,
)

RNG = np.random.default_rng(0)
SAMPLE = RNG.standard_normal(400)


def test_wasserstein_of_a_shifted_sample_is_the_shift() -> None:
    assert wasserstein(SAMPLE + 0.75, SAMPLE) == pytest.approx(0.75)
    assert wasserstein(SAMPLE, SAMPLE) == 0.0
    assert wasserstein(np.array([0.0]), np.array([0.0, 1.0, 5.0])) == pytest.approx(2.0)


def test_wasserstein_is_that_of_scipy() -> None:
    for count in (1, 3, 57, 400):
        other = 2.0 * RNG.standard_normal(count) + 1.0
        assert wasserstein(SAMPLE, other) == pytest.approx(stats.wasserstein_distance(SAMPLE, other))


def test_density_is_that_of_scipy() -> None:
    grid = np.linspace(-4.0, 4.0, 50)
    np.testing.assert_allclose(density(SAMPLE, grid), stats.gaussian_kde(SAMPLE)(grid), rtol=1e-9)
    wide = grid_over(SAMPLE)
    assert np.sum(density(SAMPLE, wide)) * (wide[1] - wide[0]) == pytest.approx(1.0, abs=1e-3)


def test_divergence_goes_from_zero_to_one_bit() -> None:
    assert jensen_shannon(SAMPLE, SAMPLE) == pytest.approx(0.0, abs=1e-12)
    assert jensen_shannon(SAMPLE, SAMPLE + 100.0) == pytest.approx(1.0, abs=1e-9)
    near, far = (jensen_shannon(SAMPLE, SAMPLE + shift) for shift in (0.5, 1.5))
    assert 0.0 < near < far < 1.0
    assert jensen_shannon(SAMPLE, SAMPLE + 0.5) == pytest.approx(jensen_shannon(SAMPLE + 0.5, SAMPLE))


def test_divergence_of_two_gaussians_is_that_of_their_integral() -> None:
    one, two = (stats.norm.ppf((np.arange(4000) + 0.5) / 4000) + shift for shift in (0.0, 2.0))
    x = np.linspace(-8, 10, 20_001)
    p, q = stats.norm.pdf(x), stats.norm.pdf(x, 2.0)
    m = (p + q) / 2
    expected = np.trapezoid(p * np.log2(p / m) + q * np.log2(q / m), x) / 2
    assert jensen_shannon(one, two) == pytest.approx(expected, rel=0.06), "the kernel widens both a little"


def test_samples_without_any_spread_are_distinguished() -> None:
    assert jensen_shannon(np.zeros(5), np.zeros(5)) == pytest.approx(0.0, abs=1e-9)
    assert jensen_shannon(np.zeros(5), np.full(5, 7.0)) == pytest.approx(1.0)


def test_a_pool_has_mean_and_deviation_of_every_channel() -> None:
    pictures = [torch.arange(8.0).view(1, 2, 2, 2), torch.full((1, 2, 3, 5), 4.0)]
    found = pool(pictures)
    np.testing.assert_allclose(found.means, [[1.5, 5.5], [4.0, 4.0]])
    np.testing.assert_allclose(found.deviations, [[np.sqrt(1.25)] * 2, [0.0, 0.0]])


def test_the_gap_of_pools_is_that_of_means_deviations_and_variances() -> None:
    expected = Pool(RNG.standard_normal((9, 4)), np.full((9, 4), 2.0))
    found = Pool(expected.means + 0.3, np.full((9, 4), 1.0))
    gap = compare(found, expected)
    assert (gap.wasserstein_means, gap.wasserstein_deviations) == pytest.approx((0.3, 1.0))
    assert gap.wasserstein == pytest.approx(0.65)
    assert gap.variance_gap == pytest.approx(0.75), "1 in place of 4"
    assert gap.jsd_deviations == pytest.approx(1.0) and gap.jsd == pytest.approx((1.0 + gap.jsd_means) / 2)
    same = compare(expected, expected)
    assert (same.wasserstein, same.jsd, same.variance_gap) == pytest.approx((0.0, 0.0, 0.0))
