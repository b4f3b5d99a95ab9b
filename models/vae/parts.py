"""Reports how far a network is, from hooks on its layers, for work that is done in one call."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from giantleap.models.device import PartCallback

_LAYERS = (nn.Conv2d, nn.Conv3d, nn.Linear)


@contextmanager
def report_layers(network: nn.Module, on_part: PartCallback | None, once: bool = True) -> Iterator[None]:
    """Call `on_part` after each convolution and linear layer of a network.

    Args:
        network: Called inside the context.
        on_part: None for no reports.
        once: Whether the network is called once, so that the fraction that is done is known.
    """
    if on_part is None:
        yield
        return
    layers = [layer for layer in network.modules() if isinstance(layer, _LAYERS)]
    done = 0

    def report(*_: object) -> None:
        nonlocal done
        done += 1
        on_part(min(1.0, done / len(layers)) if once else None)

    hooks = [layer.register_forward_hook(report) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
