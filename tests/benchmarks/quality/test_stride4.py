"""The figures of the autoencoder of stride 4 are of the sizes and the rivals that they name."""

import pytest
import torch
from torch import Tensor

from benchmarks.quality import stride4
from giantleap.models.lua.network import Lua, LuaSpec
from giantleap.training.pocket.network import BlockPca, make_autoencoder, start_at_pca

CHANNELS = 47  # nearly transparent


@pytest.fixture(scope="module")
def photo() -> Tensor:
    noise = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(noise, 9, stride=1, padding=4)
    return (((smooth - 0.5) * 4.0).clamp(-1.0, 1.0) * 127.5).round() / 127.5


def test_round_trips_are_of_three_sizes_and_cut_back_what_was_padded(
    photo: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_autoencoder(CHANNELS)
    start_at_pca(network, BlockPca.fit(photo, CHANNELS))
    monkeypatch.setattr(stride4, "read_photos", lambda: {"one": photo[..., :72]})
    scores = stride4.round_trips(network)
    assert scores["mean"].keys() == {"full", "half", "quarter"}
    assert all(value > 38.0 for value in scores["one"].values())
    assert scores["mean"] == pytest.approx(scores["one"])


def test_scenes_are_compared_with_themselves_rendered_large(photo: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stride4, "SCENES", 1)
    monkeypatch.setattr(stride4, "SCENE_PX", 32)
    network = make_autoencoder(CHANNELS)
    start_at_pca(network, BlockPca.fit(photo, CHANNELS))
    lua = Lua(LuaSpec(CHANNELS, 12, (1,), 2, window=4, num_feat=8, linear_skip=True)).eval()
    scores = stride4.measure_scenes(network, lua)
    assert scores.lua.keys() == scores.pixel_bicubic.keys() == {2, 4}
    assert all(10.0 < scores.pixel_bicubic[scale] < 60.0 for scale in (2, 4))
