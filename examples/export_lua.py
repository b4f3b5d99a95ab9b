"""A trained LUA as a file of other tools: in the authors' released layout, or as SwinIR with one head.

python examples/export_lua.py lua.safetensors lua.pth          # heads.x2 and heads.x4, as the authors release them
python examples/export_lua.py lua.safetensors swinir.pth 2     # one head, for loaders of SwinIR such as spandrel

The layouts have no place for a skip connection, latent statistics or a LIIF head: train with `bicubic_skip`,
`linear_skip` and `latent_norm` off and the head `pixelshuffle`, as the preset `release` does.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.spec import LuaSpec
from giantleap.models.lua.swin import shift_mask


def main(source: str, target: str, scale: str | None = None) -> None:
    """Write the weights of `source` under the names that other tools expect."""
    net = read_lua(Path(source))
    spec = net.spec
    lost = [name for name in ("bicubic_skip", "linear_skip", "latent_norm") if getattr(spec, name)]
    if lost or spec.head != "pixelshuffle":
        raise SystemExit(f"{source}: the layout cannot hold {', '.join(lost) or 'a LIIF head'}; train without")
    weights = {**net.state_dict(), **size_buffers(spec)}
    if scale is not None:
        if int(scale) not in spec.scales:
            raise SystemExit(f"{source}: no head of scale {scale}; it has {', '.join(map(str, spec.scales))}")
        weights = to_swinir(weights, int(scale))
    torch.save({"params_ema": weights}, target)


def size_buffers(spec: LuaSpec) -> dict[str, Tensor]:
    """The buffers that SwinIR stores: for latents of two windows a side, as in the released file."""
    window = spec.window
    step = torch.arange(window)
    offset = step[:, None] - step[None, :] + window - 1
    index = (offset[:, None, :, None] * (2 * window - 1) + offset[None, :, None, :]).reshape(window**2, window**2)
    mask = shift_mask(2, 2, window, torch.zeros(()))
    buffers = {}
    for layer, depth in enumerate(spec.depths):
        for block in range(depth):
            place = f"layers.{layer}.residual_group.blocks.{block}"
            buffers[f"{place}.attn.relative_position_index"] = index
            if spec.shift and block % 2:
                buffers[f"{place}.attn_mask"] = mask
    return buffers


def to_swinir(weights: dict[str, Tensor], scale: int) -> dict[str, Tensor]:
    """The trunk and one head under the names of SwinIR's `pixelshuffle` upsampler."""
    trunk = {key: value for key, value in weights.items() if not key.startswith("heads.")}
    head = f"heads.x{scale}."
    own = {key.removeprefix(head): value for key, value in weights.items() if key.startswith(head)}
    return trunk | {key.replace("conv_before.", "conv_before_upsample."): value for key, value in own.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
