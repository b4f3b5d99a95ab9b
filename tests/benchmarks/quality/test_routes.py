"""The methods start at the same small latent, and the figures are those that they are named after."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.pocket_quality.run import Floor, judge_pictures, photo_table, score_table
from benchmarks.quality import scenes
from benchmarks.quality.photos import enlarge_photo, read_photos, write_photo_sheet
from benchmarks.quality.routes import CPU, METHODS, Networks, mean_scores, psnr_db, score
from giantleap.models.engines.swinir import PixelUpscaler
from giantleap.models.lua.network import Lua, LuaSpec
from giantleap.training.pocket.network import BlockPca, make_autoencoder, start_at_pca

CHANNELS = 47  # nearly transparent


@pytest.fixture(scope="module")
def photo() -> Tensor:
    noise = torch.rand(1, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(noise, 9, stride=1, padding=4)
    return (((smooth - 0.5) * 4.0).clamp(-1.0, 1.0) * 127.5).round() / 127.5


@pytest.fixture(scope="module")
def networks(photo: Tensor) -> Networks:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = make_autoencoder(CHANNELS)
        start_at_pca(vae, BlockPca.fit(photo, CHANNELS))
        lua = Lua(LuaSpec(CHANNELS, 12, (1,), 2, window=4, num_feat=8, linear_skip=True)).eval()
        nets = {s: Lua(LuaSpec(3, 12, (1,), 2, window=4, num_feat=8, scales=(s,))).eval() for s in (2, 4)}
    return Networks(vae.eval(), lua, PixelUpscaler(nets, CPU, torch.float32))


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


def test_photograph_passes_every_route_at_its_size(networks: Networks, photo: Tensor, tmp_path: Path) -> None:
    seen = enlarge_photo(networks, photo)
    assert {scale: tuple(pictures) for scale, pictures in seen.enlarged.items()} == {2: METHODS, 4: METHODS}
    assert all(picture.shape == photo.shape for pictures in seen.enlarged.values() for picture in pictures.values())
    trips = seen.round_trip_db()
    assert trips.keys() == {"full", "half", "quarter"} and trips["full"] > 38.0
    scores = seen.scores()
    assert scores[2]["resized"]["psnr_db"] > scores[4]["resized"]["psnr_db"]
    write_photo_sheet({"noise": seen}, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (6 * 256, 256 + 20)


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_small_scene_is_the_large_one_shrunk(kind: str) -> None:
    small, large = scenes.KINDS[kind](0, 48, 4), scenes.KINDS[kind](0, 96, 2)
    shrunk = F.interpolate(large[None], scale_factor=0.5, mode="bicubic", antialias=True)[0].clamp(0.0, 1.0)
    assert psnr_db(small[None] * 2.0 - 1.0, shrunk[None] * 2.0 - 1.0) > 40.0


def test_scenes_are_compared_with_themselves_rendered_large(networks: Networks) -> None:
    measured = scenes.measure_scenes(networks, "studio scenes", count=1)
    assert measured.keys() == {2, 4}
    for (scores,) in measured.values():
        assert 20.0 < scores["resized"]["psnr_db"] < 60.0


def test_floors_tell_pass_from_fail(photo: Tensor) -> None:
    good, bad = score({"lua": photo, "resized": photo * 0.9}, photo * 0.99), score({"lua": -photo}, photo)
    sizes = {"full": 40.0, "half": 35.0}
    row = {method: {**good["resized"]} for method in METHODS} | {"lua": good["lua"]}
    photos = {"round_trip_db": sizes, "x2": row, "x4": row | {"lua": bad["lua"]}}
    floors = judge_pictures(photos, {"still lifes": {"x2": {"mean": row}, "x4": {"mean": photos["x4"]}}})
    assert [floor.is_met for floor in floors] == [True, False, True, True, False, False, True, False]
    assert Floor("figure", 2.0, 1.5, "dB").is_met and "FAIL" in floors[1].line()
    assert mean_scores([row, row])["lua"] == pytest.approx(row["lua"])
    assert "40.00" in photo_table({"one": photos}) and "lua" in score_table({"photographs x2": row})
    assert "9.500" in score_table({"photographs x2": {name: {**each, "jod": 9.5} for name, each in row.items()}})
