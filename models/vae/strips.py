"""Feature maps cut into strips of rows, and the decoder layers that process them exactly.

A convolution reads one row of the neighboring strips. A group normalization uses the statistics of the whole map, which
are gathered strip by strip while the map is made. `models/vae/decode.py` composes the layers. Every function expects
`torch.inference_mode`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(slots=True)
class StripMap:
    """One feature map [1, channels, height, width] as strips, top to bottom, each freed on its own.

    Args:
        height: Rows of the whole map.
        strip_rows: Rows of each strip; the last may have fewer.
        strips: The strips; None for one that was taken.
        means: Mean of each strip, [channels], float32.
        variances: Biased variance of each strip, [channels], float32.
        pixels: Pixels of each strip.
    """

    height: int
    strip_rows: int
    strips: list[Tensor | None] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    pixels: list[int] = field(default_factory=list)

    def append(self, strip: Tensor) -> None:
        """Add the next strip and measure it while it is in the cache."""
        scratch = torch.ones(strip.shape[1], device=strip.device)  # float32, which makes the results float32
        mean, variance = torch.batch_norm_update_stats(strip, scratch, scratch, 0.0)
        self.means.append(mean)
        self.variances.append(variance)
        self.append_unmeasured(strip)

    def append_unmeasured(self, strip: Tensor) -> None:
        """Add the next strip of a map that is not normalized."""
        self.strips.append(strip)
        self.pixels.append(strip.shape[2] * strip.shape[3])

    def strip(self, index: int) -> Tensor:
        """A strip that was not taken."""
        strip = self.strips[index]
        assert strip is not None, f"strip {index} was taken"
        return strip

    def take(self, index: int) -> Tensor:
        """Remove a strip and return it; its memory is free once the caller drops it."""
        strip = self.strip(index)
        self.strips[index] = None
        return strip

    def rows(self, first: int, last: int) -> Tensor:
        """Copy rows [first, last), with zeros outside of the map.

        Returns:
            [1, channels, last - first, width].
        """
        lowest, highest = max(first, 0) // self.strip_rows, (min(last, self.height) - 1) // self.strip_rows
        parts = []
        for index in range(lowest, highest + 1):
            top = index * self.strip_rows
            parts.append(self.strip(index)[:, :, max(first - top, 0) : last - top])
        if first < 0:
            parts.insert(0, torch.zeros_like(parts[0][:, :, :1]).expand(-1, -1, -first, -1))
        if last > self.height:
            parts.append(torch.zeros_like(parts[-1][:, :, :1]).expand(-1, -1, last - self.height, -1))
        return torch.cat(parts, dim=2)

    def moments(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each group over the whole map, repeated for its channels.

        Returns:
            Two of [channels], float32.

        References:
            Chan, Golub, LeVeque 1983, the pairwise update, over all strips and the channels of a group at once and in
            float64: the variance is the mean of the parts' variances plus the variance of their means.
        """
        weights = torch.tensor(self.pixels, dtype=torch.float64) / sum(self.pixels)
        means = torch.stack(self.means).double().unflatten(1, (groups, -1))  # [strips, groups, channels per group]
        variances = torch.stack(self.variances).double().unflatten(1, (groups, -1))
        per_strip = weights.to(means.device).view(-1, 1, 1) / means.shape[2]
        mean = (per_strip * means).sum(dim=(0, 2))
        variance = (per_strip * (variances + (means - mean[:, None]).square())).sum(dim=(0, 2))
        repeats = means.shape[2]
        return mean.repeat_interleave(repeats).float(), variance.repeat_interleave(repeats).float()


@dataclass(frozen=True, slots=True)
class Normalization:
    """A group normalization with known statistics: per channel `(x - mean) / sqrt(variance + eps) * w + b`."""

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, source: StripMap, norm: nn.GroupNorm) -> "Normalization":
        """Use the statistics of a complete map."""
        return cls(*source.moments(norm.num_groups), norm.weight.float(), norm.bias.float(), norm.eps)

    def apply(self, rows: Tensor) -> Tensor:
        """Shape: [1, channels, rows, width] -> the same."""
        # With fixed statistics a batch normalization is this formula, in float32 inside for every dtype.
        return F.batch_norm(rows, self.mean, self.variance, self.weight, self.bias, False, 0.0, self.eps)

    def activate(self, rows: Tensor, into: Tensor) -> None:
        """Write SiLU of the normalized rows to a slice of the same shape."""
        torch.ops.aten.silu.out(self.apply(rows), out=into)


def convolve(conv: nn.Conv2d, rows: Tensor) -> Tensor:
    """A 3x3 convolution of rows that include their halo: one row less at the top and at the bottom."""
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))


def convolve_activated(source: StripMap, norm: nn.GroupNorm, conv: nn.Conv2d) -> Iterator[Tensor]:
    """Compute conv(silu(norm(source))) by strips; strip k of the source may be taken once strip k is returned."""
    normalization = Normalization.of(source, norm)
    above: Tensor | None = None
    for index in range(len(source.strips)):
        padded = _activated_with_halo(source, index, normalization, above)
        above = padded[:, :, -2:-1].clone()
        result = convolve(conv, padded)
        del padded
        yield result
        del result


def _activated_with_halo(source: StripMap, index: int, normalization: Normalization, above: Tensor | None) -> Tensor:
    strip = source.strip(index)
    _, channels, rows, width = strip.shape
    padded = _empty_like(strip, channels, rows + 2, width)
    normalization.activate(strip, into=padded[:, :, 1:-1])
    if above is None:
        padded[:, :, :1].zero_()
    else:
        padded[:, :, :1].copy_(above)
    if index + 1 == len(source.strips):
        padded[:, :, -1:].zero_()
    else:
        normalization.activate(source.strip(index + 1)[:, :, :1], into=padded[:, :, -1:])
    return padded


def convolve_upsampled(source: StripMap, conv: nn.Conv2d, strip_rows: int) -> Iterator[Tensor]:
    """Compute conv(nearest-neighbor doubling of source), in strips of an even number of rows; frees the source.

    In float32 by four 2x2 convolutions on the small map, which is 4/9 of the arithmetic. In half types the sums of
    kernel elements would be rounded once more, so the map is doubled there.
    """
    kernels = phase_kernels(conv.weight) if conv.weight.dtype == torch.float32 else None
    taken = 0
    for top in range(0, 2 * source.height, strip_rows):
        first, last = top // 2, min(top + strip_rows, 2 * source.height) // 2
        rows = source.rows(first - 1, last + 1)
        while (taken + 1) * source.strip_rows < last:  # row last - 1 is the next strip's halo
            source.take(taken)
            taken += 1
        if kernels is None:
            result = convolve(conv, F.interpolate(rows, scale_factor=2.0, mode="nearest")[:, :, 1:-1])
        else:
            result = _convolve_phases(rows, kernels, conv.bias)
        del rows
        yield result
        del result


def phase_kernels(weight: Tensor) -> list[list[Tensor]]:
    """The 2x2 kernels that make pixel (2y + p, 2x + q) of a 3x3 convolution of a doubled map, at [p][q].

    Of three neighboring rows of the doubled map two are equal, so their kernel rows are added: the even output row sees
    (above, itself twice), the odd one (itself twice, below); columns likewise.
    """
    pairs = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
    return [[torch.einsum("ar,ocrs,bs->ocab", down, weight, across) for across in pairs] for down in pairs]


def _convolve_phases(rows: Tensor, kernels: list[list[Tensor]], bias: Tensor | None) -> Tensor:
    """Shape: [1, channels, rows + 2, width], the halo included -> [1, out, 2 * rows, 2 * width]."""
    height, width = rows.shape[2] - 2, rows.shape[3]
    result = _empty_like(rows, kernels[0][0].shape[0], 2 * height, 2 * width)
    for down in (0, 1):
        for across in (0, 1):
            phase = F.conv2d(rows[:, :, down : down + height + 1], kernels[down][across], bias, padding=(0, 1))
            result[:, :, down::2, across::2] = phase[:, :, :, across : across + width]
    return result


def _empty_like(rows: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialized tensor of another shape with the same dtype, device and memory format."""
    memory_format = torch.channels_last if is_channels_last(rows) else torch.contiguous_format
    return torch.empty((1, channels, height, width), dtype=rows.dtype, device=rows.device, memory_format=memory_format)


def is_channels_last(rows: Tensor) -> bool:
    """Whether the channels of a pixel are adjacent in memory."""
    return rows.is_contiguous(memory_format=torch.channels_last) and not rows.is_contiguous()
