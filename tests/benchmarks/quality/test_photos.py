"""The photographs are there without a network, and the routes are scored against the right rivals."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.pocket_quality import Floor, judge_photos, photo_table
from benchmarks.quality.photos import draw_routes, mean_scores, psnr_db, read_photos, score, write_photo_sheet
from giantleap.models.lua.network import Lua, LuaSpec


class AverageCodec:
    """An autoencoder whose latent is the picture averaged over 8 x 8 blocks, three channels."""

    def encode(self, picture: Tensor) -> Any:
        latent = F.avg_pool2d(picture, 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latent))

    def decode(self, latent: Tensor) -> Any:
        return SimpleNamespace(sample=F.interpolate(latent, scale_factor=8.0, mode="nearest"))


@pytest.fixture
def lua() -> Lua:
    return Lua(LuaSpec(3, 12, (1,), 2, window=4, num_feat=8, bicubic_skip=True)).eval()


def test_six_photographs_are_read_from_the_installed_packages() -> None:
    photos = read_photos()
    sides = {name: photo.shape[-1] for name, photo in photos.items()}
    assert sides == {"astronaut": 512, "coffee": 384, "chelsea": 288, "rocket": 416, "china": 416, "flower": 416}
    assert all(photo.shape[-2] == photo.shape[-1] for photo in photos.values())
    assert all(-1.0 <= float(photo.min()) < float(photo.max()) <= 1.0 for photo in photos.values())


def test_psnr_counts_in_eight_bit_levels() -> None:
    black = torch.full((1, 3, 4, 4), -1.0)
    assert psnr_db(black + 2.0 / 255.0, black) == pytest.approx(48.13, abs=0.01)
    assert psnr_db(black - 5.0, black) == float("inf")


def test_untrained_adapter_scores_like_latent_bicubic(lua: Lua) -> None:
    photo = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    scores = score(draw_routes(AverageCodec(), lua, photo))
    assert scores.lua == pytest.approx(scores.latent_bicubic, abs=0.01)
    assert scores.pixel_bicubic.keys() == {2, 4}
    assert scores.round_trip > scores.pixel_bicubic[2] > scores.pixel_bicubic[4] - 1.0


def test_a_perfect_round_trip_is_the_ceiling(lua: Lua) -> None:
    blocks = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    photo = ((F.interpolate(blocks, scale_factor=8.0, mode="nearest") + 1.0) * 127.5).round() / 127.5 - 1.0
    assert score(draw_routes(AverageCodec(), lua, photo)).round_trip > 60.0


def test_floors_tell_pass_from_fail(lua: Lua) -> None:
    photo = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    one = score(draw_routes(AverageCodec(), lua, photo))
    mean = mean_scores([one, one])
    assert mean.lua == pytest.approx(one.lua)
    floors = judge_photos(mean)
    assert [floor.is_met for floor in floors] == [False] * 5
    assert Floor("figure", 2.0, 1.5, "dB").is_met
    assert "FAIL" in floors[0].line()
    assert f"{one.round_trip:.2f}" in photo_table({"photo": one})


def test_sheet_shows_six_columns(lua: Lua, tmp_path: Path) -> None:
    photo = torch.rand(1, 3, 128, 128) * 2.0 - 1.0
    write_photo_sheet({"noise": draw_routes(AverageCodec(), lua, photo)}, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (6 * 256, 256 + 20)
