"""The values of a refine pass: a second, short sampling of the enlarged latent. Nothing here imports torch.

`giantleap.models.generation.refine` runs it.

Ref: SDEdit, arXiv 2108.01073.
"""

import math
from dataclasses import dataclass

DEFAULT_STRENGTH = 0.15
DEFAULT_STEPS = 4
MAX_STRENGTH = 0.5
MAX_SCHEDULE_STEPS = 1000

_SEED_MASK = 0x2545_F491_4F6C_DD1D


@dataclass(frozen=True, slots=True)
class Refinement:
    """How strongly a latent is sampled again.

    Args:
        strength: Share of the noise schedule that is run again, above 0 and up to `MAX_STRENGTH`.
        steps: Denoising steps that are run: the last ones of a schedule of `schedule_steps`.
    """

    strength: float
    steps: int

    @property
    def schedule_steps(self) -> int:
        """Steps of the whole schedule, of which the last `steps` are about the share `strength`."""
        return math.ceil(self.steps / self.strength - 1e-9)


def refine_seed(seed: int) -> int:
    """The seed of the noise of an image's refine pass, which is not the seed of the noise of any near image."""
    return seed ^ _SEED_MASK


def window_starts(side: int, window: int, unit: int = 1) -> list[int]:
    """Where windows start along a side: as few as overlap by a quarter or more, spread evenly.

    Args:
        side: A multiple of `unit`.
        window: Side of a window, a multiple of `unit`; with fewer than four units there may be no overlap.
        unit: Every start is a multiple of it.
    """
    if side <= window:
        return [0]
    last, stride = (side - window) // unit, max(1, (window - window // 4) // unit)
    count = -(-last // stride) + 1
    return [unit * round(index * last / (count - 1)) for index in range(count)]
