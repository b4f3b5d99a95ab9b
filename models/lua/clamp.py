"""Clamps an upscaled latent to the range that LUA's training has seen: a bounded residual around the bicubic latent.

LUA has no bound of its own (arXiv 2511.10629 names that as a limitation): for unusual inputs its output can be far
beyond what the decoder knows. The clamp runs after any engine, and changes no bit of latents like those of the
training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.lua.statistics import LatentStatistics, StatisticsError

KNEE = 0.5  # share of the bound up to which a residual passes unchanged


def limit_softly(values: Tensor, bound: Tensor) -> Tensor:
    """Limit values smoothly: the identity up to half of the bound, then a tanh that never exceeds it.

    With a = KNEE * bound: f(x) = x for |x| <= a, else sign(x) (a + (bound - a) tanh((|x| - a) / (bound - a))). The
    slope is 1 and the curvature 0 on both sides of the knee; the slope is positive wherever tanh in float32 is below 1.
    The paper has no bound.

    Args:
        values: Any shape.
        bound: Broadcasts with `values`; >= 0, and 0 gives 0.
    """
    knee = KNEE * bound
    room = bound - knee
    beyond = (values.abs() - knee).clamp(min=0.0)  # keeps NaN out of the gradient of the branch not taken
    bent = knee + room * torch.tanh(beyond / room.clamp(min=torch.finfo(values.dtype).tiny))
    return torch.where(values.abs() <= knee, values, torch.copysign(bent, values))


class LatentClamp:
    """The bound of one LUA.

    With mean m and deviation s of the large latents, r of the residual at this scale, all per channel, and k `sigmas`:

        b = clamp(bicubic(clamp(z)))              clamp: to m - k s ... m + k s
        B = min(k r, m + k s - b)                 above b; min(k r, b - m + k s) below it
        clamped = b + limit_softly(upscaled - b, B)

    So every value is within k s of m and within k r of b for any input (NaN stays NaN). Where z and b are within k s of
    m and upscaled - b is within half of B, the output is `upscaled` to the bit.

    Args:
        statistics: Stored with the weights.
        sigmas: k; positive.
        device: Where the latents are.

    Raises:
        ValueError: `sigmas` is not positive.
    """

    def __init__(self, statistics: LatentStatistics, sigmas: float, device: torch.device) -> None:
        if not sigmas > 0.0:
            raise ValueError(f"sigmas of a clamp must be positive; found {sigmas}")
        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (statistics.mean, statistics.std))
        self.statistics = statistics
        self.sigmas = sigmas
        self._low, self._high = mean - sigmas * std, mean + sigmas * std
        self._reach = {
            scale: sigmas * torch.tensor(rms, device=device).view(-1, 1, 1)
            for scale, rms in statistics.residual_rms.items()
        }

    def limit(self, small: Tensor, upscaled: Tensor, scale: float) -> Tensor:
        """Bound the output of an engine.

        For a scale between measured ones the statistics of the next larger one apply, whose residual is larger.

        Args:
            small: The input, [batch, channels, h, w].
            upscaled: The output, [batch, channels, scale * h, scale * w].
            scale: The scale.

        Returns:
            As `upscaled`, float32.

        Raises:
            StatisticsError: There are none for so large a scale, or they are for other channels.
        """
        measured = min((known for known in self._reach if known >= scale), default=None)
        if measured is None or small.shape[1] != self.statistics.channels:
            raise StatisticsError(
                f"clamp: statistics of {self.statistics.channels} channels at scales {sorted(self._reach)}; "
                f"got {small.shape[1]} channels at scale {scale}"
            )
        upscaled = upscaled.float()
        # Clamped before too: bicubic weights have both signs and make NaN of values near the end of float32.
        inside = small.float().clamp(self._low, self._high)
        size = (upscaled.shape[-2], upscaled.shape[-1])
        base = F.interpolate(inside, size=size, mode="bicubic").clamp(self._low, self._high)
        residual = upscaled - base
        room = torch.where(residual >= 0, self._high - base, base - self._low)
        bound = torch.minimum(room, self._reach[measured].expand_as(room))
        bent = (base + limit_softly(residual, bound)).clamp(self._low, self._high)
        # Not base + residual, which rounds: a latent within the bound stays the same to the bit.
        return torch.where(residual.abs() <= KNEE * bound, upscaled, bent)
