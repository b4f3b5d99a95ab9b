"""Changes of a UNet that last as long as a `with` block: hooks that are removed, convolutions that are set back.

Nothing is replaced and no weight is written, so that the UNet is the same bit for bit afterwards, however the block
ends. Places in a UNet are given by level, 0 for the largest maps, because block names differ between SD and SDXL.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a convolution reads its input."""

    stride: Pair
    padding: Pair
    dilation: Pair

    @classmethod
    def of(cls, conv: Any) -> "Geometry":
        """That of a convolution."""
        return cls(conv.stride, conv.padding, conv.dilation)

    def set_on(self, conv: Any) -> None:
        """Give it to a convolution."""
        conv.stride, conv.padding, conv.dilation = self.stride, self.padding, self.dilation


def geometry_inside(stack: ExitStack, conv: nn.Module, choose: Callable[[Geometry], Geometry]) -> None:
    """While a convolution runs, give it the geometry that `choose` makes of its own; until the stack closes."""
    for layer in _layers(conv):
        own = Geometry.of(layer)

        def before(layer: nn.Module, inputs: Any, own: Geometry = own) -> None:
            choose(own).set_on(layer)

        def after(layer: nn.Module, inputs: Any, output: Any, own: Geometry = own) -> None:
            own.set_on(layer)

        stack.callback(own.set_on, layer)
        stack.callback(layer.register_forward_pre_hook(before).remove)
        stack.callback(layer.register_forward_hook(after, always_call=True).remove)


def _layers(conv: nn.Module) -> Iterator[nn.Module]:
    """The convolution itself; of one with LoRA weights (PEFT) its own layer and those that read the same input."""
    base = getattr(conv, "base_layer", None)
    if base is None:
        yield conv
    else:
        yield base
        yield from getattr(conv, "lora_A", {}).values()


def attention_level(unet: Any) -> int:
    """The first level with attention: 0 in SD, 1 in SDXL; the number of levels if there is none."""
    blocks = unet.down_blocks
    return next((level for level, block in enumerate(blocks) if hasattr(block, "attentions")), len(blocks))


def down_block(unet: Any, level: int) -> Any:
    """The block that goes down from a level."""
    return unet.down_blocks[level]


def up_block(unet: Any, level: int) -> Any:
    """The block that works at a level on the way up, and then goes to the next larger maps."""
    return unet.up_blocks[len(unet.down_blocks) - 1 - level]


def pair_end(block: Any, index: int) -> nn.Module:
    """The last module of pair `index` of a block: its attention, or its resnet where it has none."""
    modules = block.attentions if hasattr(block, "attentions") else block.resnets
    last: nn.Module = modules[index]
    return last
