"""Where a CPU runs LUA in its prepared form (`models/engines/packed_lua.py`): what the machine must have, whether it
pays and whether the answer is the network's. `prepare_lua` takes a loaded `giantleap.models.lua.network.Lua` and gives
back what to run.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.engines.packed_layers import PackedLinear
from giantleap.models.engines.packed_lua import PackedLua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec

log = logging.getLogger(__name__)

_TRIAL_TOKENS = 1024
_TRIAL_RUNS = 7
_FLOAT32_BOUND = 1e-4  # of the output's largest value; what was seen is 1e-5 of it
_BFLOAT16_BOUND = 0.1


class LatentUpscaler(Protocol):
    """What enlarges latents: a `Lua`, or one that was prepared."""

    @property
    def spec(self) -> LuaSpec: ...

    def __call__(self, latent: Tensor, scale: float) -> Tensor:
        """As `Lua.forward`."""
        ...


class PreparationError(ValueError):
    """The prepared form does not compute what the network does."""


def why_not_prepared(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this machine cannot run the prepared form; None where it can."""
    if device.type != "cpu":
        return f"it is for a CPU, and the device is {device}"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this torch has no oneDNN, or it is switched off"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 for this CPU"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32 or bfloat16, and {dtype} was asked for"
    return None


def prepare_lua(net: Lua, device: torch.device, dtype: torch.dtype) -> LatentUpscaler:
    """The fastest form of a network that gives its answer: prepared where this machine can and is faster with it.

    Without it the network itself comes back; it computes in `dtype` under autocast. So does one with a LIIF head, which
    has no prepared form.

    Raises:
        PreparationError: The prepared form answered something else: this build of torch must not be used.
    """
    if net.spec.head == "liif":
        log.info("a LUA with a LIIF head runs as the network itself, not in the form for a CPU")
        return net
    if why_not_prepared(device, dtype) is not None or not packed_is_faster(net.spec, dtype):
        return net
    prepared = PackedLua(net, dtype)
    check_prepared(prepared, net)
    return prepared


def packed_is_faster(spec: LuaSpec, dtype: torch.dtype) -> bool:
    """Times the widest linear layer of the network both ways, in the time of this thread alone."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        x = torch.randn(_TRIAL_TOKENS, spec.embed_dim, dtype=dtype)
        weight, bias = torch.randn(3 * spec.embed_dim, spec.embed_dim, dtype=dtype), x.new_zeros(3 * spec.embed_dim)
        packed = PackedLinear.pack(weight, bias, dtype)
        runs: Sequence[Callable[[], Tensor]] = (lambda: packed(x), lambda: F.linear(x, weight, bias))
        packed_s, plain_s = _min_seconds(runs)
    return packed_s <= 1.1 * plain_s  # a tie goes to the packed form, which saves more than this layer shows


def _min_seconds(runs: Sequence[Callable[[], Tensor]]) -> list[float]:
    """The least time of each, interleaved; the first of each is thrown away."""
    least = [float("inf")] * len(runs)
    for number in range(_TRIAL_RUNS + 1):
        for index, run in enumerate(runs):
            started_s = time.perf_counter()
            run()
            if number:
                least[index] = min(least[index], time.perf_counter() - started_s)
    return least


@torch.inference_mode()
def check_prepared(prepared: PackedLua, net: Lua) -> None:
    """Compares the two on noise of two by three windows, at every scale.

    Raises:
        PreparationError: They differ by more than the dtype explains.
    """
    generator = torch.Generator().manual_seed(0)
    window = net.spec.window
    latent = torch.randn(2, net.spec.channels, 2 * window, 3 * window, generator=generator)
    bound = _FLOAT32_BOUND if prepared.dtype == torch.float32 else _BFLOAT16_BOUND
    for scale in net.spec.scales:
        expected, found = net(latent, scale), prepared(latent, scale)
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= bound:
            raise PreparationError(
                f"LUA prepared for this CPU in {prepared.dtype} differs from the network by {error:.2g} of the "
                f"largest value at x{scale}; at most {bound:.2g} is expected. torch {torch.__version__} is at fault"
            )
