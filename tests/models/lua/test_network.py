"""The network: parity with a plain reading of the published design, any size, and a graph that holds no size."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from giantleap.models.lua.network import PRESETS, Lua, LuaSpec, pad_to_window, preset
from giantleap.models.lua.swin import BiasCache, SwinBlock, WindowAttention, build_biases, shift_mask
from tests.random_lua import random_lua

TINY = LuaSpec(4, 12, (2, 3), (2, 3), window=4, mlp_ratio=1.5, num_feat=8)


def published_forward(net: Lua, latent: Tensor, scale: int) -> Tensor:
    """The published computation, written plainly: roll, cut windows one by one, multiply, softmax, -100 mask."""
    spec = net.spec
    weights = net.state_dict()
    shallow = F.conv2d(latent, weights["conv_first.weight"], weights["conv_first.bias"], padding="same")
    x = plain_norm(shallow.permute(0, 2, 3, 1), weights, "patch_embed.norm")
    for i, (depth, heads) in enumerate(zip(spec.depths, spec.layer_heads, strict=True)):
        y = x
        for j in range(depth):
            name = f"layers.{i}.residual_group.blocks.{j}"
            shift = spec.window // 2 if j % 2 else 0
            y = y + plain_attention(plain_norm(y, weights, f"{name}.norm1"), weights, name, spec.window, heads, shift)
            z = plain_linear(plain_norm(y, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
            y = y + plain_linear(F.gelu(z), weights, f"{name}.mlp.fc2")
        x = x + plain_conv(y.permute(0, 3, 1, 2), weights, f"layers.{i}.conv").permute(0, 2, 3, 1)
    x = plain_norm(x, weights, "norm").permute(0, 3, 1, 2)
    x = plain_conv(x, weights, "conv_after_body") + shallow
    head = f"heads.x{scale}"
    x = F.leaky_relu(plain_conv(x, weights, f"{head}.conv_before.0"), 0.01)
    for k in range(scale // 2):
        x = F.pixel_shuffle(plain_conv(x, weights, f"{head}.upsample.{2 * k}"), 2)
    return plain_conv(x, weights, f"{head}.conv_last")


def plain_conv(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding="same")


def plain_linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def plain_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def plain_attention(x: Tensor, weights: dict[str, Tensor], name: str, w: int, heads: int, shift: int) -> Tensor:
    _, height, width, dim = x.shape
    x = torch.roll(x, (-shift, -shift), (1, 2))
    labels = plain_labels(height, width, w, shift)
    table = weights[f"{name}.attn.relative_position_bias_table"]
    spots = [(r, c) for r in range(w) for c in range(w)]
    index = torch.tensor([[(r - s + w - 1) * (2 * w - 1) + (c - t + w - 1) for s, t in spots] for r, c in spots])
    out = torch.empty_like(x)
    for top in range(0, height, w):
        for left in range(0, width, w):
            tokens = x[:, top : top + w, left : left + w].reshape(-1, w * w, dim)
            region = labels[top : top + w, left : left + w].reshape(-1)
            mask = torch.where(region[:, None] == region[None, :], 0.0, -100.0)
            q, k, v = plain_linear(tokens, weights, f"{name}.attn.qkv").split(dim, -1)
            parts = []
            for h in range(heads):
                part = slice(h * dim // heads, (h + 1) * dim // heads)
                logits = q[..., part] @ k[..., part].transpose(1, 2) * (dim // heads) ** -0.5
                parts.append((logits + table[index, h] + mask).softmax(-1) @ v[..., part])
            y = plain_linear(torch.cat(parts, -1), weights, f"{name}.attn.proj")
            out[:, top : top + w, left : left + w] = y.view(-1, w, w, dim)
    return torch.roll(out, (shift, shift), (1, 2))


def plain_labels(height: int, width: int, w: int, shift: int) -> Tensor:
    labels = torch.zeros(height, width)
    if shift:
        cuts = (slice(0, -w), slice(-w, -shift), slice(-shift, None))
        for i, rows in enumerate(cuts):
            for j, cols in enumerate(cuts):
                labels[rows, cols] = 3 * i + j
    return labels


@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        LuaSpec(3, 20, (3,), 2, window=5, num_feat=6, conv_first_kernel=1),
        LuaSpec(16, 24, (2, 2), 6, window=8, num_feat=16),
    ],
    ids=["tiny", "odd window, 1x1 entry", "window 8"],
)
@pytest.mark.parametrize("windows", [(1, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("scale", [2, 4])
def test_output_equals_the_published_computation(spec: LuaSpec, windows: tuple[int, int], scale: int) -> None:
    net = random_lua(spec)
    latent = torch.randn(2, spec.channels, windows[0] * spec.window, windows[1] * spec.window)
    with torch.no_grad():
        expected = published_forward(net, latent, scale)
        fused = net(latent, scale)
    written_out = net(latent, scale)  # with gradients the attention takes its other path
    bound = 1e-5 * max(1.0, expected.abs().max().item())
    assert (fused - expected).abs().max() <= bound
    assert (written_out - expected).abs().max() <= bound


@pytest.mark.parametrize(
    ("name", "channels", "parameters"),
    [("medium", 16, 12_189_448), ("release", 16, 54_917_584), ("pocket", 24, 1_744_040)],
)
def test_presets_have_the_documented_number_of_parameters(name: str, channels: int, parameters: int) -> None:
    with torch.device("meta"):
        net = Lua(preset(name, channels))
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == parameters


def test_parameter_names_are_those_of_the_released_file() -> None:
    with torch.device("meta"):
        keys = set(Lua(preset("medium", 16)).state_dict())
    block = "layers.5.residual_group.blocks.5"
    assert {
        "conv_first.weight", "patch_embed.norm.bias", f"{block}.norm1.weight", f"{block}.norm2.bias",
        f"{block}.attn.relative_position_bias_table", f"{block}.attn.qkv.bias", f"{block}.attn.proj.weight",
        f"{block}.mlp.fc1.weight", f"{block}.mlp.fc2.bias", "layers.5.conv.weight", "norm.weight",
        "conv_after_body.bias", "heads.x2.conv_before.0.weight", "heads.x2.upsample.0.bias",
        "heads.x4.upsample.0.weight", "heads.x4.upsample.2.weight", "heads.x4.conv_last.bias",
    } <= keys  # fmt: skip
    blocks, groups, outside, heads = 36 * 13, 6 * 2, 4 * 2, 6 + 8
    assert len(keys) == blocks + groups + outside + heads


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 13), st.integers(1, 13), st.sampled_from([2, 4]))
def test_any_size_is_enlarged_exactly(batch: int, height: int, width: int, scale: int) -> None:
    net = random_lua(TINY)
    with torch.no_grad():
        y = net(torch.randn(batch, 4, height, width), scale)
    assert y.shape == (batch, 4, scale * height, scale * width)
    assert torch.isfinite(y).all()


@given(st.integers(1, 20), st.integers(1, 20), st.integers(2, 16))
def test_padding_keeps_the_latent_and_reaches_the_next_multiple(height: int, width: int, window: int) -> None:
    latent = torch.randn(1, 2, height, width)
    padded = pad_to_window(latent, window)
    assert torch.equal(padded[..., :height, :width], latent)
    for side, before in zip(padded.shape[-2:], (height, width), strict=True):
        assert side % window == 0
        assert side - before < window


def test_padding_reflects_and_repeats_only_where_the_side_is_too_small() -> None:
    latent = torch.arange(6.0).view(1, 1, 1, 6)
    padded = pad_to_window(latent, 4)
    assert padded[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 4, 3]
    assert padded[0, 0, :, 0].tolist() == [0, 0, 0, 0]
    assert pad_to_window(torch.arange(3.0).view(1, 1, 1, 3), 8)[0, 0, 0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]


def test_an_item_gives_the_same_alone_and_in_a_batch() -> None:
    net, latents = random_lua(TINY), torch.randn(3, 4, 10, 7)
    with torch.no_grad():
        together = net(latents, 2)
        alone = torch.cat([net(item[None], 2) for item in latents])
    assert (together - alone).abs().max() <= 1e-5


def test_both_heads_share_one_pass_of_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    net, latent = random_lua(TINY), torch.randn(1, 4, 6, 9)
    with torch.no_grad():
        apart = {scale: net(latent, scale) for scale in (2, 4)}
        passes = 0
        forward_features = net.forward_features

        def count_pass(x: Tensor) -> Tensor:
            nonlocal passes
            passes += 1
            return forward_features(x)

        monkeypatch.setattr(net, "forward_features", count_pass)
        together = net.forward_scales(latent, (2, 4))
    assert passes == 1
    assert all(torch.equal(together[scale], apart[scale]) for scale in (2, 4))


def test_every_weight_gets_a_gradient_from_both_heads() -> None:
    net = random_lua(TINY).train()
    upscaled = net.forward_scales(torch.randn(2, 4, 8, 8), (2, 4))
    torch.stack([y.square().mean() for y in upscaled.values()]).sum().backward()
    still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []


def test_bfloat16_stays_close_to_float32() -> None:
    net, latent = random_lua(TINY, spread=0.1), torch.randn(1, 4, 12, 8)
    with torch.no_grad():
        exact = net(latent, 4)
        rough = net.to(torch.bfloat16)(latent.bfloat16(), 4)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() <= 0.03 * exact.abs().max()


def test_autocast_runs_the_float32_network_in_bfloat16() -> None:
    net, latent = random_lua(TINY, spread=0.1), torch.randn(1, 4, 12, 8)
    with torch.no_grad():
        exact = net(latent, 2)
        with torch.autocast("cpu", torch.bfloat16):
            rough = net(latent, 2)
    assert (rough.float() - exact).abs().max() <= 0.03 * exact.abs().max()


def test_published_mask_value_shuts_out_as_infinity_does() -> None:
    logits = torch.randn(4, 25, 25) * 5
    apart = shift_mask(2, 2, 5, logits)
    shut = torch.where(apart < 0, -torch.inf, 0.0)
    assert apart.unique().tolist() == [-100.0, 0.0]
    assert ((logits + apart).softmax(-1) - (logits + shut).softmax(-1)).abs().max() <= 1e-12


def test_only_the_last_windows_are_masked_and_one_window_still_is() -> None:
    masked = shift_mask(3, 2, 4, torch.zeros(())).abs().sum((1, 2)).view(3, 2) > 0
    assert masked.tolist() == [[False, True], [False, True], [True, True]]
    assert shift_mask(1, 1, 4, torch.zeros(())).abs().sum() > 0


def test_bicubic_skip_starts_as_the_bicubic_enlargement() -> None:
    net = Lua(LuaSpec(4, 12, (2,), 2, window=4, num_feat=8, bicubic_skip=True, latent_norm=True)).eval()
    net.set_latent_statistics(torch.tensor([0.0, 1.0, -2.0, 3.0]), torch.tensor([1.0, 0.5, 2.0, 4.0]))
    latent = torch.randn(1, 4, 8, 12)
    with torch.no_grad():
        y = net(latent, 4)
    assert (y - F.interpolate(latent, scale_factor=4, mode="bicubic")).abs().max() <= 1e-5


@pytest.mark.parametrize("scale", [2, 4])
def test_linear_skip_starts_as_the_bicubic_enlargement(scale: int) -> None:
    net = Lua(LuaSpec(4, 12, (2,), 2, window=4, num_feat=8, linear_skip=True, latent_norm=True)).eval()
    net.set_latent_statistics(torch.tensor([0.0, 1.0, -2.0, 3.0]), torch.tensor([1.0, 0.5, 2.0, 4.0]))
    latent = torch.randn(1, 4, 8, 12)
    with torch.no_grad():
        y = net(latent, scale)
    assert (y - F.interpolate(latent, scale_factor=scale, mode="bicubic")).abs().max() <= 1e-5


def test_linear_skip_is_not_combined_with_another_skip_or_a_liif_head() -> None:
    with pytest.raises(ValueError, match="beside a bicubic_skip"):
        LuaSpec(4, 12, (2,), 2, window=4, linear_skip=True, bicubic_skip=True)
    with pytest.raises(ValueError, match="beside a LIIF head"):
        LuaSpec(4, 12, (2,), 2, window=4, linear_skip=True, head="liif")


def test_latent_statistics_are_divided_out_and_brought_back() -> None:
    plain = random_lua(TINY)
    normed = Lua(LuaSpec(4, 12, (2, 3), (2, 3), window=4, mlp_ratio=1.5, num_feat=8, latent_norm=True)).eval()
    assert sorted(normed.load_state_dict(plain.state_dict(), strict=False).missing_keys) == [
        "latent_mean",
        "latent_std",
    ]
    mean, std = torch.tensor([0.0, 1.0, -2.0, 3.0]), torch.tensor([1.0, 0.5, 2.0, 4.0])
    normed.set_latent_statistics(mean, std)
    latent = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = plain((latent - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), 2) * std.view(-1, 1, 1)
        assert (normed(latent, 2) - expected - mean.view(-1, 1, 1)).abs().max() <= 1e-4


def test_statistics_are_refused_without_a_place_for_them_and_when_they_cannot_be_divided_by() -> None:
    with pytest.raises(ValueError, match="latent_norm=False"):
        random_lua(TINY).set_latent_statistics(torch.zeros(4), torch.ones(4))
    net = Lua(preset("pocket", 4))
    for mean, std in ((torch.zeros(3), torch.ones(4)), (torch.zeros(4), torch.zeros(4))):
        with pytest.raises(ValueError, match="positive deviations"):
            net.set_latent_statistics(mean, std)


def test_image_mean_is_subtracted_and_added_back() -> None:
    mean = (0.4488, 0.4371, 0.4040)
    spec = LuaSpec(3, 12, (2,), 2, window=4, num_feat=8, scales=(2,))
    plain = random_lua(spec)
    centered = Lua(LuaSpec(3, 12, (2,), 2, window=4, num_feat=8, scales=(2,), image_mean=mean)).eval()
    centered.load_state_dict(plain.state_dict())
    image, offset = torch.rand(1, 3, 8, 8), torch.tensor(mean).view(-1, 1, 1)
    with torch.no_grad():
        assert (centered(image, 2) - plain(image - offset, 2) - offset).abs().max() <= 1e-5


def test_no_buffer_depends_on_a_size() -> None:
    net = random_lua(TINY)
    before = {key: value.shape for key, value in net.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        net(torch.randn(1, 4, 24, 8), 2)
    assert list(net.buffers()) == []
    assert {key: value.shape for key, value in net.state_dict(keep_vars=True).items()} == before


def change_in_place(net: Lua) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)


def load_other(net: Lua) -> None:
    net.load_state_dict(random_lua(TINY, seed=1).state_dict())


def load_other_tensors(net: Lua) -> None:
    net.load_state_dict(random_lua(TINY, seed=1).state_dict(), assign=True)


def round_to_half(net: Lua) -> None:
    net.to(torch.bfloat16).to(torch.float32)


def write_past_the_versions(net: Lua) -> None:
    net.train()
    for parameter in net.parameters():
        parameter.data.mul_(1.1)
    net.eval()


@pytest.mark.parametrize(
    "change", [change_in_place, load_other, load_other_tensors, round_to_half, write_past_the_versions]
)
def test_cached_biases_follow_the_weights(change: Callable[[Lua], None]) -> None:
    net, latent = random_lua(TINY), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        net(latent, 2)
        change(net)
        fresh = Lua(TINY).eval()
        fresh.load_state_dict(net.state_dict())
        assert torch.equal(net(latent, 2), fresh(latent, 2))


def test_a_second_call_of_a_size_builds_no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    net, latent = random_lua(TINY), torch.randn(1, 4, 8, 8)
    built = 0
    position_bias = WindowAttention.position_bias

    def count_bias(attention: WindowAttention) -> Tensor:
        nonlocal built
        built += 1
        return position_bias(attention)

    monkeypatch.setattr(WindowAttention, "position_bias", count_bias)
    with torch.no_grad():
        first, second = net(latent, 2), net(latent, 2)
    assert built == sum(TINY.depths)
    assert torch.equal(first, second)
    net(latent, 2)
    assert built == 2 * sum(TINY.depths), "with gradients nothing may come from a cache"


def test_masks_are_kept_within_their_limit() -> None:
    blocks = [module for module in random_lua(TINY).modules() if isinstance(module, SwinBlock)]
    cache = BiasCache(limit_bytes=20 * 16 * 16 * 4)  # twenty windows of 4x4
    with torch.no_grad():
        for side, windows in ((1, 1), (2, 5), (3, 14), (4, 16), (1, 17), (9, 17)):
            for fresh, kept in zip(build_biases(blocks, side, side), cache.get(blocks, side, side), strict=True):
                assert torch.equal(fresh, kept)
            assert cache.mask_bytes == windows * 16 * 16 * 4


def test_a_copy_of_a_network_keeps_biases_of_its_own() -> None:
    net, latent = random_lua(TINY), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        before = net(latent, 2)
        copied = copy.deepcopy(net)
        change_in_place(copied)
        assert torch.equal(net(latent, 2), before)
        assert not torch.equal(copied(latent, 2), before)


def test_inference_mode_gives_what_no_grad_gives() -> None:
    net, latent = random_lua(TINY), torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        first = net(latent, 2)
        unversioned = Lua(TINY).eval()
        unversioned.load_state_dict(net.state_dict())
        built_inside = unversioned(latent, 2)
    with torch.no_grad():
        assert torch.equal(net(latent, 2), first)
    assert torch.equal(built_inside, first)
    net(latent, 2).sum().backward()  # nothing that inference kept may enter a graph


@pytest.mark.parametrize(
    ("shape", "scale", "words"),
    [
        ((1, 5, 8, 8), 2, r"\[batch, 4, height, width\]; found \[1, 5, 8, 8\]"),
        ((4, 8, 8), 2, r"found \[4, 8, 8\]"),
        ((1, 4, 0, 8), 2, r"found \[1, 4, 0, 8\]"),
        ((1, 4, 8, 8), 3, r"scale 3: this LUA has heads for scales \(2, 4\)"),
    ],
)
def test_a_latent_or_scale_that_does_not_fit_is_named(shape: tuple[int, ...], scale: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        random_lua(TINY)(torch.zeros(shape), scale)


def test_one_number_of_heads_stands_for_all_groups() -> None:
    assert LuaSpec(4, 12, (1, 1, 1), 3, window=4).layer_heads == (3, 3, 3)
    assert LuaSpec(4, 12, (1, 1, 1), 3, window=4) == LuaSpec(4, 12, (1, 1, 1), (3, 3, 3), window=4)


@pytest.mark.parametrize(
    "spec", [*PRESETS.values(), TINY, LuaSpec(3, 8, (1,), 2, window=7, scales=(4,), image_mean=(0.1, 0.2, 0.3))]
)
def test_spec_survives_json(spec: LuaSpec) -> None:
    assert LuaSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("text", ["{}", "[1]", "nonsense", '{"channels": 4}'])
def test_json_that_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        LuaSpec.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channels", 0), ("channels", True), ("embed_dim", 12.0), ("depths", ()), ("depths", (2, 0)), ("depths", [2]),
        ("num_heads", 5), ("num_heads", (2, 2)), ("num_heads", "2"), ("window", 1), ("mlp_ratio", 0.01),
        ("mlp_ratio", float("nan")), ("mlp_ratio", "2"), ("num_feat", 0), ("scales", ()), ("scales", (3,)),
        ("scales", (4, 2)), ("conv_first_kernel", 2), ("bicubic_skip", 1), ("image_mean", (0.1,)),
    ],
)  # fmt: skip
def test_a_spec_that_cannot_be_built_is_refused_by_field(field: str, value: object) -> None:
    good: dict[str, object] = {"channels": 3, "embed_dim": 12, "depths": (2,), "num_heads": 2, "window": 4}
    with pytest.raises(ValueError, match=rf"LuaSpec\.{field} must be"):
        LuaSpec(**(good | {field: value}))  # type: ignore[arg-type]


def test_image_mean_and_latent_statistics_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="beside an image_mean"):
        LuaSpec(1, 4, (1,), 1, window=4, image_mean=(0.5,), latent_norm=True)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="medium"):
        preset("large", 16)
