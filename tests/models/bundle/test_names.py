"""A bundle's name means the same wherever one is given: pulled before shipped, and unknown ones get the list."""

import shutil
from pathlib import Path

import pytest

from giantleap.models.bundle.bundle import BundleError
from giantleap.models.bundle.names import SHIPPED, find_bundle, list_bundles, load_bundle
from giantleap.service.settings import read_settings
from giantleap.training.run_config import read_config


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory in which `sdxl` is pulled."""
    shutil.copytree(SHIPPED / "sdxl", tmp_path / "data" / "bundles" / "sdxl")
    return tmp_path / "data"


def test_a_pulled_bundle_comes_before_the_shipped_one(data_dir: Path) -> None:
    pulled = data_dir / "bundles"
    assert find_bundle("sdxl", pulled) == pulled / "sdxl" and find_bundle("sdxl") == SHIPPED / "sdxl"
    assert pulled / "sdxl" in list_bundles(pulled) and SHIPPED / "sdxl" not in list_bundles(pulled)
    assert load_bundle("pocket").name == "pocket"


def test_a_directory_comes_before_a_name(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED / "sdxl", tmp_path / "sdxl")
    assert find_bundle("sdxl", beside=tmp_path) == tmp_path / "sdxl"


@pytest.mark.parametrize("name", ["pockt", "sdxl.toml", "pocket ", "ä", "x" * 5000], ids=lambda name: name[:8])
def test_an_unknown_name_gets_the_known_ones(name: str) -> None:
    with pytest.raises(BundleError, match=r"pocket.*giantleap bundle pull"):
        find_bundle(name)


@pytest.mark.parametrize("path", ["no/such", "./pocket", "..", "."])
def test_a_path_is_no_name(path: str) -> None:
    assert find_bundle(path) == Path(path)


def test_settings_and_run_files_take_names(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIANTLEAP_BUNDLE", "pocket, sdxl")
    assert read_settings(data_dir=data_dir).bundle == (SHIPPED / "pocket", data_dir / "bundles" / "sdxl")
    with pytest.raises(ValueError, match="no known bundle"):
        read_settings(bundle="pockt")
    run = tmp_path / "run.toml"
    run.write_text('bundle = "sdxl"\npairs = "pairs"\nlua = {start = "pocket"}\n')
    config = read_config(run, data_dir / "bundles")
    assert config.bundle == data_dir / "bundles" / "sdxl"
    assert config.lua.start == SHIPPED / "pocket" / "lua.safetensors"
