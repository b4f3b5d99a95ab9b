"""A LUA is exported in float16 only if ordinary latents leave room in that type's range."""

import pytest
import torch

from giantleap.export.float16_range import check_float16_range
from giantleap.export.manifest import ArtifactError
from giantleap.models.lua.spec import LuaSpec
from tests.random_lua import random_lua

SPEC = LuaSpec(4, 12, (2, 2), 2, window=4, num_feat=8)
LATENTS = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))


def test_a_network_of_ordinary_values_passes_and_keeps_no_hook() -> None:
    net = random_lua(SPEC, spread=0.05)
    check_float16_range(net, 2, LATENTS)
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("factor", [3e4, 1e9, float("nan")])
def test_a_network_whose_residual_stream_comes_near_the_end_is_refused(factor: float) -> None:
    net = random_lua(SPEC, spread=0.05)
    with torch.no_grad():
        net.layers[0].get_parameter("conv.weight").mul_(factor)
    with pytest.raises(ArtifactError, match="--precision bf16 or fp32"):
        check_float16_range(net, 2, LATENTS)
