"""`giantleap bundle`: what there is, fetched from a hub on loopback, and checked without a network."""

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from giantleap.cli.main import app
from giantleap.models.bundle.bundle import check_files, read_bundle, write_bundle
from giantleap.models.bundle.descriptor import Descriptor
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from tests.models.fake_hub import FakeHub, Repository, serve_hub
from tests.tiny_bundle import write_tiny_lua

PIPELINE, LUA = "maker/tiny-pipeline", "maker/lua"
Run = Callable[..., Result]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("GIANTLEAP_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("GIANTLEAP_DEVICE", "cpu")
    monkeypatch.setenv("GIANTLEAP_LOG_LEVEL", "error")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # nobody listens there
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return lambda *arguments: CliRunner().invoke(app, ["bundle", *map(str, arguments)])


@pytest.fixture
def hub(run: Run, tiny_bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the tiny bundle's pipeline and a LUA as the authors release theirs."""
    pipeline = tiny_bundle_dir / "pipeline"
    files: Repository = {
        path.relative_to(pipeline).as_posix(): path.read_bytes() for path in pipeline.rglob("*") if path.is_file()
    }
    torch.manual_seed(0)
    released = io.BytesIO()
    torch.save({"params_ema": Lua(LuaSpec(16, 12, (2,), 2, window=4, num_feat=8)).state_dict()}, released)
    with serve_hub({PIPELINE: files, LUA: {"lua.pth": released.getvalue()}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def _hub_descriptor(tiny_bundle_dir: Path, to: Path, with_lua: bool) -> Path:
    tiny = read_bundle(tiny_bundle_dir).descriptor.model_dump(exclude_unset=True)
    source = {"hub_id": LUA, "revision": "main", "file": "lua.pth", "scales": (2, 4)}
    tiny |= {
        "pipeline": {"hub_id": PIPELINE, "revision": "main"},
        "lua_source": source if with_lua else {"train": "`make it`"},
        "files": {},
    }
    tiny["defaults"] |= {"method": "bicubic"}
    del tiny["lua"]
    tiny.pop("swinir", None)
    to.mkdir()
    write_bundle(to, Descriptor.model_validate(tiny))
    return to


def test_list_names_every_shipped_bundle_with_its_methods(run: Run) -> None:
    ended = run("list")
    assert ended.exit_code == 0
    for name in ("pocket", "sdxl", "sd3.5-medium", "flux1-dev", "flux1-krea", "flux1-schnell", "flux2-klein"):
        assert re.search(rf"^{re.escape(name)} .*bicubic", ended.output, re.MULTILINE), name
    assert re.search(r"^pocket +lua, direct, bicubic", ended.output, re.MULTILINE)


def test_show_says_where_the_parts_are_and_why_a_method_is_not_there(run: Run) -> None:
    ended = run("show", "sdxl")
    output = _plain(ended.output)
    assert ended.exit_code == 0
    assert "stabilityai/stable-diffusion-xl-base-1.0 at main, on the hub" in output
    assert "vae madebyollin/sdxl-vae-fp16-fix" in output and "Open RAIL++-M" in output
    assert "lua not available" in output and "train your own" in output
    assert "direct sides up to 4096 px" in output and "bicubic x1, x2, x4" in output


def test_an_unknown_bundle_is_refused_with_the_known_ones(run: Run) -> None:
    for command in ("show", "pull", "check"):
        ended = run(command, "sdxxl")
        assert (
            ended.exit_code == 2
            and "give a directory or one of" in _plain(ended.output)
            and "flux1-dev" in ended.output
        )


def test_a_bundle_on_the_hub_must_be_pulled_before_it_is_checked(run: Run) -> None:
    ended = run("check", "flux1-dev")
    assert ended.exit_code == 2 and "giantleap bundle pull flux1-dev" in _plain(ended.output)


def test_pull_without_a_network_says_so_and_leaves_no_bundle(run: Run, tmp_path: Path) -> None:
    ended = run("pull", "sdxl")
    assert ended.exit_code == 2 and "cannot be reached" in _plain(ended.output)
    assert not list((tmp_path / "data").rglob("bundle.toml"))


def test_a_pulled_bundle_is_found_by_name_and_runs_with_the_network_off(
    run: Run, hub: FakeHub, tiny_bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _hub_descriptor(tiny_bundle_dir, tmp_path / "source", with_lua=True)
    ended = run("pull", source)
    assert ended.exit_code == 0, ended.output
    target = tmp_path / "data" / "bundles" / "tiny"
    assert f"bundle tiny is in {target}; serve it with: giantleap serve --bundle tiny" in _plain(ended.output)
    check_files(read_bundle(target))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    fetched_before = len(hub.fetched)
    assert "tiny" in run("list").output
    assert f"pipeline from {PIPELINE}@{hub.commit_of(PIPELINE)}" in _plain(run("show", "tiny").output)
    ended = run("check", "tiny")
    assert ended.exit_code == 0, ended.output
    output = _plain(ended.output)
    assert "method lua x2, 128 x 128 px" in output and "peak" in output and "generate" in output
    assert "swinir is not available" in output and "lua is not available" not in output
    assert len(hub.fetched) == fetched_before


def test_a_bundle_without_lua_weights_runs_by_the_other_methods_only(
    run: Run, hub: FakeHub, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    source, target = _hub_descriptor(tiny_bundle_dir, tmp_path / "source", with_lua=False), tmp_path / "to"
    ended = run("pull", source, "--to", target)
    assert ended.exit_code == 0, ended.output
    assert "lua is not available: bundle tiny has no LUA weights" in _plain(ended.output)
    ended = run("check", target)
    assert ended.exit_code == 0 and "method bicubic x2, 128 x 128 px" in ended.output, ended.output
    ended = run("check", target, "--method", "lua")
    assert ended.exit_code == 2 and "train your own: `make it`" in _plain(ended.output)
    assert "runs" not in ended.output


def test_check_finds_a_changed_byte_and_refuses_an_unknown_method(
    run: Run, hub: FakeHub, tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "to"
    run("pull", _hub_descriptor(tiny_bundle_dir, tmp_path / "source", with_lua=True), "--to", target)
    ended = run("check", target, "--method", "nearest")
    assert ended.exit_code == 2 and "lua, direct, bicubic, swinir" in ended.output
    (weights,) = (target / "pipeline" / "unet").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    ended = run("check", target)
    assert ended.exit_code == 2 and "has sha256" in _plain(ended.output)
    assert ended.output.count("bundle tiny: ") == 1, ended.output


def test_check_runs_the_pocket_bundle_directly(run: Run) -> None:
    ended = run("check", "pocket", "--method", "direct")
    assert ended.exit_code == 0 and "method direct x1, 128 x 128 px" in ended.output, ended.output


def test_a_bundle_made_of_own_weights_is_served_by_its_name(
    run: Run, tiny_bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "run" / "lua.safetensors"
    weights.parent.mkdir()
    write_tiny_lua(weights, seed=1)
    ended = run("make", "mine", "--lua", weights, "--from", tiny_bundle_dir, "--title", "Mine")
    assert ended.exit_code == 0 and "giantleap bundle check mine" in _plain(ended.output), ended.output
    directory = tmp_path / "data" / "bundles" / "mine"
    made = read_bundle(directory)
    check_files(made)
    assert made.lua is not None and made.lua.read_bytes() == weights.read_bytes()
    assert (made.name, made.about.title, made.defaults.method, made.scales_of("lua")) == (
        "mine",
        "Mine",
        "lua",
        (1, 2, 4),
    )
    assert made.swinir, "the other parts are those of the other bundle"
    ended = run("check", "mine")
    assert ended.exit_code == 0, ended.output
    again = run("make", "mine", "--lua", weights, "--from", tiny_bundle_dir)
    assert again.exit_code == 2 and "is not empty; name another directory" in _plain(again.output)


def test_weights_in_a_released_layout_make_a_bundle_of_one_on_the_hub(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Lua(LuaSpec(4, 12, (2,), 2, window=4, num_feat=8))
    torch.save({"params_ema": net.state_dict()}, tmp_path / "lua.pth")
    ended = run("make", "mine", "--lua", tmp_path / "lua.pth", "--from", "sdxl", "--to", tmp_path / "mine")
    assert ended.exit_code == 0 and "giantleap bundle pull" in _plain(ended.output), ended.output
    made = read_bundle(tmp_path / "mine")
    assert made.descriptor.pipeline.hub_id and made.lua == tmp_path / "mine" / "lua.safetensors"


@pytest.mark.parametrize(
    ("name", "weights", "reason"),
    [
        ("Not A Name", "lua.safetensors", "bundle.name"),
        ("mine", "swinir_x2.safetensors", "3 channels do not fit bundle tiny"),
        ("mine", "bundle.toml", "found suffix '.toml'"),
    ],
)
def test_what_makes_no_bundle_leaves_nothing(
    run: Run, tiny_bundle_dir: Path, tmp_path: Path, name: str, weights: str, reason: str
) -> None:
    to = tmp_path / "made"
    ended = run("make", name, "--lua", tiny_bundle_dir / weights, "--from", tiny_bundle_dir, "--to", to)
    assert ended.exit_code == 2 and reason in ended.output, ended.output
    assert not to.exists() and not list(tmp_path.glob(".made*"))
