"""Every loss of the pocket trainings, each a pure function of tensors; images lie in [-1, 1] and are never clamped.

A clamp before a loss kills the gradient exactly where the picture is wrong, so predictions come in raw. The LUA
losses follow the three-stage curriculum of arXiv 2511.10629; weights live with the stages in `training/pocket_lua.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gradient_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels, down and right."""
    error = prediction - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def reconstruction(prediction: Tensor, target: Tensor) -> Tensor:
    """The VAE's picture loss: L1 + 5 MSE + 0.25 gradient L1.

    Shape:
        both [batch, 3, height, width].
    """
    error = prediction - target
    loss: Tensor = error.abs().mean() + 5.0 * error.square().mean() + 0.25 * gradient_l1(prediction, target)
    return loss


def fourier_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the 2-D Fourier magnitudes per channel, orthonormal; phase is ignored.

    Ref: arXiv 2511.10629, the latent and pixel FFT terms.
    """
    magnitude = torch.fft.rfft2(prediction.float(), norm="ortho").abs()
    error: Tensor = magnitude - torch.fft.rfft2(target.float(), norm="ortho").abs()
    loss: Tensor = error.abs().mean()
    return loss


def downsampled_l1(prediction: Tensor, target: Tensor, factor: int = 2) -> Tensor:
    """L1 after an antialiased bicubic shrink: colour and coarse structure.

    Ref: arXiv 2511.10629, A.1 (factor 2 for both scales).
    """
    size = (prediction.shape[-2] // factor, prediction.shape[-1] // factor)
    small, small_target = (F.interpolate(x, size=size, mode="bicubic", antialias=True) for x in (prediction, target))
    return (small - small_target).abs().mean()


def gaussian_blur(images: Tensor, size_px: int = 5, sigma_px: float = 1.0) -> Tensor:
    """Blurs every channel alike, with reflected borders."""
    offset = torch.arange(size_px, dtype=images.dtype, device=images.device) - (size_px - 1) / 2
    row = torch.exp(-0.5 * (offset / sigma_px).square())
    row = row / row.sum()
    channels = images.shape[1]
    padded = F.pad(images, [size_px // 2] * 4, mode="reflect")
    across = F.conv2d(padded, row.view(1, 1, 1, -1).expand(channels, 1, 1, size_px), groups=channels)
    return F.conv2d(across, row.view(1, 1, -1, 1).expand(channels, 1, size_px, 1), groups=channels)


def high_frequency_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """L1 of what a small Gaussian blur takes away.

    Ref: arXiv 2511.10629, 3.3 and A.1 (kernel 5, sigma 1).
    """
    error = prediction - target
    return (error - gaussian_blur(error)).abs().mean()


def _patch_variances(images: Tensor, patch_px: int) -> Tensor:
    """Variance of the luma's Scharr gradients in each patch, x and y as two channels."""
    luma = images.new_tensor([0.2989, 0.5870, 0.1140]).view(1, 3, 1, 1)
    scharr_y = images.new_tensor([[-3.0, -10.0, -3.0], [0.0, 0.0, 0.0], [3.0, 10.0, 3.0]])
    kernels = torch.stack((scharr_y.T, scharr_y)).unsqueeze(1)
    gradients = F.conv2d((images * luma).sum(dim=1, keepdim=True), kernels, padding=1)
    rows, columns = gradients.shape[-2] // patch_px, gradients.shape[-1] // patch_px
    gradients = gradients[..., : rows * patch_px, : columns * patch_px]
    patches = gradients.unflatten(3, (columns, patch_px)).unflatten(2, (rows, patch_px))
    variances: Tensor = patches.var(dim=(3, 5), unbiased=True)
    return variances


def eagle(prediction: Tensor, target: Tensor, patch_px: int = 3, cutoff: float = 0.5) -> Tensor:
    """High-pass spectra of the local gradient variance: sharpness of edges and texture.

    Ref: arXiv 2403.10695, with the high-pass of arXiv 2511.10629 Eq. 19, 1 - exp(-r^2 / (2 cutoff^2)), and the
    mean over frequencies (the sum would outweigh the pixel L1 ten thousand times).

    Shape:
        both [batch, 3, height, width], in [-1, 1]; height and width at least `patch_px`.
    """
    variances = [_patch_variances(images.float(), patch_px) for images in (prediction, target)]
    rows, columns = variances[0].shape[-2:]
    frequency_y = torch.fft.fftfreq(rows, device=prediction.device).view(-1, 1)
    frequency_x = torch.fft.fftfreq(columns, device=prediction.device).view(1, -1)
    high_pass = 1.0 - torch.exp(-(frequency_y.square() + frequency_x.square()) / (2.0 * cutoff**2))
    spectra = [torch.fft.fft2(variance).abs() * high_pass for variance in variances]
    # The two gradient directions are summed, as in the paper, so the mean over both is doubled.
    loss: Tensor = 2.0 * (spectra[0] - spectra[1]).abs().mean()
    return loss
