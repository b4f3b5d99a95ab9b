"""Chooses the form in which a LUA runs: packed for oneDNN on a CPU (`models/engines/packed_lua.py`), else as it is.

The packed form uses private operators of torch. `pack_lua` therefore compares its output with the network's at load.
"""

import copy
import logging
from typing import Protocol

import torch
from torch import Tensor

from giantleap.models.engines.packed_lua import PackedLua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec

log = logging.getLogger(__name__)

# Largest difference as a share of the output's largest value. 1e-5 was measured in float32.
_MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.1}


_ALLOWED_RATIO = 4.0  # of the packed form's error to the network's own


class LatentUpscaler(Protocol):
    """A `Lua`, or its packed form."""

    @property
    def spec(self) -> LuaSpec:
        """The network's spec."""
        ...

    def __call__(self, latent: Tensor, scale: float) -> Tensor:
        """See `Lua.forward`."""
        ...


class PackingError(ValueError):
    """The packed form computes something else than the network."""


def packing_unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this machine cannot run the packed form; None where it can."""
    if device.type != "cpu":
        return f"it is for a CPU, and the device is {device}"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this torch has no oneDNN, or it is switched off"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 for this CPU"
    if dtype not in _MAX_ERROR:
        return f"it computes in float32 or bfloat16, not in {dtype}"
    return None


def pack_lua(net: Lua, device: torch.device, dtype: torch.dtype) -> LatentUpscaler:
    """The packed form of a network, or the network itself where there is no packed form for it or for this machine.

    The network itself computes in `dtype` under autocast.

    Raises:
        PackingError: The packed form computes something else: this build of torch must not be used.
    """
    if net.spec.head == "liif":
        log.info("a LUA with a LIIF head has no packed form and runs as it is")
        return net
    if packing_unavailable_reason(device, dtype) is not None:
        return net
    packed = PackedLua(net, dtype)
    return packed if check_packed(packed, net) else net


@torch.inference_mode()
def check_packed(packed: PackedLua, net: Lua) -> bool:
    """Compare both forms on noise of two by three windows, at every scale.

    Where they differ, the network in float64 decides. One that amplifies rounding is far from it in either form, and in
    the packed form perhaps farther, because that adds in another order.

    Returns:
        Whether the packed form is about as exact as the network.

    Raises:
        PackingError: They differ, though the network is exact.
    """
    generator = torch.Generator().manual_seed(0)
    window = net.spec.window
    latent = torch.randn(2, net.spec.channels, 2 * window, 3 * window, generator=generator)
    limit = _MAX_ERROR[packed.dtype]
    for scale in net.spec.scales:
        actual = packed(latent, scale)
        error = _relative_error(actual, net(latent, scale))
        if error <= limit:
            continue
        exact = copy.deepcopy(net).double()(latent.double(), scale)
        with torch.autocast("cpu", packed.dtype, enabled=packed.dtype != torch.float32):
            own_error = _relative_error(net(latent, scale), exact)
        if own_error <= limit:
            raise PackingError(
                f"the packed LUA in {packed.dtype} differs from the network by {error:.2g} of the largest value at "
                f"x{scale}; at most {limit:.2g} is expected. Use another build than torch {torch.__version__}"
            )
        log.warning("this LUA amplifies rounding: in %s its error at x%d is %.2g", packed.dtype, scale, own_error)
        if not _relative_error(actual, exact) <= _ALLOWED_RATIO * own_error:
            return False
    return True


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
