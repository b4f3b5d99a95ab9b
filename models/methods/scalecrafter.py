"""ScaleCrafter: chosen convolutions read farther apart in early steps, so that they see as much of a large image.

At 4 times the size the dilation falls with the steps, and guidance takes its negative half from a less dilated UNet.
Without FreeU and without dispersed convolution, which the authors' settings leave off.

Ref: arXiv 2310.07702; factors of SDXL and SD 1.5 as its authors set them, by level.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from giantleap.models.methods.denoiser import Denoiser, guide
from giantleap.models.methods.passes import undilated_from
from giantleap.models.methods.unet_hooks import Geometry, attention_level, down_block, geometry_inside, up_block
from giantleap.models.methods.views import View


@dataclass(frozen=True, slots=True)
class DilatedConv:
    """A convolution and its factors, 1 for none.

    Args:
        conv: Of a UNet.
        strong: Factor in the UNet that follows the prompt.
        weak: Factor in the UNet that keeps the structure.
    """

    conv: nn.Module
    strong: int
    weak: int


@dataclass(frozen=True, slots=True)
class ScaleCrafterPlan:
    """Which convolutions are dilated, and until when.

    Args:
        convs: The convolutions.
        until: The first step without any dilation.
        falls: Whether factors fall to 2 with the steps, and guidance takes two UNets.
    """

    convs: Sequence[DilatedConv]
    until: int
    falls: bool

    def factor(self, own: int, index: int) -> int:
        """A factor in a step."""
        if own == 1 or index >= self.until:
            return 1
        return max(math.ceil(own * (self.until - index) / self.until), 2) if self.falls else own


def plan_scalecrafter(unet: Any, scale: float, steps: int) -> ScaleCrafterPlan:
    """The authors' factors for SDXL, which has no attention at level 0, or for SD 1.5, which has."""
    is_large = scale > 2
    weak = _factors(unet, is_large=False)
    strong = _factors(unet, is_large=True) if is_large else weak
    convs = [DilatedConv(conv, strong.get(conv, 1), weak.get(conv, 1)) for conv in dict.fromkeys([*strong, *weak])]
    return ScaleCrafterPlan(convs, undilated_from(scale, steps), is_large)


def _factors(unet: Any, is_large: bool) -> dict[nn.Module, int]:
    last = len(unet.down_blocks) - 1
    is_sd15 = attention_level(unet) == 0
    most = 4 if is_large else 2
    factors = {conv: most for resnet in unet.mid_block.resnets for conv in (resnet.conv1, resnet.conv2)}
    lowest = 1 if is_sd15 else last if is_large else last + 1
    for level in range(lowest, last + 1):
        factors |= dict.fromkeys(_convs(down_block(unet, level)), max(most - (last - level), 2) if is_large else 2)
    lowest = 1 if is_sd15 else 0 if is_large else last
    for level in range(lowest, last + 1):
        factors |= dict.fromkeys(_convs(up_block(unet, level)), max(most - (last - level), 2) if is_large else 2)
    return factors


def _convs(block: Any) -> list[nn.Module]:
    samplers = [*(getattr(block, "downsamplers", None) or []), *(getattr(block, "upsamplers", None) or [])]
    resnets = [conv for resnet in block.resnets for conv in (resnet.conv1, resnet.conv2)]
    return [*resnets, *(sampler.conv for sampler in samplers)]


class ScaleCrafter:
    """The state of one image's run, which the hooks read, and its network as a `Predict`.

    Args:
        plan: What is dilated when.
        denoiser: The network.
    """

    def __init__(self, plan: ScaleCrafterPlan, denoiser: Denoiser) -> None:
        self._plan = plan
        self._denoiser = denoiser
        self._index = 0
        self._is_weak = False

    def begin(self, index: int) -> None:
        """Set the step."""
        self._index = index

    def dilate(self, conv: DilatedConv, own: Geometry) -> Geometry:
        """The geometry of a convolution now."""
        return dilated(own, self._plan.factor(conv.weak if self._is_weak else conv.strong, self._index))

    def __call__(self, x: Tensor, t: Tensor, view: View) -> Tensor:
        """Noise-damped guidance: weak(negative) + guidance * (strong(prompt) - strong(negative))."""
        away, toward = self._denoiser.halves(x, t, view)
        if not self._plan.falls or self._index >= self._plan.until or view.guidance_scale <= 1:
            return guide(away, toward, view.guidance_scale)
        self._is_weak = True
        try:
            weak_away, _ = self._denoiser.halves(x, t, view)
        finally:
            self._is_weak = False
        return weak_away + view.guidance_scale * (toward - away)


@contextmanager
def scalecrafter(plan: ScaleCrafterPlan, denoiser: Denoiser) -> Iterator[ScaleCrafter]:
    """Dilate the convolutions of a plan inside the block."""
    state = ScaleCrafter(plan, denoiser)
    with ExitStack() as stack:
        for conv in plan.convs:
            geometry_inside(stack, conv.conv, lambda own, conv=conv: state.dilate(conv, own))  # type: ignore[misc]
        yield state


def dilated(own: Geometry, factor: int) -> Geometry:
    """A 3x3 convolution that reads `factor` times as far apart; 1 is the convolution itself."""
    if factor == 1:
        return own
    return Geometry(own.stride, (factor, factor), (factor, factor))
