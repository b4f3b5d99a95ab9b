"""Refuses to export a LUA in float16 whose values come near the end of that type's range.

The residual stream of a Swin network is not normalized and may grow from group to group; beyond 65,504 every value of
the image becomes NaN, perhaps only for some images. The other engines never compute in float16
(`giantleap.models.device.choose_upscaler_dtype`).
"""

from typing import Any

import torch
from torch import Tensor

from giantleap.export.manifest import ArtifactError
from giantleap.models.lua.network import Lua

HEADROOM = 8.0  # how much larger than those of ordinary latents the values of others may be


@torch.inference_mode()
def check_float16_range(net: Lua, scale: int, latents: Tensor) -> None:
    """Run the network in float32 and look at the values of every layer.

    Args:
        net: The network, in float32.
        scale: One of its scales.
        latents: Ordinary ones, [batch, channels, h, w], multiples of the window, on the network's device.

    Raises:
        ArtifactError: A value is beyond the range of float16 over `HEADROOM`.
    """
    peak = latents.new_zeros(())

    def watch(module: torch.nn.Module, given: Any, output: Any) -> None:
        nonlocal peak
        if isinstance(output, Tensor):
            peak = torch.maximum(peak, output.abs().max())

    hooks = [module.register_forward_hook(watch) for module in net.modules()]
    try:
        net.core(latents, scale)
    finally:
        for hook in hooks:
            hook.remove()
    limit = torch.finfo(torch.float16).max / HEADROOM
    if not float(peak) <= limit:
        raise ArtifactError(
            f"fp16: ordinary latents reach {float(peak):.3g} inside this LUA; above {limit:.0f} others may overflow "
            "to NaN; export it with --precision bf16 or fp32"
        )
