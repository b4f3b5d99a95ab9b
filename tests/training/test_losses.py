"""Every loss: zero at the target, its value on hand-made inputs, its type, a gradient up to the adapter."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLQwenImage21, AutoencoderKLWan
from torch import Tensor

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.latent_space import LatentSpace
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from giantleap.models.vae.autoencoder import Vae
from giantleap.training.data.frozen_vae import NoGradientError, decode_target, decode_with_gradient, read_vae
from giantleap.training.losses import (
    downsampled_l1,
    eagle,
    fourier_l1,
    gaussian_blur,
    high_frequency_l1,
    high_pass_mask,
    l1,
    log_square,
    patch_variances,
    shrink,
    visible_error,
)
from tests.tiny_pipelines import NO_SHORTCUTS, tiny_dc_vae

Loss = Callable[[Tensor, Tensor], Tensor]
CURRICULUM: list[Loss] = [
    l1,
    fourier_l1,
    downsampled_l1,
    partial(downsampled_l1, factor=4),
    high_frequency_l1,
    eagle,
    partial(eagle, high_pass="reference"),
]


def images(seed: int, side: int = 24) -> Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0


@pytest.mark.parametrize("loss", CURRICULUM)
def test_loss_is_zero_at_the_target(loss: Loss) -> None:
    assert float(loss(images(0), images(0))) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss", CURRICULUM)
def test_a_step_down_the_gradient_lowers_the_loss(loss: Loss) -> None:
    prediction, target = images(0).requires_grad_(), images(1)
    before = loss(prediction, target)
    (gradient,) = torch.autograd.grad(before, prediction)
    assert float(before.detach()) > 0.0
    assert torch.isfinite(gradient).all()
    after = loss(prediction - 1e-3 * gradient / gradient.norm(), target)
    assert float(after.detach()) < float(before.detach())


@pytest.mark.parametrize("loss", CURRICULUM)
def test_values_outside_the_picture_range_still_have_a_gradient(loss: Loss) -> None:
    prediction, target = (images(0) * 3.0).requires_grad_(), images(1)
    (gradient,) = torch.autograd.grad(loss(prediction, target), prediction)
    outside = prediction.detach().abs() > 1.0
    # L1 of differences cancels exactly at half of the pixels, where both neighbors pull.
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


@pytest.mark.parametrize("loss", CURRICULUM)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loss_computes_in_float32_whatever_comes_in(loss: Loss, dtype: torch.dtype) -> None:
    prediction, target = images(0).to(dtype), images(1).to(dtype)
    value = loss(prediction, target)
    assert value.dtype == torch.float32
    assert float(value) == float(loss(prediction.float(), target.float()))


def test_l1_by_hand() -> None:
    assert float(l1(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 1.0]]))) == pytest.approx(1.75)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (5, 8), (8, 5), (7, 7), (16, 12)])
def test_fourier_is_the_mean_over_the_whole_orthonormal_spectrum(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 4, height, width, generator=generator) for _ in range(2))
    whole = (torch.fft.fft2(a, norm="ortho").abs() - torch.fft.fft2(b, norm="ortho").abs()).abs().mean()
    assert float(fourier_l1(a, b)) == pytest.approx(float(whole), rel=1e-5)


def test_fourier_by_hand() -> None:
    # A constant c has one magnitude, c * sqrt(h * w) at frequency 0, shared by h * w frequencies.
    assert float(fourier_l1(torch.full((1, 1, 4, 8), 3.0), torch.zeros(1, 1, 4, 8))) == pytest.approx(3 / 32**0.5)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize(("height", "width"), [(16, 24), (17, 10), (64, 32)])
def test_shrink_is_the_antialiased_bicubic_of_torch(factor: int, height: int, width: int) -> None:
    picture = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    size = (height // factor, width // factor)
    expected = F.interpolate(picture, size=size, mode="bicubic", antialias=True)
    assert torch.allclose(shrink(picture, factor), expected, atol=1e-5)


def test_shrink_refuses_what_would_vanish() -> None:
    with pytest.raises(ValueError, match="cannot be shrunk"):
        shrink(torch.zeros(1, 3, 3, 8), 4)


def test_blur_reflects_its_borders() -> None:
    picture = torch.randn(1, 2, 6, 9, generator=torch.Generator().manual_seed(0))
    offset = torch.arange(5.0) - 2.0
    row = torch.exp(-0.5 * offset.square())
    kernel = torch.outer(row, row) / row.sum() ** 2
    padded = F.pad(picture, (2, 2, 2, 2), mode="reflect")
    expected = F.conv2d(padded, kernel.expand(2, 1, 5, 5), groups=2)
    assert torch.allclose(gaussian_blur(picture), expected, atol=1e-6)


def test_patch_variance_by_hand() -> None:
    # A ramp of one gray level a pixel has a Scharr gradient of 32 everywhere but at the border, which sees zeros.
    ramp = torch.arange(9.0).expand(1, 3, 9, 9)
    variances = patch_variances(ramp * 1.0)
    assert variances.shape == (1, 2, 3, 3)
    assert float(variances[0, :, 1, 1].abs().max()) == pytest.approx(0.0, abs=1e-4)
    # One step by 1 between columns 4 and 5: columns 3, 4 and 5 of the middle patch have gradients 0, 16 and 16.
    step = torch.zeros(1, 3, 9, 9)
    step[..., 5:] = 1.0
    assert float(patch_variances(step)[0, 0, 1, 1]) == pytest.approx(16.0**2 * 2 / 8 * 0.9999**2, rel=1e-4)


def test_patch_remainder_is_left_out() -> None:
    assert patch_variances(torch.zeros(1, 3, 11, 8)).shape == (1, 2, 3, 2)


@pytest.mark.parametrize(
    ("kind", "values"),
    [("paper", (0.0, 1 - math.exp(-0.5), 1 - math.exp(-1.0))), ("reference", (1 - math.exp(-0.125), 0.0, 0.0212))],
)
def test_high_pass_at_zero_at_the_axis_and_in_the_corner(kind: str, values: tuple[float, ...]) -> None:
    mask = high_pass_mask(4, 4, 0.5, "paper" if kind == "paper" else "reference")
    assert [float(mask[0, 0]), float(mask[0, 2]), float(mask[2, 2])] == pytest.approx(list(values), abs=1e-4)


def test_eagle_by_hand() -> None:
    """Variance maps of one patch have one frequency, 0, which the paper's mask removes and the reference keeps."""
    step = torch.zeros(1, 3, 3, 3)
    step[..., 2:] = 1.0
    flat = torch.zeros(1, 3, 3, 3)
    assert float(eagle(step, flat)) == 0.0
    variances = patch_variances(step)
    expected = (1 - math.exp(-0.125)) * float(variances.sum())
    assert float(eagle(step, flat, high_pass="reference")) == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def vae(tiny_bundle_dir: Path) -> Vae:
    return read_vae(read_bundle(tiny_bundle_dir), torch.device("cpu"), torch.float32)


def adapter() -> Lua:
    torch.manual_seed(0)
    return Lua(LuaSpec(16, 12, (2,), 2, window=4, num_feat=8)).train()


def latents(seed: int, side: int) -> Tensor:
    return torch.randn(2, 16, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("loss", CURRICULUM)
@pytest.mark.parametrize("scale", [2, 4])
def test_loss_of_pictures_moves_every_weight_of_the_adapter(loss: Loss, scale: int, vae: Vae) -> None:
    net = adapter()
    target = decode_target(vae, latents(1, 4 * scale))
    value = loss(decode_with_gradient(vae, net(latents(0, 4), scale)), target)
    torch.autograd.backward(value)
    other = f"heads.x{6 - scale}."
    for name, weight in net.named_parameters():
        assert name.startswith(other) or (weight.grad is not None and bool(weight.grad.abs().sum() > 0)), name
    assert all(weight.grad is None for weight in vae.model.parameters())


def test_checkpoints_change_no_gradient(vae: Vae) -> None:
    gradients = []
    for is_checkpointed in (True, False):
        raw = latents(0, 4).requires_grad_()
        torch.autograd.backward(decode_with_gradient(vae, raw, is_checkpointed).square().mean())
        gradients.append(raw.grad)
    assert gradients[0] is not None and gradients[1] is not None
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-9)


def test_decode_is_that_of_the_service_and_is_not_clamped(vae: Vae) -> None:
    raw = latents(0, 4) * 100.0
    decoded = decode_with_gradient(vae, raw.requires_grad_())
    assert torch.allclose(decoded, vae.decode(raw.detach()), atol=1e-4)
    assert torch.allclose(decoded, decode_target(vae, raw), atol=1e-5)
    assert float(decode_target(vae, raw).abs().max()) != 1.0


def test_a_decode_for_a_loss_refuses_latents_without_a_gradient(vae: Vae) -> None:
    with pytest.raises(NoGradientError):
        decode_with_gradient(vae, latents(0, 4))
    with torch.no_grad(), pytest.raises(NoGradientError):
        decode_with_gradient(vae, latents(0, 4).requires_grad_())


@pytest.mark.parametrize(
    ("model", "channels", "stride_px"),
    [
        (lambda: AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1), 16, 8),
        (
            lambda: AutoencoderKLQwenImage21(
                base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1
            ),
            64,
            16,
        ),
        (lambda: AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1), 16, 8),
        (
            lambda: AutoencoderKLFlux2(
                block_out_channels=(8, 8, 8, 8),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=1,
                latent_channels=32,
                norm_num_groups=4,
            ),
            32,
            8,
        ),
        (lambda: tiny_dc_vae(24, (8, 8, 16), attention=0, **NO_SHORTCUTS), 24, 4),
        (lambda: tiny_dc_vae(32, (8, 8, 8, 8, 8, 32), attention=3), 32, 32),
    ],
    ids=["qwen-image", "qwen-image-21", "wan21", "flux2", "stride4", "sana"],
)
def test_a_loss_of_pictures_reaches_the_latents_of_every_family(
    model: Callable[[], Any], channels: int, stride_px: int
) -> None:
    torch.manual_seed(0)
    vae = Vae(model().requires_grad_(False).eval(), LatentSpace("any", channels, stride_px, 1.0))
    gradients = []
    for is_checkpointed in (True, False):
        raw = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        decoded = decode_with_gradient(vae, raw, is_checkpointed)
        assert decoded.shape == (2, 3, 4 * stride_px, 4 * stride_px)
        assert torch.allclose(decoded, vae.decode(raw.detach()), atol=1e-4)
        torch.autograd.backward(decoded.square().mean())
        assert raw.grad is not None and bool((raw.grad != 0).any(dim=(2, 3)).all())
        gradients.append(raw.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-9)


def test_a_logarithm_of_squares_weighs_items_by_their_decibels_above_the_floor() -> None:
    error = torch.ones(2, 3, 4, 4)
    error[1] *= 0.01
    assert float(log_square(error, 1e-9)) == pytest.approx(0.5 * math.log(1e-4), abs=1e-3)
    assert float(log_square(error, 1e-2)) == pytest.approx(0.5 * (math.log(1.01) + math.log(1.01e-2)), abs=1e-4)


def test_an_error_beyond_what_is_shown_counts_only_where_it_would_be_seen() -> None:
    target = torch.tensor([-1.2, -1.0, 1.0, 0.9, -0.5]).view(1, 1, 1, 5)
    prediction = torch.tensor([-1.5, -1.1, 1.3, 1.2, -1.5]).view(1, 1, 1, 5).requires_grad_()
    error = visible_error(prediction, target)
    assert error.flatten().tolist() == pytest.approx([0.0, 0.0, 0.0, 0.3, -1.0])
    torch.autograd.backward(error.square().sum())
    assert prediction.grad is not None and bool((prediction.grad[..., 3:] != 0).all())
