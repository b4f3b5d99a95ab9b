"""The LIIF head: the published equations read plainly, any scale, the same in any chunks, and gradients everywhere."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.liif import Corners, LiifHead
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import SPEC_KEY, LuaSpec
from tests.random_lua import random_lua

SPEC = LuaSpec(4, 12, (2,), 2, window=4, num_feat=8, head="liif")
WITH_ALL = LuaSpec(4, 12, (2,), 2, window=4, num_feat=8, bicubic_skip=True, latent_norm=True, head="liif")


def head_of(net: Lua) -> LiifHead:
    head = net.heads["liif"]
    assert isinstance(head, LiifHead)
    return head


def published_values(head: LiifHead, features: Tensor, scale: float) -> Tensor:
    """The published computation point by point, in its coordinates: the picture spans -1 to 1 each way."""
    _, _, height, width = features.shape
    unfolded = F.unfold(features, 3, padding=1).view(1, -1, height, width)
    entry = nn.Linear(unfolded.shape[1] + 4, head.entry.out_channels)
    with torch.no_grad():
        entry.weight.copy_(torch.cat([head.entry.weight.flatten(1), head.place.weight], dim=1))
        entry.bias.copy_(head.entry.get_parameter("bias"))
    decoder = nn.Sequential(entry, nn.ReLU())
    for layer in head.hidden:
        decoder.extend([layer, nn.ReLU()])
    decoder.append(head.last)
    rows, columns = round(scale * height), round(scale * width)
    out = torch.zeros(1, head.last.out_features, rows, columns)
    for i in range(rows):
        for j in range(columns):
            y, x = -1 + (2 * i + 1) / rows, -1 + (2 * j + 1) / columns
            below, right = math.floor(((y + 1) * height - 1) / 2), math.floor(((x + 1) * width - 1) / 2)
            corners = [(below + a, right + b) for a in (0, 1) for b in (0, 1)]
            centers = [(-1 + (2 * r + 1) / height, -1 + (2 * c + 1) / width) for r, c in corners]
            areas = [abs((y - v) * (x - u)) for v, u in centers]
            for corner, center, opposite in zip(corners, centers, reversed(areas), strict=True):
                r, c = min(max(corner[0], 0), height - 1), min(max(corner[1], 0), width - 1)
                place = [(y - center[0]) * height, (x - center[1]) * width, 2 / rows * height, 2 / columns * width]
                value = decoder(torch.cat([unfolded[0, :, r, c], torch.tensor(place)]))
                out[0, :, i, j] += opposite / sum(areas) * value
    return out


@pytest.mark.parametrize("scale", [1.5, 2, 2.5, 3, 4])
def test_output_equals_the_published_computation(scale: float) -> None:
    head, features = head_of(random_lua(SPEC)), torch.randn(2, 12, 4, 6)
    with torch.no_grad():
        found = head(features, scale)
        expected = torch.cat([published_values(head, item[None], scale) for item in features])
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_decoder_has_the_published_number_of_weights() -> None:
    """As in LSRNA: 580 = 64 * 9 + 4 inputs, four hidden layers of 256, 4 outputs."""
    head = LiifHead(LuaSpec(4, 64, (1,), 1, window=4, num_feat=256, head="liif"))
    assert sum(parameter.numel() for parameter in head.parameters()) == 347_140


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1.25, 1.5, 2, 2.5, 3, 4]))
def test_any_size_is_enlarged_exactly_where_its_sides_stay_whole(b: int, h: int, w: int, scale: float) -> None:
    net, latent = random_lua(WITH_ALL), torch.randn(b, 4, h, w)
    if (scale * h) % 1 or (scale * w) % 1:
        with pytest.raises(ValueError, match="no whole sides"):
            net(latent, scale)
        return
    with torch.no_grad():
        y = net(latent, scale)
    assert y.shape == (b, 4, scale * h, scale * w)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("scale", [1, 0.5, 1.3, math.inf, math.nan, -2])
def test_a_scale_that_does_not_enlarge_or_breaks_a_window_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="any scale above 1 that makes a window of 4"):
        random_lua(SPEC)(torch.randn(1, 4, 20, 20), scale)


def test_heads_per_scale_take_no_other_scale() -> None:
    net = Lua(LuaSpec(4, 12, (2,), 2, window=4, num_feat=8)).eval()
    with pytest.raises(ValueError, match="heads for scales"):
        net(torch.randn(1, 4, 8, 8), 1.5)
    with torch.no_grad():
        assert torch.equal(net(torch.ones(1, 4, 8, 8), 2.0), net(torch.ones(1, 4, 8, 8), 2))


@pytest.mark.parametrize("points", [1, 7, 100])
def test_chunks_of_points_change_nothing(points: int) -> None:
    net, latent = random_lua(WITH_ALL), torch.randn(2, 4, 6, 10)
    with torch.no_grad():
        whole = net(latent, 1.5)
        head_of(net).points_at_once = points
        assert (net(latent, 1.5) - whole).abs().max() <= 1e-5


def test_no_more_points_at_once_than_the_bound() -> None:
    head, seen = head_of(random_lua(SPEC)), []
    head.last.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    head.points_at_once = 50
    with torch.no_grad():
        head(torch.randn(2, 12, 8, 8), 4)
    assert max(seen) == 4 * 50 and sum(seen) == 4 * 2 * 32 * 32


def test_an_item_gives_the_same_alone_and_in_a_batch() -> None:
    net, latents = random_lua(WITH_ALL), torch.randn(3, 4, 10, 6)
    with torch.no_grad():
        together = net(latents, 2.5)
        alone = torch.cat([net(item[None], 2.5) for item in latents])
    assert (together - alone).abs().max() <= 1e-5


def test_features_that_are_shifted_shift_the_values() -> None:
    head, features = head_of(random_lua(SPEC)), torch.randn(1, 12, 16, 16)
    with torch.no_grad():
        found = head(features, 1.5)
        shifted = head(features.roll((2, 4), (2, 3)), 1.5)
    inside = slice(6, 12)  # away from the border, of either picture
    assert (shifted[..., 9:15, 12:18] - found[..., inside, inside]).abs().max() <= 1e-5


def test_a_decoder_that_sees_no_place_keeps_constant_features_constant() -> None:
    """The ensemble's weights add up to one at every point, at the border too."""
    head = head_of(random_lua(SPEC))
    with torch.no_grad():
        head.place.weight.zero_()
        head.entry.weight.zero_()
        values = head(torch.randn(1, 12, 5, 4), 3)
    assert (values - values[..., :1, :1]).abs().max() <= 1e-6


def test_corners_reach_from_border_to_border() -> None:
    corners = Corners.build(3, 6, torch.zeros(1))
    assert corners.index.tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 1, 2, 2, 2]]
    assert corners.offset[0].tolist() == pytest.approx([1.5, 0.5, 1.5, 0.5, 1.5, 0.5])
    assert corners.offset[1].tolist() == pytest.approx([-0.5, -1.5, -0.5, -1.5, -0.5, -1.5])
    assert corners.weight.sum(dim=0).tolist() == pytest.approx([1.0] * 6)


def test_one_set_of_weights_answers_alike_at_neighboring_scales() -> None:
    """The enlarged latent is one function of the place: twice as dense a grid shows the same one."""
    head, features = head_of(random_lua(SPEC)), torch.randn(1, 12, 8, 8)
    with torch.no_grad():
        head.place.weight[:, 2:].zero_()  # the cell, which is what may differ
        coarse, fine = head(features, 1.5), head(features, 4.5)
    assert (fine[..., 1::3, 1::3] - coarse).abs().max() <= 1e-5


@pytest.mark.parametrize("spec", [SPEC, WITH_ALL], ids=["plain", "with skip and statistics"])
def test_every_weight_gets_a_gradient_at_every_scale(spec: LuaSpec) -> None:
    for scale in (1.5, 2, 4):
        net = random_lua(spec).train()
        net(torch.randn(2, 4, 8, 8), scale).square().mean().backward()
        still = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert still == []


def test_the_gradient_of_a_value_is_its_slope() -> None:
    head = head_of(random_lua(SPEC)).double()
    features = torch.randn(1, 12, 3, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: head(x, 1.5)[:, :2], (features,), fast_mode=True)


def test_bicubic_skip_starts_as_the_bicubic_enlargement_at_any_scale() -> None:
    net, latent = Lua(WITH_ALL).eval(), torch.randn(1, 4, 8, 12)
    net.set_latent_statistics(torch.tensor([0.0, 1.0, -2.0, 3.0]), torch.tensor([1.0, 0.5, 2.0, 4.0]))
    with torch.no_grad():
        y = net(latent, 1.5)
    assert (y - F.interpolate(latent, size=(12, 18), mode="bicubic")).abs().max() <= 1e-5


def test_fresh_weights_let_the_input_through() -> None:
    torch.manual_seed(0)
    net = Lua(SPEC).eval()
    with torch.no_grad():
        values = net(torch.randn(1, 4, 16, 16), 2)
    assert values.std(dim=(0, 2, 3)).min() > 1e-3


def test_bfloat16_stays_close_to_float32() -> None:
    net, latent = random_lua(SPEC), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        exact = net(latent, 1.5)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = net(latent, 1.5)
        rough = net.to(torch.bfloat16)(latent.bfloat16(), 1.5)
    assert rough.dtype == torch.bfloat16
    for found in (mixed, rough):
        assert (found.float() - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize("spec", [SPEC, WITH_ALL], ids=["plain", "with skip and statistics"])
def test_a_liif_head_survives_the_file(spec: LuaSpec, tmp_path: Path) -> None:
    net, latent = random_lua(spec), torch.randn(1, 4, 6, 10)
    write_lua(tmp_path / "lua.safetensors", net)
    again = read_lua(tmp_path / "lua.safetensors")
    assert again.spec == spec
    with torch.no_grad():
        assert torch.equal(again(latent, 1.5), net(latent, 1.5))


def test_a_file_from_before_there_were_heads_to_choose_is_read(tmp_path: Path) -> None:
    spec = LuaSpec(4, 12, (2,), 2, window=4, num_feat=8)
    net, path = random_lua(spec), tmp_path / "lua.safetensors"
    old = spec.to_json().replace(', "head": "pixelshuffle"', "")
    assert 'head"' not in old
    path.write_bytes(save(dict(net.state_dict()), {SPEC_KEY: old}))
    assert read_lua(path).spec == spec
    write_lua(path, net)
    with safe_open(path, "pt") as file:
        assert LuaSpec.from_json(file.metadata()[SPEC_KEY]) == spec


def test_a_head_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LuaSpec\.head must be one of"):
        LuaSpec(4, 12, (2,), 2, window=4, head="nearest")  # type: ignore[arg-type]
