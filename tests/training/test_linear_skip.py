"""The least-squares skip: it finds a linear map that is there, and a run starts with it."""

import pytest
import torch
import torch.nn.functional as F

from giantleap.models.lua.network import Lua, LuaSpec
from giantleap.training.linear_skip import SkipFit, fit_linear_skip

SPEC = LuaSpec(4, 12, (2,), 2, window=4, num_feat=8, linear_skip=True, latent_norm=True)


class MemoryStore:
    """Pairs in memory, read as `PairsStore` reads them."""

    def __init__(self, latents: dict[int, torch.Tensor]) -> None:
        self.latents = latents

    def read(self, tiles: range, levels: tuple[int, ...] = (1, 2, 4)) -> dict[int, torch.Tensor]:
        return {level: self.latents[level][tiles.start : tiles.stop] for level in levels}


@pytest.mark.parametrize("scale", [2, 4])
def test_a_linear_enlargement_is_found(scale: int) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 3 * scale**2, 5, padding=2, padding_mode="replicate").double()
    small = torch.randn(24, 3, 12, 12).double()
    with torch.no_grad():
        large = F.pixel_shuffle(conv(small), scale)
    fit = SkipFit(3, scale)
    for part in range(0, 24, 8):
        fit.add(small[part : part + 8], large[part : part + 8])
    weight, bias = fit.solve()
    assert conv.bias is not None
    assert (weight - conv.weight).abs().max() < 1e-4
    assert (bias - conv.bias).abs().max() < 1e-4


def test_a_fitted_network_starts_nearer_to_the_large_latents_than_bicubic() -> None:
    torch.manual_seed(0)
    large = F.interpolate(torch.randn(12, 4, 8, 8), scale_factor=8, mode="bicubic") * 3.0 + 1.0
    large = large.roll(2, dims=3)  # what bicubic enlargement does not know
    latents = {level: F.avg_pool2d(large, level) if level > 1 else large for level in (1, 2, 4)}
    net = Lua(SPEC).eval()
    net.set_latent_statistics(large.mean(dim=(0, 2, 3)), large.std(dim=(0, 2, 3)))
    latents[2] = latents[2].roll(1, dims=3)
    with torch.no_grad():
        before = (net(latents[2], 2) - large).square().mean()
        fit_linear_skip(net, MemoryStore(latents), 12)  # type: ignore[arg-type]
        after = (net(latents[2], 2) - large).square().mean()
    assert after < 0.5 * before


def test_a_network_without_a_linear_skip_is_refused() -> None:
    net = Lua(LuaSpec(4, 12, (2,), 2, window=4, num_feat=8))
    with pytest.raises(ValueError, match="linear_skip=False"):
        fit_linear_skip(net, MemoryStore({}), 1)  # type: ignore[arg-type]
