"""Keeps an upscaled latent within what its training has seen: a bounded residual around the bicubic latent.

LUA has no bound of its own (arXiv 2511.10629 names that as a limitation): latents from outside its training can come
out far beyond what the decoder knows. The guard runs after any engine, and latents like those of the training pass it
unchanged to the bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.lua.statistics import LatentStatistics, StatisticsError

KNEE = 0.5  # share of the bound up to which a residual passes unchanged


def limit_softly(values: Tensor, bound: Tensor) -> Tensor:
    """The identity up to half of the bound, then a tanh that never passes it.

    With a = KNEE * bound: f(x) = x for |x| <= a, else sign(x) (a + (bound - a) tanh((|x| - a) / (bound - a))). Slope 1
    and curvature 0 on both sides of the knee, so it is smooth there twice; the slope is positive wherever tanh of
    float32 is below 1. Ours; the paper has no bound.

    Shape:
        Both broadcast to one shape; `bound` >= 0, and 0 gives 0.
    """
    knee = KNEE * bound
    room = bound - knee
    beyond = (values.abs() - knee).clamp(min=0.0)  # the branch not taken must give no NaN to the gradient
    bent = knee + room * torch.tanh(beyond / room.clamp(min=torch.finfo(values.dtype).tiny))
    return torch.where(values.abs() <= knee, values, torch.copysign(bent, values))


class LatentClamp:
    """The bound of one LUA.

    With mean m and deviation s of the large latents, r of the residual at this scale, all per channel, and k `sigmas`:

        b = clamp(bicubic(clamp(z)))              clamp: to m - k s ... m + k s
        B = min(k r, m + k s - b)                 above b; min(k r, b - m + k s) below it
        guarded = b + limit_softly(grown - b, B)

    So every value is within k s of m and within k r of b, whatever came in (NaN stays NaN). Where z and b are within
    k s of m, and grown - b within half of B, guarded is grown, to the bit.

    Args:
        statistics: Stored with the weights.
        sigmas: k; positive.
        device: Where the latents are.

    Raises:
        ValueError: `sigmas` is not positive.
    """

    def __init__(self, statistics: LatentStatistics, sigmas: float, device: torch.device) -> None:
        if not sigmas > 0.0:
            raise ValueError(f"a guard's sigmas must be positive; found {sigmas}")
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (statistics.mean, statistics.std))
        self.statistics = statistics
        self.sigmas = sigmas
        self._low, self._high = mean - sigmas * std, mean + sigmas * std
        self._reach = {
            scale: sigmas * torch.tensor(rms, device=device).view(-1, 1, 1)
            for scale, rms in statistics.residual_rms.items()
        }

    def limit(self, small: Tensor, upscaled: Tensor, scale: float) -> Tensor:
        """Bounds what an engine made of `small`.

        For a scale between measured ones the statistics are those of the next larger one, whose residual is larger.

        Shape:
            [batch, channels, h, w] and [batch, channels, scale * h, scale * w] -> as the latter, float32.

        Raises:
            StatisticsError: There are none for so large a scale, or for other channels.
        """
        measured = min((known for known in self._reach if known >= scale), default=None)
        if measured is None or small.shape[1] != self.statistics.channels:
            raise StatisticsError(
                f"guard: statistics of {self.statistics.channels} channels at scales {sorted(self._reach)}; "
                f"asked for {small.shape[1]} channels at {scale}"
            )
        upscaled = upscaled.float()
        # Clamped before as well: bicubic weights of both signs would make NaN of values near the end of float32.
        inside = small.float().clamp(self._low, self._high)
        size = (upscaled.shape[-2], upscaled.shape[-1])
        base = F.interpolate(inside, size=size, mode="bicubic").clamp(self._low, self._high)
        residual = upscaled - base
        room = torch.where(residual >= 0, self._high - base, base - self._low)
        bound = torch.minimum(room, self._reach[measured].expand_as(room))
        bent = (base + limit_softly(residual, bound)).clamp(self._low, self._high)
        # Not base + residual: that rounds, and a latent that needs no bound stays the same to the bit.
        return torch.where(residual.abs() <= KNEE * bound, upscaled, bent)
