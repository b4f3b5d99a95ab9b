"""The comparison of the guard: what counts as broken, and that each change of a latent is the one it says."""

import pytest
import torch
from torch import Tensor

from benchmarks.quality.clamp.run import BROKEN_SHARE, changes, judge, measure_case, reach, summarize, to_table
from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.lua.clamp import LatentClamp
from giantleap.models.lua.network import Lua, LuaSpec
from giantleap.models.lua.statistics import LatentStatistics
from giantleap.models.pixels.images import psnr_db

STATISTICS = LatentStatistics((0.0,) * 16, (2.0,) * 16, {2: (0.5,) * 16, 4: (0.5,) * 16}, tiles=1)


class Block:
    """A decoder that shows the first three channels, each value as 8 x 8 pixels."""

    def decode(self, latent: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(latent[:, :3], scale_factor=8.0)


def test_an_image_is_broken_by_pixels_far_out_or_values_that_are_not_finite() -> None:
    picture = torch.zeros(1, 3, 100, 100)
    picture[0, 1, 0, :100] = 1.6  # one pixel in a hundred, just as many as are allowed
    assert judge(picture).far_share == pytest.approx(BROKEN_SHARE) and not judge(picture).is_broken
    picture[0, 2, 1, 0] = -1.6
    assert judge(picture).is_broken
    assert not judge(torch.full((1, 3, 4, 4), 1.5)).is_broken
    nan = torch.zeros(1, 3, 4, 4)
    nan[0, 0, 0, 0] = float("nan")
    assert judge(nan).is_broken and psnr_db(nan, torch.zeros(1, 3, 4, 4)) == float("-inf")


def test_changes_are_what_their_names_say() -> None:
    z = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    made = {name: change(z, torch.Generator().manual_seed(1)) for name, change in changes(STATISTICS).items()}
    assert torch.equal(made["as trained"], z) and torch.equal(made["scaled 4"], 4 * z)
    assert (made["noisy 1.0"] - z).std() == pytest.approx(2.0, rel=0.1)
    flux = LATENT_SPACES["flux1"]
    torch.testing.assert_close(made["family flux1: unscaled twice"], z / flux.scale + flux.shift)
    permuted = made["channels permuted"]
    assert not torch.equal(permuted, z)
    assert sorted(permuted.sum(dim=(0, 2, 3)).tolist()) == pytest.approx(
        sorted(z.sum(dim=(0, 2, 3)).tolist()), abs=1e-5
    )


def test_the_guard_mends_what_only_the_adapter_broke() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lua = Lua(LuaSpec(16, 12, (1,), 2, window=4, num_feat=8, bicubic_skip=True)).eval()
        torch.nn.init.constant_(lua.heads["x2"].get_parameter("conv_last.bias"), 5.0)  # an adapter that runs away
    guards = {2.0: LatentClamp(STATISTICS, 2.0, torch.device("cpu"))}
    small = 0.1 * torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    case = measure_case(Block(), lua, guards, small, 2)  # type: ignore[arg-type]
    assert case["off"]["is_broken"] and not case["2"]["is_broken"] and not case["bicubic"]["is_broken"]
    assert case["2"]["psnr_to_bicubic_db"] > case["off"]["psnr_to_bicubic_db"]
    row = summarize([case, case])
    assert (row["off"]["broken_rate"], row["2"]["broken_rate"], row["2"]["changed_share"]) == (1.0, 0.0, 1.0)
    assert "100.0" in to_table({"as trained": row})


def test_reach_is_the_largest_distance_of_any_channel() -> None:
    small, upscaled = torch.zeros(1, 16, 4, 4), torch.zeros(1, 16, 8, 8)
    upscaled[0, 3, 2, 1] = -5.0
    assert reach(STATISTICS, small, upscaled, 2) == {"sigmas": 2.5, "residuals": 10.0}
    assert reach(STATISTICS, small + 8.0, upscaled, 2)["sigmas"] == pytest.approx(4.0), (
        "the bicubic latent counts as well"
    )
