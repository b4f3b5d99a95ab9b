"""The average of weights: of each value, of networks of one spec, in the file that the command writes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from giantleap.cli.main import app
from giantleap.models.lua.checkpoints import CheckpointError, read_lua, write_lua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from giantleap.training.average import average_weights

SPEC = LuaSpec(4, 12, (2,), 2, window=4, num_feat=8, linear_skip=True, latent_norm=True)


def write_nets(folder: Path, *specs: LuaSpec) -> list[Path]:
    """A network of random weights per spec."""
    files = [folder / f"{number}.safetensors" for number in range(len(specs))]
    for number, (file, spec) in enumerate(zip(files, specs, strict=True)):
        torch.manual_seed(number)
        net = Lua(spec)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_()
        write_lua(file, net)
    return files


def test_each_value_is_the_mean_of_the_files(tmp_path: Path) -> None:
    files = write_nets(tmp_path, SPEC, SPEC, SPEC)
    states = [read_lua(file).state_dict() for file in files]
    for key, value in average_weights(files).state_dict().items():
        expected = torch.stack([state[key].double() for state in states]).mean(0)
        assert torch.allclose(value.double(), expected, atol=1e-6), key


def test_networks_of_two_specs_are_refused(tmp_path: Path) -> None:
    files = write_nets(tmp_path, SPEC, replace(SPEC, num_feat=16))
    with pytest.raises(CheckpointError, match=r"1\.safetensors: another network than .*0\.safetensors"):
        average_weights(files)


def test_the_command_writes_the_average(tmp_path: Path) -> None:
    files, out = write_nets(tmp_path, SPEC, SPEC), tmp_path / "out.safetensors"
    result = CliRunner().invoke(app, ["train", "average", *map(str, files), "--out", str(out)])
    assert result.exit_code == 0 and "the average of 2 files" in result.output
    expected, found = average_weights(files).state_dict(), read_lua(out).state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(value, found[key]) for key, value in expected.items())


def test_the_command_names_a_file_that_is_no_network(tmp_path: Path) -> None:
    files = write_nets(tmp_path, SPEC)
    (tmp_path / "text.safetensors").write_text("no weights")
    paths = [*map(str, files), str(tmp_path / "text.safetensors")]
    result = CliRunner().invoke(app, ["train", "average", *paths, "--out", str(tmp_path / "out.safetensors")])
    assert result.exit_code == 2 and "text.safetensors" in result.output
    assert not (tmp_path / "out.safetensors").exists()
