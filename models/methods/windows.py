"""Overlapping windows over a latent: where they lie, jittered, and how their results are averaged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.methods.views import NoiseSource

Corner = tuple[int, int]


@dataclass(frozen=True, slots=True)
class WindowGrid:
    """Windows of one latent, half a window apart, in the coordinates of the latent padded by `pad` on all sides.

    Args:
        height: Of the latent, latent pixels.
        width: Likewise.
        window: Side of a window.
    """

    height: int
    width: int
    window: int

    @property
    def stride(self) -> int:
        """Distance of windows."""
        return max(1, self.window // 2)

    @property
    def pad(self) -> int:
        """How far a window may be moved."""
        return (self.window - self.stride) // 4

    @property
    def size(self) -> Corner:
        """Height and width of a window; a side of the latent below the window's is one window."""
        return min(self.window, self.height), min(self.window, self.width)

    def corners(self, noise: NoiseSource) -> list[Corner]:
        """Top and left of every window, moved at random but never out of the padded latent."""
        return [
            (
                top + self.pad + self._jitter(top, self.height, self.size[0], noise),
                left + self.pad + self._jitter(left, self.width, self.size[1], noise),
            )
            for top in starts(self.height, self.window, self.stride)
            for left in starts(self.width, self.window, self.stride)
        ]

    def average(
        self, x: Tensor, corners: Sequence[Corner], run: Callable[[Tensor, Sequence[Corner]], Tensor]
    ) -> Tensor:
        """Run all windows of a latent and average the results where they overlap.

        Args:
            x: [1, channels, height, width].
            corners: From `corners`.
            run: From windows [windows, channels, *size] and their corners to results of the same shape.
        """
        padded = F.pad(x, (self.pad,) * 4)
        total, count = torch.zeros_like(padded), torch.zeros_like(padded[:, :1])
        height, width = self.size
        cut = torch.cat([padded[:, :, top : top + height, left : left + width] for top, left in corners])
        for result, (top, left) in zip(run(cut, corners), corners, strict=True):
            total[0, :, top : top + height, left : left + width] += result
            count[:, :, top : top + height, left : left + width] += 1
        inner = (..., slice(self.pad, self.pad + self.height), slice(self.pad, self.pad + self.width))
        return total[inner] / count[inner]

    def _jitter(self, start: int, side: int, window: int, noise: NoiseSource) -> int:
        at_start, at_end = start == 0, start + window == side
        if at_start and at_end:
            return 0
        return noise.integer(0 if at_end else -self.pad, 0 if at_start else self.pad)


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin on an axis; the last one is moved back to end at the border."""
    count = int((side - window) / stride - 1e-6) + 2 if side > window else 1
    return [max(0, min(index * stride, side - window)) for index in range(count)]
