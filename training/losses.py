"""Every loss of the trainings, each a pure function of tensors; images lie in [-1, 1] and are never clamped.

A clamp before a loss kills the gradient exactly where the picture is wrong, so predictions come in raw. Losses compute
in float32 whatever comes in, and from the padding to the shrinking only with operations whose backward pass adds in a
fixed order, so that a run on a GPU can be repeated to the bit. Which stage weighs which loss how is in
`training/curriculum.py`.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.training.run_config import HighPass

LUMA = (0.2989, 0.5870, 0.1140)


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error, of latents or of pictures: mean |x' - x|.

    Ref: arXiv 2511.10629, Eq. 8 (latents) and 14 (pictures).
    """
    loss: Tensor = (prediction.float() - target.float()).abs().mean()
    return loss


def log_square(error: Tensor, floor: float) -> Tensor:
    """Mean over the batch of the logarithm of each item's mean square error: what a mean of decibels weighs.

    Args:
        error: Of pictures whose range is [-1, 1].
        floor: Added to each square; items with a smaller error count less.

    Shape:
        error [batch, channels, height, width].
    """
    loss: Tensor = (error.float().square().flatten(1).mean(dim=1) + floor).log().mean()
    return loss


def visible_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The error of a picture, zero where both lie beyond black or both beyond white: that is clamped when shown.

    A clamp of all values would lose the gradient of those that are wrong.
    """
    is_hidden = ((prediction < -1.0) & (target <= -1.0)) | ((prediction > 1.0) & (target >= 1.0))
    return (prediction.float() - target.float()).masked_fill(is_hidden, 0.0)


def fourier_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the 2-D Fourier magnitudes per channel: mean | |F x'| - |F x| |; phase is ignored.

    The transform is orthonormal. Half of the spectrum of real values is the mirror of the other, so only one half is
    computed and its inner columns count twice: the mean is that over the whole spectrum.

    Ref: arXiv 2511.10629, Eq. 9 (latents) and A.1 (pictures).

    Shape:
        both [batch, channels, height, width].
    """
    width = prediction.shape[-1]
    magnitude = torch.fft.rfft2(prediction.float(), norm="ortho").abs()
    error = (magnitude - torch.fft.rfft2(target.float(), norm="ortho").abs()).abs()
    twice = slice(1, (width + 1) // 2)  # neither the column of frequency 0 nor, for even widths, the last one
    total = error.sum() + error[..., twice].sum()
    loss: Tensor = total / prediction.numel()
    return loss


@lru_cache(maxsize=32)
def _shrink_matrix(size_px: int, factor: int) -> Tensor:
    """The antialiased bicubic shrink of one axis as a matrix, [size_px // factor, size_px].

    Row i is what torch's own `interpolate` makes of each unit vector, so the two agree.
    """
    with torch.inference_mode(False), torch.no_grad():  # kept for later steps, which may need a gradient
        basis = torch.eye(size_px, dtype=torch.float64)[None, None]
        small = F.interpolate(basis, size=(size_px // factor, size_px), mode="bicubic", antialias=True)
        return small[0, 0].float()


def shrink(images: Tensor, factor: int) -> Tensor:
    """Antialiased bicubic shrink by a whole factor, as two matrix products.

    The same values as `torch.nn.functional.interpolate`, whose backward pass on a GPU adds in any order.

    Shape:
        [batch, channels, height, width] -> [batch, channels, height // factor, width // factor], float32.

    Raises:
        ValueError: a side is shorter than the factor.
    """
    height, width = images.shape[-2:]
    if min(height, width) < factor:
        raise ValueError(f"an image of {width}x{height} px cannot be shrunk by {factor}")
    rows = _shrink_matrix(height, factor).to(images.device)
    columns = _shrink_matrix(width, factor).to(images.device)
    small: Tensor = rows @ images.float() @ columns.T
    return small


def downsampled_l1(prediction: Tensor, target: Tensor, factor: int = 2) -> Tensor:
    """L1 after an antialiased bicubic shrink, mean | D x' - D x |: color and coarse structure.

    Ref: arXiv 2511.10629, Eq. 11; the factor is 2 for both scales as in A.1 (section 3.3 says 2 for x2 and 4 for x4).
    """
    return shrink(prediction.float() - target.float(), factor).abs().mean()


def _reflect(images: Tensor, margin_px: int) -> Tensor:
    """Reflected borders as `F.pad(mode="reflect")`, whose backward pass on a GPU adds in any order."""
    for dim in (-2, -1):
        size = images.shape[dim]
        before = images.narrow(dim, 1, margin_px).flip(dim)
        after = images.narrow(dim, size - 1 - margin_px, margin_px).flip(dim)
        images = torch.cat((before, images, after), dim=dim)
    return images


def gaussian_blur(images: Tensor, size_px: int = 5, sigma_px: float = 1.0) -> Tensor:
    """Blurs every channel alike, with reflected borders; sides are longer than half of `size_px`."""
    offset = torch.arange(size_px, dtype=images.dtype, device=images.device) - (size_px - 1) / 2
    row = torch.exp(-0.5 * (offset / sigma_px).square())
    row = row / row.sum()
    channels = images.shape[1]
    padded = _reflect(images, size_px // 2)
    across = F.conv2d(padded, row.view(1, 1, 1, -1).expand(channels, 1, 1, size_px), groups=channels)
    return F.conv2d(across, row.view(1, 1, -1, 1).expand(channels, 1, size_px, 1), groups=channels)


def high_frequency_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """L1 of what a small Gaussian blur G takes away: mean | (x' - G x') - (x - G x) |.

    Ref: arXiv 2511.10629, Eq. 12 and A.1 (kernel 5, sigma 1). The blur is linear, so it runs once, on the error.
    """
    error = prediction.float() - target.float()
    return (error - gaussian_blur(error)).abs().mean()


def patch_variances(images: Tensor, patch_px: int = 3) -> Tensor:
    """Unbiased variance of the luma's Scharr gradients in each patch, horizontal and vertical as two channels.

    Patches do not overlap; what remains at the right and the bottom is left out. The Scharr kernels are not
    normalized, and the border is padded with zeros.

    Ref: arXiv 2403.10695, section 2; luma as in arXiv 2511.10629, A.1.

    Shape:
        [batch, 3, height, width] -> [batch, 2, height // patch_px, width // patch_px].
    """
    luma = images.new_tensor(LUMA).view(1, 3, 1, 1)
    scharr_y = images.new_tensor([[-3.0, -10.0, -3.0], [0.0, 0.0, 0.0], [3.0, 10.0, 3.0]])
    kernels = torch.stack((scharr_y.T, scharr_y)).unsqueeze(1)
    gradients = F.conv2d((images * luma).sum(dim=1, keepdim=True), kernels, padding=1)
    rows, columns = gradients.shape[-2] // patch_px, gradients.shape[-1] // patch_px
    gradients = gradients[..., : rows * patch_px, : columns * patch_px]
    patches = gradients.unflatten(3, (columns, patch_px)).unflatten(2, (rows, patch_px))
    variances: Tensor = patches.var(dim=(3, 5), unbiased=True)
    return variances


def high_pass_mask(rows: int, columns: int, cutoff: float = 0.5, kind: HighPass = "paper") -> Tensor:
    """Weight of each frequency (u, v) in cycles per sample, in the order of `fftfreq`; [rows, columns].

    Ref: "paper" is arXiv 2511.10629 Eq. 20, 1 - exp(-(u^2 + v^2) / (2 cutoff^2)), which is 0 for the mean. "reference"
    is the filter of the published code of arXiv 2403.10695, 1 - exp(-(r - cutoff)^2 / 2) with r^2 = u^2 + v^2, which
    is largest for the mean: no high-pass, but what that paper's figures were made with.
    """
    square = torch.fft.fftfreq(rows).view(-1, 1).square() + torch.fft.fftfreq(columns).view(1, -1).square()
    if kind == "reference":
        return 1.0 - torch.exp(-0.5 * (square.sqrt() - cutoff).square())
    return 1.0 - torch.exp(-square / (2.0 * cutoff**2))


def eagle(
    prediction: Tensor, target: Tensor, patch_px: int = 3, cutoff: float = 0.5, high_pass: HighPass = "paper"
) -> Tensor:
    """High-pass spectra of the local gradient variance V: sum over x and y of mean | H |F V'| - H |F V| |.

    Ref: arXiv 2403.10695 and arXiv 2511.10629, Eq. 19 and 20, with the mean over frequencies where the latter says
    l1 norm: with its weight of 5e-5 the sum would outweigh the pixel L1 ten thousand times. The transform is not
    normalized, as in the published code.

    Shape:
        both [batch, 3, height, width], in [-1, 1]; height and width at least `patch_px`.
    """
    variances = [patch_variances(images.float(), patch_px) for images in (prediction, target)]
    rows, columns = variances[0].shape[-2:]
    mask = high_pass_mask(rows, columns, cutoff, high_pass).to(prediction.device)
    spectra = [torch.fft.fft2(variance).abs() * mask for variance in variances]
    # The two gradient directions are summed, as in the paper, so the mean over both is doubled.
    loss: Tensor = 2.0 * (spectra[0] - spectra[1]).abs().mean()
    return loss
