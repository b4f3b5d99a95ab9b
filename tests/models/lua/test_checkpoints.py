"""Weight files: round trips of our own, the two published layouts rebuilt from their documentation, and refusals."""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from giantleap.models.lua.checkpoints import CheckpointError, read_lua, write_lua
from giantleap.models.lua.network import Lua, LuaSpec, preset
from giantleap.models.lua.spec import SPEC_KEY
from giantleap.models.lua.swin import SwinBlock
from tests.random_lua import random_lua

SMALL = LuaSpec(5, 12, (2, 1), (3, 2), window=3, mlp_ratio=1.25, num_feat=6, conv_first_kernel=1)


def published_trunk(
    channels: int,
    embed: int,
    depths: tuple[int, ...],
    heads: int,
    window: int,
    image_side: int,
    fill: Callable[..., Tensor],
) -> dict[str, Tensor]:
    """Keys and shapes of a published SwinIR trunk with mlp_ratio 2, buffers that depend on the size included."""
    w2 = window * window

    def pair(name: str, *shape: int) -> dict[str, Tensor]:
        return {f"{name}.weight": fill(*shape), f"{name}.bias": fill(shape[0])}

    weights = pair("conv_first", embed, channels, 3, 3) | pair("patch_embed.norm", embed)
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f"layers.{i}.residual_group.blocks.{j}"
            weights |= pair(f"{block}.norm1", embed) | pair(f"{block}.norm2", embed)
            weights |= pair(f"{block}.attn.qkv", 3 * embed, embed) | pair(f"{block}.attn.proj", embed, embed)
            weights |= pair(f"{block}.mlp.fc1", 2 * embed, embed) | pair(f"{block}.mlp.fc2", embed, 2 * embed)
            weights[f"{block}.attn.relative_position_bias_table"] = fill((2 * window - 1) ** 2, heads)
            weights[f"{block}.attn.relative_position_index"] = torch.zeros(w2, w2, dtype=torch.int64)
            if j % 2:
                weights[f"{block}.attn_mask"] = torch.zeros((image_side // window) ** 2, w2, w2)
        weights |= pair(f"layers.{i}.conv", embed, embed, 3, 3)
    return weights | pair("norm", embed) | pair("conv_after_body", embed, embed, 3, 3)


def published_head(
    names: tuple[str, str, str], channels: int, embed: int, feat: int, doublings: int, fill: Callable[..., Tensor]
) -> dict[str, Tensor]:
    before, upsample, last = names
    shapes = {f"{before}.0": (feat, embed), f"{last}": (channels, feat)}
    shapes |= {f"{upsample}.{2 * k}": (4 * feat, feat) for k in range(doublings)}
    weights = {f"{name}.weight": fill(*shape, 3, 3) for name, shape in shapes.items()}
    return weights | {f"{name}.bias": fill(shape[0]) for name, shape in shapes.items()}


def single_head_swinir(channels: int, scale: int) -> dict[str, Tensor]:
    names = ("conv_before_upsample", "upsample", "conv_last")
    trunk = published_trunk(channels, 12, (2, 2), 3, 4, 8, random_fill)
    return trunk | published_head(names, channels, 12, 8, scale // 2, random_fill)


def random_fill(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.1


def write_pth(path: Path, weights: dict[str, Tensor], outer: str | None = "params") -> Path:
    torch.save(weights if outer is None else {outer: weights}, path)
    return path


@settings(max_examples=15, deadline=None)
@given(
    channels=st.integers(1, 5),
    head_dim=st.integers(1, 4),
    heads=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3),
    window=st.integers(2, 6),
    hidden=st.integers(1, 30),
    num_feat=st.integers(1, 7),
    scales=st.sampled_from([(2,), (4,), (2, 4)]),
    kernel=st.sampled_from([1, 3]),
    skip=st.booleans(),
    norm=st.booleans(),
)
def test_any_network_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, channels: int, head_dim: int, heads: list[int], window: int,
    hidden: int, num_feat: int, scales: tuple[int, ...], kernel: int, skip: bool, norm: bool,
) -> None:  # fmt: skip
    embed = 6 * head_dim
    net = random_lua(
        LuaSpec(
            channels, embed, tuple(1 + h % 2 for h in heads), tuple(heads), window, hidden / embed, num_feat, scales,
            kernel, skip, None, norm,
        )
    )  # fmt: skip
    path = tmp_path_factory.mktemp("lua") / "lua.safetensors"
    write_lua(path, net)
    again = read_lua(path)
    latent = torch.randn(1, channels, 5, 3)
    with torch.no_grad():
        assert torch.equal(again(latent, scales[0]), net(latent, scales[0]))
    assert again.spec == net.spec
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_spec_and_metadata_are_in_the_header(tmp_path: Path) -> None:
    path = tmp_path / "lua.safetensors"
    write_lua(path, random_lua(SMALL), {"license": "Apache-2.0"})
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["license"] == "Apache-2.0"
    assert json.loads(header[SPEC_KEY])["window"] == 3


def test_reading_draws_no_random_number(tmp_path: Path) -> None:
    path = tmp_path / "lua.safetensors"
    write_lua(path, random_lua(SMALL))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    read_lua(path)
    assert torch.equal(torch.rand(1), expected)


def test_half_precision_weights_are_read_as_float32(tmp_path: Path) -> None:
    path, net = tmp_path / "lua.safetensors", random_lua(SMALL)
    write_lua(path, net.to(torch.bfloat16))
    again = read_lua(path)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert torch.equal(again.conv_first.weight, net.conv_first.weight.float())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path, net = tmp_path / "lua.safetensors", random_lua(SMALL)
    write_lua(path, net)
    before = path.read_bytes()
    with torch.no_grad():
        net.norm.bias[0] = torch.nan
    with pytest.raises(CheckpointError, match=r"norm\.bias: found NaN"):
        write_lua(path, net)
    with pytest.raises(CheckpointError, match="taken by the spec"):
        write_lua(path, random_lua(SMALL), {SPEC_KEY: "{}"})
    assert path.read_bytes() == before
    path.unlink()
    path.mkdir()  # the last step, replacing the file, cannot succeed now
    with pytest.raises(OSError):
        write_lua(path, random_lua(SMALL))
    assert [entry.name for entry in tmp_path.iterdir()] == ["lua.safetensors"]


def test_released_multi_head_file_loads_at_its_documented_shapes(tmp_path: Path) -> None:
    def fill(*shape: int) -> Tensor:
        return torch.full(shape, 0.01)

    weights = published_trunk(16, 360, (6,) * 6, 12, 16, 32, fill)
    for name, doublings in (("x2", 1), ("x4", 2)):
        names = (f"heads.{name}.conv_before", f"heads.{name}.upsample", f"heads.{name}.conv_last")
        weights |= published_head(names, 16, 360, 256, doublings, fill)
    assert weights["layers.0.residual_group.blocks.1.attn_mask"].shape == (4, 256, 256)
    net = read_lua(write_pth(tmp_path / "lua.pth", weights, "params_ema"))
    assert net.spec == preset("release", 16)
    assert sum(parameter.numel() for parameter in net.parameters()) == 54_917_584


def test_released_layout_computes_what_the_same_weights_compute_in_our_file(tmp_path: Path) -> None:
    weights = published_trunk(16, 12, (2, 3), 3, 4, 8, random_fill)
    names = ("heads.x4.conv_before", "heads.x4.upsample", "heads.x4.conv_last")
    weights |= published_head(names, 16, 12, 8, 2, random_fill)
    net = read_lua(write_pth(tmp_path / "lua.pth", weights))
    own = Lua(LuaSpec(16, 12, (2, 3), 3, window=4, num_feat=8, scales=(4,))).eval()
    kept = {key: value for key, value in weights.items() if "attn_mask" not in key and "position_index" not in key}
    own.load_state_dict(kept)
    latent = torch.randn(1, 16, 9, 6)
    with torch.no_grad():
        assert torch.equal(net(latent, 4), own(latent, 4))


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    last, average = single_head_swinir(4, 2), single_head_swinir(4, 2)
    torch.save({"params": last, "params_ema": average}, tmp_path / "both.pth")
    net = read_lua(tmp_path / "both.pth")
    assert torch.equal(net.conv_first.weight, average["conv_first.weight"])


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("outer", ["params", "params_ema", None])
def test_single_head_swinir_becomes_a_network_of_one_head(tmp_path: Path, scale: int, outer: str | None) -> None:
    weights = single_head_swinir(3, scale)
    net = read_lua(write_pth(tmp_path / "swinir.pth", weights, outer))
    assert net.spec.scales == (scale,)
    assert net.spec.image_mean == (0.4488, 0.4371, 0.4040)
    head = net.state_dict()
    assert torch.equal(head[f"heads.x{scale}.conv_before.0.weight"], weights["conv_before_upsample.0.weight"])
    assert torch.equal(head[f"heads.x{scale}.conv_last.bias"], weights["conv_last.bias"])
    with torch.no_grad():
        assert net(torch.rand(1, 3, 10, 7), scale).shape == (1, 3, 10 * scale, 7 * scale)


def test_single_head_swinir_is_read_from_safetensors_too(tmp_path: Path) -> None:
    weights = single_head_swinir(4, 2)
    save_file(weights, tmp_path / "swinir.safetensors")
    net = read_lua(tmp_path / "swinir.safetensors")
    assert net.spec.image_mean is None
    write_lua(tmp_path / "own.safetensors", net)
    assert read_lua(tmp_path / "own.safetensors").spec == net.spec


def test_rgb_mean_survives_our_own_file(tmp_path: Path) -> None:
    net = read_lua(write_pth(tmp_path / "swinir.pth", single_head_swinir(3, 2)))
    write_lua(tmp_path / "own.safetensors", net)
    image = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(read_lua(tmp_path / "own.safetensors")(image, 2), net(image, 2))


def without(*parts: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {key: value for key, value in weights.items() if not key.startswith(parts)}


def with_tensor(key: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: weights | {key: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_tensor("conv_up1.weight", 8, 8, 3, 3), r"nearest\+conv"),
        (without("conv_before_upsample"), "pixelshuffledirect"),
        (without("conv_before_upsample", "upsample"), "no upsampler"),
        (with_tensor("conv_after_body.0.weight", 3, 12, 3, 3), "3conv"),
        (with_tensor("absolute_pos_embed", 1, 64, 12), "absolute position embedding"),
        (with_tensor("upsample.0.weight", 72, 8, 3, 3), r"upsample\.0\.weight.*found shape \(72, 8, 3, 3\)"),
        (with_tensor("upsample.2.weight", 32, 8, 5, 5), r"upsample\.2"),
        (with_tensor("upsample.4.weight", 32, 8, 3, 3), r"places \[0, 4\]"),
        (without("norm."), r"2 missing keys, first norm\.bias, norm\.weight"),
        (without("patch_embed"), r"missing keys, first patch_embed\.norm\.bias"),
        (without("conv_first.weight"), r"key conv_first\.weight is missing"),
        (without("layers.0.residual_group.blocks.1.mlp"), r"4 missing keys, first layers\.0.*mlp\.fc1\.bias"),
        (without("layers.1.residual_group.blocks.0"), r"unknown keys, first layers\.1\.conv\.bias"),
        (with_tensor("extra.weight", 1), r"1 unknown keys, first extra\.weight"),
        (with_tensor("norm.weight", 13), r"norm\.weight: found torch\.float32 \[13\], expected floats \[12\]"),
        (with_tensor("conv_last.weight", 5, 8, 3, 3), r"conv_last\.weight: found .*\[5, 8, 3, 3\].*\[4, 8, 3, 3\]"),
        (with_tensor("conv_first.weight", 12, 4), r"conv_first\.weight: found shape \[12, 4\], expected 4 dimensions"),
        (with_tensor("layers.0.residual_group.blocks.0.attn.relative_position_bias_table", 48, 3), r"48 rows"),
        (with_tensor("layers.0.residual_group.blocks.0.attn.relative_position_bias_table", 49, 5), r"divisors"),
        (lambda weights: weights | {"norm.bias": torch.full((12,), torch.inf)}, r"norm\.bias: found NaN or infinite"),
        (lambda weights: weights | {"norm.bias": torch.zeros(12, dtype=torch.int64)}, r"norm\.bias: found .*int64"),
        (lambda weights: {"encoder.weight": torch.zeros(1)}, r"neither a LUA nor a SwinIR file.*\['encoder'\]"),
        (lambda weights: {}, "conv_first.weight is missing"),
    ],
)  # fmt: skip
def test_a_foreign_file_that_does_not_fit_is_refused_by_key(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    path = write_pth(tmp_path / "swinir.pth", change(single_head_swinir(4, 2)))
    with pytest.raises(CheckpointError, match=words) as refusal:
        read_lua(path)
    assert str(path) in str(refusal.value)


def test_an_unknown_head_is_refused(tmp_path: Path) -> None:
    weights = published_trunk(4, 12, (1,), 3, 4, 8, random_fill) | {"heads.x8.conv_last.bias": torch.zeros(4)}
    with pytest.raises(CheckpointError, match=r"found the heads \['x8'\]"):
        read_lua(write_pth(tmp_path / "lua.pth", weights))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    whole, part = tmp_path / f"whole{suffix}", tmp_path / f"part{suffix}"
    if suffix == ".pth":
        write_pth(whole, single_head_swinir(4, 2))
    else:
        write_lua(whole, random_lua(SMALL))
    content = whole.read_bytes()
    part.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="damaged"):
        read_lua(part)


@pytest.mark.filterwarnings("ignore:Defining your `__torch_function__`:UserWarning")  # torch, of a damaged pickle
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_changed_bytes_are_read_or_refused_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    path, dice = tmp_path / f"lua{suffix}", random.Random(0)
    if suffix == ".pth":
        write_pth(path, published_trunk(4, 6, (1,), 1, 2, 4, random_fill))
    else:
        write_lua(path, random_lua(LuaSpec(4, 6, (1,), 1, window=2, num_feat=1)))
    content, refused = path.read_bytes(), 0
    for _ in range(100):
        changed = bytearray(content)
        for _ in range(dice.choice((1, 3, 20))):
            changed[dice.randrange(len(changed))] = dice.randrange(256)
        path.write_bytes(changed)
        try:
            read_lua(path)
        except CheckpointError:
            refused += 1
    assert refused > 0


def test_a_network_does_not_change_when_its_file_does(tmp_path: Path) -> None:
    path = tmp_path / "lua.safetensors"
    write_lua(path, random_lua(SMALL))
    net = read_lua(path)
    before = net.norm.weight.clone()
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.write(b"\0" * len(content))
    assert torch.equal(net.norm.weight, before)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"lua{suffix}"
    path.write_text("<!doctype html><title>Not found</title>")
    with pytest.raises(CheckpointError, match="damaged"):
        read_lua(path)


class Intruder:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.touch, (Path("intruder-was-here"),)  # type: ignore[return-value]


def test_code_in_a_pickle_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"params": Intruder()}, tmp_path / "lua.pth")
    with pytest.raises(CheckpointError, match="more than tensors"):
        read_lua(tmp_path / "lua.pth")
    assert not (tmp_path / "intruder-was-here").exists()


@pytest.mark.parametrize("content", [[1, 2], {"params": 3}, {"step": 4}, torch.zeros(2)])
def test_a_pickle_without_a_table_of_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "lua.pth")
    with pytest.raises(CheckpointError, match="expected"):
        read_lua(tmp_path / "lua.pth")


def test_weights_that_are_not_those_of_the_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lua.safetensors"
    write_lua(path, random_lua(SMALL))
    weights = load_file(path)
    wider = LuaSpec(5, 12, (2, 1), (3, 2), window=3, mlp_ratio=1.25, num_feat=7, conv_first_kernel=1)
    for spec, words in (
        (
            wider.to_json(),
            r"heads\.x2\.conv_before\.0\.bias: found torch\.float32 \[6\], expected floats \[7\]",
        ),
        ('{"channels": 5}', "a LUA spec has the keys"),
        ("not json", SPEC_KEY),
    ):
        path.write_bytes(save(weights, {SPEC_KEY: spec}))
        with pytest.raises(CheckpointError, match=words):
            read_lua(path)


def test_a_missing_file_and_a_strange_suffix_have_their_own_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no LUA weights at .*lua\.pth"):
        read_lua(tmp_path / "lua.pth")
    (tmp_path / "lua.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found suffix '\.onnx'"):
        read_lua(tmp_path / "lua.onnx")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "netG.", "module._orig_mod.", "generator.net.", "net_g_ema."]
)
@pytest.mark.parametrize("form", [".pth", ".PTH", ".pt", ".ckpt", ".safetensors"])
def test_the_prefix_of_a_wrapper_is_taken_off(tmp_path: Path, prefix: str, form: str) -> None:
    weights = single_head_swinir(4, 2)
    wrapped = {prefix + key: value for key, value in weights.items()}
    path = tmp_path / f"swinir{form}"
    if form == ".safetensors":
        save_file(wrapped, path)
    else:
        write_pth(path, wrapped, None)
    assert torch.equal(read_lua(path).conv_first.weight, weights["conv_first.weight"])


@pytest.mark.parametrize(
    "names",
    [
        ("state_dict",),
        ("params-ema",),
        ("model",),
        ("model_state_dict",),
        ("netG",),
        ("anything",),
        ("state_dict", "params_ema"),
        ("checkpoint", "model", "params"),
    ],
)
def test_weights_are_found_within_what_a_training_loop_saves(tmp_path: Path, names: tuple[str, ...]) -> None:
    weights = single_head_swinir(4, 2)
    content: dict[str, object] = {
        "module." + key: torch.nn.Parameter(value) for key, value in weights.items() if value.is_floating_point()
    }
    content |= {"epoch": 3}
    for depth, name in enumerate(reversed(names)):
        content = {name: content} | (
            {"optimizer": {"step": 4}, "epoch": 3} if name in ("state_dict", "model") or depth else {}
        )
    torch.save(content, tmp_path / "last.ckpt")
    assert torch.equal(read_lua(tmp_path / "last.ckpt").conv_first.weight, weights["conv_first.weight"])


def test_of_two_networks_the_averaged_one_is_taken_and_others_are_named(tmp_path: Path) -> None:
    last, average = single_head_swinir(4, 2), single_head_swinir(4, 2)
    both = {f"netG.{key}": value for key, value in last.items()} | {f"netG_ema.{k}": v for k, v in average.items()}
    net = read_lua(write_pth(tmp_path / "gan.pth", both | {"netD.weight": torch.zeros(1)}, "state_dict"))
    assert torch.equal(net.conv_first.weight, average["conv_first.weight"])
    two = {f"{name}.{key}": value for name in ("one", "two") for key, value in last.items()}
    with pytest.raises(CheckpointError, match=r"2 networks, 'one\.', 'two\.'"):
        read_lua(write_pth(tmp_path / "two.pth", two, None))


def test_the_state_of_a_compiled_network_is_read_in_our_own_format(tmp_path: Path) -> None:
    net = random_lua(SMALL)
    weights = {f"_orig_mod.{key}": value for key, value in net.state_dict().items()}
    save_file(weights, tmp_path / "lua.safetensors", {SPEC_KEY: SMALL.to_json()})
    assert torch.equal(read_lua(tmp_path / "lua.safetensors").conv_first.weight, net.conv_first.weight)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_weights_of_any_float_type_are_read(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    weights = {key: value.to(dtype) for key, value in random_lua(SMALL).state_dict().items()}
    path = tmp_path / f"lua.{form}"
    if form == "safetensors":
        save_file(weights, path, {SPEC_KEY: SMALL.to_json()})
        assert torch.equal(read_lua(path).conv_first.weight, weights["conv_first.weight"].float())
        weights["norm.bias"] = torch.full((12,), torch.nan).to(dtype)
        save_file(weights, path, {SPEC_KEY: SMALL.to_json()})
    else:
        broken = {key: value.to(dtype) for key, value in single_head_swinir(4, 2).items()}
        write_pth(path, broken | {"norm.bias": torch.full((12,), torch.nan).to(dtype)})
    with pytest.raises(CheckpointError, match=r"norm\.bias: found NaN"):
        read_lua(path)


def test_a_swinir_for_images_of_one_window_shifts_no_window(tmp_path: Path) -> None:
    """Built so, SwinIR shifts no window at any size; its file has no mask of a shift."""
    weights = {key: value for key, value in single_head_swinir(4, 2).items() if not key.endswith("attn_mask")}
    net = read_lua(write_pth(tmp_path / "small.pth", weights))
    bare = {key: value for key, value in weights.items() if not key.endswith("relative_position_index")}
    usual = read_lua(write_pth(tmp_path / "usual.pth", bare))
    assert (net.spec.shift, usual.spec.shift) == (False, True), "a file without any of these buffers does not tell"
    assert {module.shift for module in net.modules() if isinstance(module, SwinBlock)} == {0}
    latent = torch.randn(1, 4, 12, 8)
    with torch.no_grad():
        assert not torch.allclose(net(latent, 2), usual(latent, 2), rtol=1e-4)
    write_lua(tmp_path / "own.safetensors", net)
    with torch.no_grad():
        assert torch.equal(read_lua(tmp_path / "own.safetensors")(latent, 2), net(latent, 2))


def test_masks_of_some_blocks_only_are_refused(tmp_path: Path) -> None:
    weights = single_head_swinir(4, 2)
    del weights["layers.1.residual_group.blocks.1.attn_mask"]
    with pytest.raises(CheckpointError, match="masks of 1 blocks"):
        read_lua(write_pth(tmp_path / "swinir.pth", weights))


def test_an_object_in_a_pickle_is_named_in_one_plain_line(tmp_path: Path) -> None:
    torch.save({"params": single_head_swinir(4, 2), "settings": argparse.Namespace(scale=2)}, tmp_path / "swinir.pth")
    with pytest.raises(CheckpointError, match=r"holds more than tensors: argparse\.Namespace") as refusal:
        read_lua(tmp_path / "swinir.pth")
    assert "\n" not in str(refusal.value) and "\x1b" not in str(refusal.value)


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"lua.{form}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_lua(path)
