"""Statistics for the guard: what they measure, and that every trained file carries them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from giantleap.cli.train import app
from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.network import Lua, LuaSpec
from giantleap.models.lua.statistics import StatisticsError, read_statistics
from giantleap.training.data.pairs_store import PairsStore
from giantleap.training.data.prepare import PrepareConfig, prepare
from giantleap.training.guard_statistics import add_statistics, guard_statistics, measure_statistics
from tests.training.pictures import write_pictures

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tiny_bundle_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    write_pictures(folder / "pictures", 3, 64, 64)
    prepare(PrepareConfig(folder / "pictures", tiny_bundle_dir, folder / "pairs", 64, 64), CPU)
    return folder / "pairs"


def test_moments_are_those_of_all_values_and_residuals_those_around_bicubic() -> None:
    generator = torch.Generator().manual_seed(0)
    large = 3.0 * torch.randn(6, 2, 8, 8, generator=generator) + torch.tensor([5.0, -1.0]).view(1, 2, 1, 1)
    small = {scale: torch.randn(6, 2, 8 // scale, 8 // scale, generator=generator) for scale in (2, 4)}
    batches = [{1: large[i : i + 2], 2: small[2][i : i + 2], 4: small[4][i : i + 2]} for i in (0, 2, 4)]
    found = measure_statistics(batches, (2, 4))
    assert found.tiles == 6
    assert found.mean == pytest.approx(large.mean(dim=(0, 2, 3)).tolist(), rel=1e-4)
    assert found.std == pytest.approx(large.std(dim=(0, 2, 3), correction=0).tolist(), rel=1e-4)
    for scale in (2, 4):
        rest = large - F.interpolate(small[scale], scale_factor=scale, mode="bicubic")
        assert found.residual_rms[scale] == pytest.approx(rest.square().mean(dim=(0, 2, 3)).sqrt().tolist(), rel=1e-4)


def test_nothing_has_no_statistics() -> None:
    with pytest.raises(StatisticsError):
        measure_statistics([], (2,))


def test_few_tiles_of_a_store_are_spread_over_it(pairs: Path) -> None:
    store = PairsStore.open(pairs)
    every = guard_statistics(store, (2, 4))
    assert (every.tiles, every.channels) == (3, 16) and set(every.residual_rms) == {2, 4}
    ends = measure_statistics([store.read([0]), store.read([2])], (2, 4))
    assert guard_statistics(store, (2, 4), tiles=2) == ends


def test_statistics_are_added_to_weights_that_have_none(pairs: Path, tmp_path: Path, tiny_bundle_dir: Path) -> None:
    source = tiny_bundle_dir / "lua.safetensors"
    net = read_lua(source)
    write_lua(tmp_path / "old.safetensors", net, {"training": "kept"})
    old, new = str(tmp_path / "old.safetensors"), str(tmp_path / "new.safetensors")
    answer = CliRunner().invoke(app, ["statistics", "--lua", old, "--pairs", str(pairs), "--out", new])
    assert answer.exit_code == 0, answer.output
    assert read_statistics(tmp_path / "new.safetensors") == guard_statistics(PairsStore.open(pairs), (2, 4))
    for name, value in read_lua(tmp_path / "new.safetensors").state_dict().items():
        assert torch.equal(value, net.state_dict()[name])
    assert b'"training":"kept"' in (tmp_path / "new.safetensors").read_bytes()[:4000]
    add_statistics(tmp_path / "new.safetensors", PairsStore.open(pairs), tmp_path / "new.safetensors")


def test_weights_of_another_space_get_none(pairs: Path, tmp_path: Path) -> None:
    write_lua(tmp_path / "four.safetensors", Lua(LuaSpec(4, 12, (1,), 2, window=4, num_feat=8)))
    with pytest.raises(StatisticsError, match="4 channels"):
        add_statistics(tmp_path / "four.safetensors", PairsStore.open(pairs), tmp_path / "out.safetensors")
