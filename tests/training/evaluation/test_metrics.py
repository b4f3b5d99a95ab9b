"""Each metric at values that are known: by hand, or in closed form through features that the test puts in."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from giantleap.training.evaluation.metrics import (
    NotAvailableError,
    crop,
    crop_places,
    fid,
    kid,
    psnr_db,
    ssim,
    to_levels,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_psnr_is_that_of_pictures_in_zero_to_one_inside_a_border_of_two() -> None:
    target = torch.full((1, 3, 16, 20), 100, dtype=torch.uint8)
    assert psnr_db(target + 1, target) == pytest.approx(20 * math.log10(255), abs=1e-9)
    one_channel = target.clone()
    one_channel[:, 1] += 10
    assert psnr_db(one_channel, target) == pytest.approx(10 * math.log10(3 * 25.5**2), abs=1e-9)
    framed = target.clone()
    framed[..., :2, :] = framed[..., -2:, :] = 0
    framed[..., :, :2] = framed[..., :, -2:] = 0
    assert psnr_db(framed, target) == math.inf
    framed[..., 2, 2] = 0
    assert psnr_db(framed, target) < math.inf
    assert psnr_db(framed, target, border_px=0) < psnr_db(framed, target)


def test_pictures_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="equal uint8"):
        psnr_db(levels(1, 3, 8, 8), levels(1, 3, 8, 9))
    with pytest.raises(ValueError, match="equal uint8"):
        psnr_db(levels(1, 3, 8, 8).float(), levels(1, 3, 8, 8).float())
    with pytest.raises(ValueError, match="border"):
        psnr_db(levels(1, 3, 4, 8), levels(1, 3, 4, 8))
    with pytest.raises(ValueError, match="11 px"):
        ssim(levels(1, 3, 14, 20), levels(1, 3, 14, 20))


def test_ssim_of_flat_pictures_is_its_luminance_term() -> None:
    one, two = torch.full((1, 3, 24, 24), 51, dtype=torch.uint8), torch.full((1, 3, 24, 24), 204, dtype=torch.uint8)
    c1 = 0.01**2
    assert ssim(one, two) == pytest.approx((2 * 0.2 * 0.8 + c1) / (0.2**2 + 0.8**2 + c1), abs=1e-6)
    noise = levels(1, 3, 24, 24)
    assert ssim(noise, noise) == pytest.approx(1.0)
    assert ssim(noise, levels(1, 3, 24, 24, seed=1)) < 0.2


def test_levels_are_clamped_and_rounded() -> None:
    assert to_levels(torch.tensor([-7.0, -1.0, 0.0, 0.999, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255, 255]


def gaussian(count: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """A sample whose mean and covariance are exactly the given ones."""
    x = normal(count, len(mean), seed=seed)
    x = x - x.mean(dim=0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (count - 1))).T
    sample: Tensor = x @ torch.linalg.cholesky(covariance).T + mean
    return sample


def test_fid_is_the_frechet_distance_of_two_known_gaussians() -> None:
    mean, other = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    one, two = (torch.diag(torch.tensor(v).double()) for v in ((4.0, 9.0, 1.0), (1.0, 4.0, 16.0)))
    expected = float((mean - other).square().sum()) + (2 - 1) ** 2 + (3 - 2) ** 2 + (1 - 4) ** 2
    assert fid(gaussian(50, mean, one, 0), gaussian(70, other, two, 1)) == pytest.approx(expected, rel=1e-6)
    sample = gaussian(50, mean, one, 0)
    assert fid(sample, sample) == pytest.approx(0.0, abs=1e-6)
    assert fid(sample + 3.0, sample) == pytest.approx(27.0, rel=1e-6), "a shift counts its square"


def cubic_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate, term by term."""

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1.0) ** 3

    n = len(x)
    inside = sum(k(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return inside - 2.0 * sum(k(a, b) for a in x for b in y) / n**2


def test_kid_is_the_unbiased_cubic_mmd() -> None:
    x, y = normal(8, 5), normal(8, 5, seed=1) + 0.7
    found = kid(x, y, subsets=3, subset_size=8)
    assert found.mean == pytest.approx(cubic_mmd(x, y), rel=1e-9)
    assert found.std == pytest.approx(0.0, abs=1e-9), "every subset is the whole set"


def test_kid_of_samples_of_one_distribution_is_zero_within_its_deviation_and_grows_with_a_shift() -> None:
    x, y = normal(400, 4), normal(400, 4, seed=1)
    equal, shifted = (kid(features, y, subsets=20, subset_size=100) for features in (x, x + 0.5))
    assert abs(equal.mean) < 2 * equal.std
    assert shifted.mean > 10 * abs(equal.mean)
    before = torch.random.get_rng_state()
    assert kid(x, y, 5, 50, seed=3) == kid(x, y, 5, 50, seed=3) != kid(x, y, 5, 50, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_too_few_samples_are_not_available() -> None:
    with pytest.raises(NotAvailableError, match="subsets of 1000 needs 1000 samples a set; there are 6"):
        kid(normal(6, 4), normal(2000, 4))
    with pytest.raises(NotAvailableError, match="subsets of 7"):
        kid(normal(9, 4), normal(6, 4), subset_size=7)
    kid(normal(7, 4), normal(7, 4, seed=1), subsets=2, subset_size=7)
    with pytest.raises(NotAvailableError, match="FID needs 2"):
        fid(normal(1, 4), normal(9, 4))
    spoiled = normal(9, 4)
    spoiled[3, 2] = float("nan")
    with pytest.raises(NotAvailableError, match="not finite"):
        fid(spoiled, normal(9, 4))
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        fid(normal(9, 4), normal(9, 5))


def test_crops_are_the_same_for_a_seed_and_reach_every_corner() -> None:
    places = crop_places(12, 20, 8, 400, seed=1, index=0)
    assert places == crop_places(12, 20, 8, 400, seed=1, index=0)
    assert places != crop_places(12, 20, 8, 400, seed=1, index=1) != crop_places(12, 20, 8, 400, seed=2, index=1)
    tops, lefts = np.array(places).T
    assert (tops.min(), tops.max(), lefts.min(), lefts.max()) == (0, 4, 0, 12)
    picture = levels(1, 3, 12, 20)
    assert torch.equal(crop(picture, [(4, 12), (0, 0)], 8)[0], picture[0, :, 4:, 12:])
    assert crop_places(8, 8, 8, 1, seed=0, index=0) == [(0, 0)]
    with pytest.raises(NotAvailableError, match="8x7 px"):
        crop_places(8, 7, 8, 1, seed=0, index=0)
