"""A LUA of random weights for the tests of whatever runs, writes or exports one."""

import torch

from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec


def random_lua(spec: LuaSpec, spread: float = 0.2, seed: int = 0) -> Lua:
    """A net whose every weight is random, norms included, and large enough that a mistake shows.

    Effects: seeds torch's global generator.
    """
    torch.manual_seed(seed)
    net = Lua(spec).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, spread)
    if spec.latent_norm:
        net.set_latent_statistics(torch.linspace(-1, 1, spec.channels), torch.linspace(0.5, 4, spec.channels))
    return net
