"""Every loss: zero at the target, a gradient elsewhere, and the fact that names it."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training.losses import (
    downsampled_l1,
    eagle,
    fourier_l1,
    gaussian_blur,
    gradient_l1,
    high_frequency_l1,
    reconstruction,
)

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: list[Loss] = [reconstruction, gradient_l1, fourier_l1, downsampled_l1, high_frequency_l1, eagle]


def images(seed: int, side: int = 24) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_is_zero_at_the_target(loss: Loss) -> None:
    assert float(loss(images(0), images(0))) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_down_the_gradient_lowers_the_loss(loss: Loss) -> None:
    prediction, target = images(0).requires_grad_(), images(1)
    before = loss(prediction, target)
    (gradient,) = torch.autograd.grad(before, prediction)
    assert float(before.detach()) > 0.0
    assert torch.isfinite(gradient).all()
    after = loss(prediction - 1e-3 * gradient / gradient.norm(), target)
    assert float(after.detach()) < float(before.detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_values_outside_the_picture_range_still_have_a_gradient(loss: Loss) -> None:
    prediction, target = (images(0) * 3.0).requires_grad_(), images(1)
    (gradient,) = torch.autograd.grad(loss(prediction, target), prediction)
    outside = prediction.detach().abs() > 1.0
    # L1 of differences cancels exactly at half of the pixels, where both neighbours pull.
    assert float((gradient[outside] != 0.0).float().mean()) > 0.3


def test_fourier_ignores_a_circular_shift() -> None:
    assert float(fourier_l1(images(0), images(0).roll((3, 5), (2, 3)))) == pytest.approx(0.0, abs=1e-5)
    assert float(fourier_l1(images(0), images(1))) > 0.1


def test_high_frequency_ignores_an_offset_and_sees_a_checkerboard() -> None:
    flat = torch.zeros(1, 3, 16, 16)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    board = ((rows + columns) % 2 * 2.0 - 1.0).expand(1, 3, 16, 16)
    assert float(high_frequency_l1(flat + 0.4, flat)) == pytest.approx(0.0, abs=1e-6)
    assert float(high_frequency_l1(board, flat)) > 0.95


def test_shrunk_loss_hardly_sees_a_checkerboard() -> None:
    flat = torch.zeros(1, 3, 32, 32)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    board = ((rows + columns) % 2 * 2.0 - 1.0).expand(1, 3, 32, 32)
    assert float(downsampled_l1(board, flat)) < 0.05
    assert float(downsampled_l1(flat + 0.4, flat)) == pytest.approx(0.4, abs=1e-5)


def test_blur_is_a_normalised_gaussian() -> None:
    impulse = torch.zeros(1, 1, 9, 9)
    impulse[0, 0, 4, 4] = 1.0
    blurred = gaussian_blur(impulse)
    assert float(blurred.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(blurred[0, 0, 4, 5] / blurred[0, 0, 4, 4]) == pytest.approx(math.exp(-0.5), abs=1e-5)


def test_eagle_ignores_an_offset_and_sees_a_lost_edge() -> None:
    edge = torch.zeros(1, 3, 24, 24)
    edge[..., 12:] = 1.0
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    blurred = gaussian_blur(edge, 5, 1.5)
    assert float(eagle(blurred[inner], edge[inner])) > 1.0
    assert float(eagle(images(0), images(1))) > 0.0
