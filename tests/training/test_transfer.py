"""A LUA for another VAE: the ends are new, all between them is kept to the bit, and what follows is a run like any."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from giantleap.cli.main import app
from giantleap.models.bundle.bundle import BundleError, read_bundle
from giantleap.models.bundle.names import SHIPPED
from giantleap.models.generation.generator import Generator
from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from giantleap.models.vae.autoencoder import Vae
from giantleap.training.data.pairs_store import PairsStore
from giantleap.training.data.prepare import PrepareConfig, prepare
from giantleap.training.pocket.bundle import write_autoencoder_bundle
from giantleap.training.run import DistributedContext
from giantleap.training.run_config import ConfigError
from giantleap.training.transfer import (
    STAGES,
    LatentMaps,
    Start,
    TransferError,
    match_latents,
    plan_run,
    transfer,
    transfer_and_train,
)
from tests.tiny_pipelines import tiny_dc_vae
from tests.training.pictures import write_pictures

CPU = torch.device("cpu")
PLACE = DistributedContext(CPU)
SPEC = LuaSpec(16, 12, (2,), 2, window=4, num_feat=8, bicubic_skip=True, latent_norm=True)
LINEAR = replace(SPEC, bicubic_skip=False, linear_skip=True)
CONFIG = """
precision = "float32"
held_out_tiles = 2
save_every = 1
[[stages]]
name = "I"
steps = 2
effective_batch = 2
micro_batch = 2
[[stages]]
name = "III"
steps = 1
effective_batch = 1
micro_batch = 1
"""


def make_net(spec: LuaSpec = SPEC) -> Lua:
    """A network whose weights all matter; a fresh one's heads would start at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = Lua(spec)
        for parameter in net.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        if spec.latent_norm:
            net.set_latent_statistics(torch.randn(spec.channels), 0.5 + torch.rand(spec.channels))
    return net.eval()


def statistics(channels: int) -> dict[str, Any]:
    return {"mean": torch.linspace(-1.0, 1.0, channels), "std": torch.linspace(0.5, 2.0, channels)}


def is_end(name: str) -> bool:
    return name.startswith(("conv_first", "latent_")) or "conv_last" in name or ".last." in name


@pytest.mark.parametrize("start", ["fresh", "slice", "fit"])
@pytest.mark.parametrize(("channels", "changes"), [(4, {}), (24, {"latent_norm": False}), (16, {"head": "liif"})])
def test_all_but_the_ends_is_kept_to_the_bit(start: Start, channels: int, changes: dict[str, Any]) -> None:
    net = make_net(replace(SPEC, **changes))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    maps = LatentMaps(torch.randn(16, channels), torch.randn(16), torch.randn(channels, 16), torch.randn(channels))
    moved = transfer(net, channels, **statistics(channels), start=start, maps=maps)
    assert moved.spec == replace(net.spec, channels=channels)
    after = moved.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert [name for name in after if not is_end(name) and not torch.equal(after[name], before[name])] == []
    if (start, channels) != ("slice", 16):
        assert all(not torch.equal(after[name], before[name]) for name in after if is_end(name) and "bias" not in name)
    if net.spec.latent_norm:
        assert torch.equal(moved.latent_mean, statistics(channels)["mean"])
        assert torch.equal(moved.latent_std, statistics(channels)["std"])
    for scale in (2, 4):
        assert moved(torch.randn(1, channels, 5, 6), scale).shape == (1, channels, 5 * scale, 6 * scale)


def test_a_fresh_start_with_a_bicubic_skip_is_bicubic_and_its_seed_counts() -> None:
    moved, again, other = (transfer(make_net(), 4, **statistics(4), seed=seed) for seed in (1, 1, 2))
    latent = torch.randn(1, 4, 8, 8)
    enlarged = torch.nn.functional.interpolate(latent, scale_factor=2.0, mode="bicubic")
    torch.testing.assert_close(moved(latent, 2), enlarged, rtol=0, atol=1e-5)
    assert torch.equal(moved.conv_first.weight, again.conv_first.weight)
    assert not torch.equal(moved.conv_first.weight, other.conv_first.weight)


@pytest.mark.parametrize("spec", [SPEC, LINEAR])
def test_slices_of_as_many_channels_are_the_network_itself(spec: LuaSpec) -> None:
    net = make_net(spec)
    moved = transfer(net, 16, mean=net.latent_mean, std=net.latent_std, start="slice")
    latent = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(moved(latent, 4), net(latent, 4), rtol=0, atol=0)


@pytest.mark.parametrize("spec", [SPEC, LINEAR])
def test_a_channel_that_is_read_twice_counts_once(spec: LuaSpec) -> None:
    net = make_net(replace(spec, latent_norm=False))
    moved = transfer(net, 32, **statistics(32), start="slice")
    latent = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(moved(latent.repeat(1, 2, 1, 1), 2)[:, 16:], net(latent, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("spec", [SPEC, LINEAR])
@pytest.mark.parametrize("has_norm", [True, False])
def test_a_fit_start_is_the_old_network_seen_through_the_maps(has_norm: bool, spec: LuaSpec) -> None:
    net = make_net(replace(spec, latent_norm=has_norm))
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    zero = torch.zeros(16)
    ours = statistics(16) if has_norm else {"mean": zero, "std": torch.ones(16)}
    moved = transfer(net, 16, **ours, start="fit", maps=LatentMaps(turn.T, zero, turn, zero))

    def to_old(latent: Tensor) -> Tensor:
        inside = (latent - ours["mean"].view(-1, 1, 1)) / ours["std"].view(-1, 1, 1)
        turned = torch.einsum("on,bnhw->bohw", turn.T, inside)
        return turned * net.latent_std.view(-1, 1, 1) + net.latent_mean.view(-1, 1, 1) if has_norm else turned

    latent = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(to_old(moved(latent, 2)), net(to_old(latent), 2), rtol=1e-3, atol=1e-3)


def test_offsets_of_the_maps_count_inside_and_not_beside_a_skip() -> None:
    """Of a network without a skip: with one, the heads make a difference."""
    identity, offset = torch.eye(16), torch.linspace(-0.5, 0.5, 16)
    for has_skip in (False, True):
        net = make_net(replace(SPEC, bicubic_skip=has_skip, latent_norm=False))
        maps = LatentMaps(identity, offset, identity, -offset)
        moved = transfer(net, 16, **statistics(16), start="fit", maps=maps)
        shift = moved.heads["x2"].get_parameter("conv_last.bias") - net.heads["x2"].get_parameter("conv_last.bias")
        torch.testing.assert_close(shift, torch.zeros(16) if has_skip else -offset)
        shown = moved.conv_first(torch.zeros(1, 16, 5, 5))[0, :, 2, 2]
        torch.testing.assert_close(shown, net.conv_first(offset.view(1, -1, 1, 1).expand(1, 16, 5, 5))[0, :, 2, 2])


def test_offsets_of_the_maps_count_in_a_linear_skip_which_carries_whole_latents() -> None:
    net = make_net(replace(LINEAR, latent_norm=False))
    identity, offset = torch.eye(16), torch.linspace(-0.5, 0.5, 16)
    moved = transfer(net, 16, **statistics(16), start="fit", maps=LatentMaps(identity, offset, identity, -offset))
    latent, shift = torch.randn(1, 16, 8, 8), offset.view(1, -1, 1, 1)
    expected = net.skips["x2"](latent + shift) - shift
    torch.testing.assert_close(moved.skips["x2"](latent), expected, rtol=0, atol=1e-4)


class LinearVae:
    """A VAE of stride 1 whose encoder is a matrix and whose decoder shows the first three channels."""

    def __init__(self, matrix: Tensor, offset: Tensor, stride_px: int = 1) -> None:
        self.matrix, self.offset, self.stride_px = matrix, offset, stride_px
        self.device = CPU

    def encode(self, images: Tensor) -> Tensor:
        codes = torch.einsum("cp,bphw->bchw", self.matrix, images) + self.offset.view(-1, 1, 1)
        return codes[..., :: self.stride_px, :: self.stride_px]

    def decode(self, raw: Tensor) -> Tensor:
        return raw[:, :3]


@pytest.mark.parametrize("has_norm", [True, False])
def test_maps_between_two_vaes_are_found(has_norm: bool) -> None:
    torch.manual_seed(0)
    net = make_net(replace(SPEC, channels=5, latent_norm=has_norm))
    old, new = LinearVae(torch.randn(5, 3), torch.randn(5)), LinearVae(torch.eye(3), torch.zeros(3))
    large = 0.3 * torch.rand(6, 3, 16, 16) - 0.1
    mean, std = large.mean(dim=(0, 2, 3)), large.std(dim=(0, 2, 3))
    maps = match_latents(net, cast(Vae, old), cast(Vae, new), large, mean, std)
    pixel = torch.tensor([0.1, 0.0, -0.05])
    inside = (pixel - mean) / std if has_norm else pixel
    expected = old.matrix @ pixel + old.offset
    if has_norm:
        expected = (expected - net.latent_mean) / net.latent_std
    torch.testing.assert_close(maps.to_old @ inside + maps.old_offset, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(maps.to_new @ expected + maps.new_offset, inside, rtol=1e-2, atol=1e-2)


def test_vaes_of_another_stride_or_network_are_refused() -> None:
    net, identity = make_net(replace(SPEC, channels=3)), LinearVae(torch.eye(3), torch.zeros(3))
    half, four = LinearVae(torch.eye(3), torch.zeros(3), stride_px=2), LinearVae(torch.ones(4, 3), torch.zeros(4))
    for old in (half, four):
        with pytest.raises(TransferError, match="3 channels and one stride are needed"):
            match_latents(net, cast(Vae, old), cast(Vae, identity), torch.zeros(1, 3, 8, 8), **statistics(3))


def test_what_cannot_be_transferred_is_refused() -> None:
    pictures = make_net(replace(SPEC, channels=3, latent_norm=False, image_mean=(0.4, 0.4, 0.4)))
    with pytest.raises(TransferError, match="RGB"):
        transfer(pictures, 4, **statistics(4))
    with pytest.raises(TransferError, match="maps between 16 and 4 channels"):
        transfer(make_net(), 4, **statistics(4), start="fit")


def test_the_short_defaults_lead_with_latents_and_a_file_may_say_otherwise(tmp_path: Path) -> None:
    plan = plan_run(tmp_path, tmp_path, tmp_path / "start.safetensors", None)
    assert [(stage.name, stage.steps) for stage in plan.stages] == [("I", 5_000), ("III", 25_000)]
    assert plan.stages == STAGES and plan.lua.start == tmp_path / "start.safetensors"
    (tmp_path / "config.toml").write_text(CONFIG)
    plan = plan_run(tmp_path, tmp_path, tmp_path / "start.safetensors", tmp_path / "config.toml")
    assert plan.total_steps == 3 and plan.precision == "float32"
    for text, why in (
        ("bundle = 'x'\n[lua]\npreset = 'pocket'", "bundle, lua"),
        ("= 1", "config.toml"),
        ("x = 1", "x"),
    ):
        (tmp_path / "config.toml").write_text(text)
        with pytest.raises(ConfigError, match=why):
            plan_run(tmp_path, tmp_path, tmp_path / "start.safetensors", tmp_path / "config.toml")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A bundle of a VAE with 4 channels, and pairs of it."""
    folder = tmp_path_factory.mktemp("transfer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        autoencoder = tiny_dc_vae(latent_channels=4, channels=(8, 8, 8, 8), attention=0)
    write_autoencoder_bundle(folder / "four", autoencoder)
    write_pictures(folder / "pictures", 4, 128, 64)
    prepare(PrepareConfig(folder / "pictures", folder / "four", folder / "pairs", 64, 64), CPU)
    (folder / "config.toml").write_text(CONFIG)
    return SimpleNamespace(bundle=folder / "four", pairs=folder / "pairs", config=folder / "config.toml")


def test_a_bundle_of_a_vae_alone_trains_and_is_not_served(other: SimpleNamespace) -> None:
    bundle = read_bundle(other.bundle)
    assert (bundle.name, bundle.latent_space.channels, bundle.lua) == ("four", 4, None)
    with pytest.raises(BundleError, match="a VAE alone"):
        Generator.open(bundle, CPU, torch.float32)


def test_a_transfer_goes_on_where_it_was_stopped(other: SimpleNamespace, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    def go(name: str, **changes: Any) -> Path:
        values: dict[str, Any] = {"start": "fit", "config": other.config, **changes}
        return transfer_and_train(tiny_bundle_dir, other.bundle, other.pairs, tmp_path / name, PLACE, **values)

    whole = load_file(go("whole"))
    go("parts", stop_after=1)
    with pytest.raises(TransferError, match="resume it"):
        go("parts")
    with pytest.raises(TransferError, match="another transfer_start"):
        go("parts", start="slice", resume=True)
    parts = load_file(go("parts", resume=True))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    start, net = read_lua(tmp_path / "whole" / "start.safetensors"), read_lua(tmp_path / "whole" / "lua.safetensors")
    assert net.spec == start.spec == replace(read_lua(tiny_bundle_dir / "lua.safetensors").spec, channels=4)
    moved = [name for name, value in net.state_dict().items() if not torch.equal(value, start.state_dict()[name])]
    assert "conv_first.weight" in moved and "layers.0.conv.weight" in moved


def test_a_network_moves_to_an_autoencoder_of_another_stride(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 4, 128, 64)
    prepare(PrepareConfig(tmp_path / "pictures", SHIPPED / "pocket", tmp_path / "pairs", 64, 64), CPU)
    (tmp_path / "config.toml").write_text(CONFIG)

    def go(start: Start) -> Path:
        out, config = tmp_path / start, tmp_path / "config.toml"
        return transfer_and_train(
            tiny_bundle_dir, SHIPPED / "pocket", tmp_path / "pairs", out, PLACE, start=start, config=config
        )

    with pytest.raises(TransferError, match="one stride are needed: use another start"):
        go("fit")
    net, start = read_lua(go("slice")), read_lua(tmp_path / "slice" / "start.safetensors")
    assert net.spec.channels == 24
    moved = [name for name, value in net.state_dict().items() if not torch.equal(value, start.state_dict()[name])]
    assert "conv_first.weight" in moved and all(bool(value.isfinite().all()) for value in net.state_dict().values())


def test_the_statistics_are_those_of_the_new_pairs(other: SimpleNamespace, tmp_path: Path) -> None:
    write_lua(tmp_path / "lua.safetensors", make_net())
    transfer_and_train(
        tmp_path / "lua.safetensors", other.bundle, other.pairs, tmp_path / "run", PLACE, start="slice",
        config=other.config, stop_after=1,
    )  # fmt: skip
    start = read_lua(tmp_path / "run" / "start.safetensors")
    mean, std = PairsStore.open(other.pairs).statistics()
    torch.testing.assert_close((start.latent_mean, start.latent_std), (mean, std))


def test_the_command_transfers_or_says_why_not(other: SimpleNamespace, tiny_bundle_dir: Path, tmp_path: Path) -> None:
    def call(source: Path, *more: str, bundle: Path = other.bundle) -> Any:
        words = ["--from", str(source), "--to-bundle", str(bundle), "--pairs", str(other.pairs)]
        words += ["--out", str(tmp_path / "run"), "--config", str(other.config), "--device", "cpu"]
        return CliRunner().invoke(app, ["train", "transfer", *words, *more])

    weights = tiny_bundle_dir / "lua.safetensors"
    for answer, why in (
        (call(weights), "name the bundle's directory, or another start"),
        (call(other.bundle), "has no LUA weights"),
        (call(tmp_path / "absent"), "is no bundle"),
        (call(tiny_bundle_dir, bundle=tiny_bundle_dir), "made with another VAE"),
    ):
        assert answer.exit_code == 2 and why in " ".join(answer.output.split()), answer.output
    done = call(weights, "--start", "fresh")
    assert done.exit_code == 0 and "lua.safetensors" in done.output, done.output
    assert read_lua(tmp_path / "run" / "lua.safetensors").spec.channels == 4
