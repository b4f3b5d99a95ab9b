"""The form packed for a CPU computes what the network computes, at any size, and is only taken where it can run."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from giantleap.models.engines.cpu import (
    PackingError,
    check_packed,
    pack_lua,
    packing_unavailable_reason,
)
from giantleap.models.engines.packed_lua import GRIDS_KEPT, Grid, PackedBlock, PackedLua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from giantleap.models.lua.swin import SwinBlock
from tests.random_lua import random_lua

CPU = torch.device("cpu")
SPECS = {
    "tiny": LuaSpec(4, 12, (2, 3), (2, 3), window=4, mlp_ratio=1.5, num_feat=8),
    "window 8, skip": LuaSpec(16, 24, (2, 2), 6, window=8, num_feat=16, bicubic_skip=True, latent_norm=True),
    "linear skip": LuaSpec(8, 12, (2,), 2, window=4, num_feat=8, linear_skip=True, latent_norm=True),
    "no shift": LuaSpec(4, 12, (2, 3), 2, window=4, num_feat=8, shift=False),
    "rgb, odd window": LuaSpec(
        3, 20, (3,), 2, window=5, num_feat=6, scales=(4,), conv_first_kernel=1, image_mean=(0.4, 0.5, 0.6)
    ),
}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("size", [(1, 8, 8), (2, 13, 21), (3, 16, 3)], ids=str)
def test_packed_form_equals_the_network(name: str, size: tuple[int, int, int]) -> None:
    net = random_lua(SPECS[name])
    packed = PackedLua(net, torch.float32)
    batch, height, width = size
    latent = torch.randn(batch, net.spec.channels, height, width)
    for scale in net.spec.scales:
        with torch.no_grad():
            expected = net(latent, scale)
        found = packed(latent, scale)
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert relative_error(found, expected) < 2e-5


def test_bfloat16_is_close() -> None:
    net = random_lua(SPECS["tiny"])
    if packing_unavailable_reason(CPU, torch.bfloat16) is not None:  # a CPU without it runs the network
        assert pack_lua(net, CPU, torch.bfloat16) is net
        return
    latent = torch.randn(2, 4, 12, 16)
    with torch.no_grad():
        expected = net(latent, 2)
    found = PackedLua(net, torch.bfloat16)(latent, 2)
    assert found.dtype == torch.float32
    assert 0 < relative_error(found, expected) < 0.05


@pytest.mark.parametrize("plainly", [False, True])
@pytest.mark.parametrize("tokens_at_once", [1, 5 * 16, 1 << 20, None])
def test_portions_and_both_attentions_change_nothing(
    tokens_at_once: int | None, plainly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedBlock, "uses_attention_math", lambda block: plainly)
    net = random_lua(SPECS["tiny"])
    packed = PackedLua(net, torch.float32)
    for blocks, _ in packed.groups:
        for block in blocks:
            block.tokens_at_once = tokens_at_once
    latent = torch.randn(2, 4, 12, 16)
    with torch.no_grad():
        assert relative_error(packed(latent, 4), net(latent, 4)) < 2e-5


def test_the_fused_kernel_attends_in_float32_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    net = random_lua(SPECS["tiny"])
    block = PackedLua(net, torch.float32).groups[0][0][0]
    compiled = PackedLua(net, torch.float32, packed=False).groups[0][0][0]
    chosen = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        chosen.append((block.uses_attention_math(), compiled.uses_attention_math()))
    assert chosen == [(False, False), (True, False)]


def test_portions_are_of_free_windows_or_of_masked_ones() -> None:
    packed = PackedLua(random_lua(SPECS["tiny"]), torch.float32)
    grids = packed.grids_of(torch.zeros(2, 4, 12, 16))
    _, shifted = packed.groups[0][0]
    shifted.tokens_at_once = 5 * 16
    found = [(start, stop, len(mask)) for start, stop, mask in shifted._portions(grids.shifted)]
    assert found == [(0, 4, 0), (4, 8, 0), (8, 12, 0), (12, 16, 4), (16, 20, 4), (20, 24, 4)]


@pytest.mark.parametrize("width_multiple", [1, 16])
def test_plain_layers_of_any_width_compute_the_same(width_multiple: int) -> None:
    net = random_lua(SPECS["window 8, skip"])
    latent = torch.randn(2, 16, 20, 9)
    packed = PackedLua(net, torch.float32, packed=False, width_multiple=width_multiple)
    with torch.no_grad():
        assert relative_error(packed(latent, 4), net(latent, 4)) < 2e-5


def test_autocast_around_it_changes_nothing() -> None:
    packed = PackedLua(random_lua(SPECS["tiny"]), torch.float32)
    latent = torch.randn(1, 4, 8, 8)
    expected = packed(latent, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(latent, 2), expected)


def test_grid_sorts_the_windows_that_the_mask_touches_to_the_end() -> None:
    grid = Grid.build(2, 12, 16, 4, 2, torch.empty(0))
    assert grid.mask.shape == (2 * (3 + 4 - 1), 1, 16, 16)
    assert grid.mask.flatten(1).any(1).all()
    assert torch.equal(grid.gather[grid.scatter], torch.arange(2 * 12 * 16))
    assert len(Grid.build(2, 12, 16, 4, 0, torch.empty(0)).mask) == 0


def test_no_more_than_a_few_sizes_are_remembered() -> None:
    packed = PackedLua(random_lua(SPECS["tiny"]), torch.float32)
    for width in range(1, GRIDS_KEPT + 3):
        packed(torch.zeros(1, 4, 4, 4 * width), 2)
    assert len(packed._grids) == GRIDS_KEPT
    assert (1, 4, 4) not in packed._grids and (1, 4, 4 * (GRIDS_KEPT + 2)) in packed._grids


@pytest.mark.parametrize(
    ("shape", "scale", "complaint"), [((1, 3, 8, 8), 2, "shape"), ((1, 4, 8, 8), 3, "scales"), ((4, 8, 8), 2, "shape")]
)
def test_what_the_network_refuses_is_refused(shape: tuple[int, ...], scale: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PackedLua(random_lua(SPECS["tiny"]), torch.float32)(torch.zeros(shape), scale)


def test_the_network_itself_runs_where_it_cannot_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    net = random_lua(SPECS["tiny"])
    assert "CPU" in str(packing_unavailable_reason(torch.device("cuda:0"), torch.float32))
    assert "float16" in str(packing_unavailable_reason(CPU, torch.float16))
    assert packing_unavailable_reason(CPU, torch.float32) is None
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "oneDNN" in str(packing_unavailable_reason(CPU, torch.float32))
    assert pack_lua(net, CPU, torch.float32) is net


def test_a_form_that_computes_something_else_is_refused() -> None:
    net = random_lua(SPECS["window 8, skip"])
    packed = PackedLua(net, torch.float32)
    check_packed(packed, net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.get_parameter("heads.x4.conv_last.weight").mul_(1.5)
    with pytest.raises(PackingError, match="x4"):
        check_packed(packed, other)


def test_the_check_sees_a_wrong_shift_mask() -> None:
    net = random_lua(SPECS["tiny"])
    packed = PackedLua(net, torch.float32)
    window = net.spec.window
    grids = packed.grids_of(torch.zeros(2, 4, 2 * window, 3 * window))
    shifted = replace(grids.shifted, mask=torch.zeros_like(grids.shifted.mask))
    packed._grids[2, 2 * window, 3 * window] = replace(grids, shifted=shifted)
    with pytest.raises(PackingError):
        check_packed(packed, net)


def amplifying_lua() -> Lua:
    """A net that adds 100,000 to its features, and whose next layer takes it off, which loses most of their digits."""
    net = random_lua(SPECS["tiny"])
    with torch.no_grad():
        for block in (module for module in net.modules() if isinstance(module, SwinBlock)):
            block.norm1.bias.fill_(1e5)
            block.attn.qkv.weight.sub_(block.attn.qkv.weight.mean(dim=1, keepdim=True))
    return net


def test_a_network_that_amplifies_rounding_runs_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    net = amplifying_lua()
    latent = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = relative_error(net(latent, 2), copy.deepcopy(net).double()(latent.double(), 2))
    assert own > 1e-4, "the case is what it is for"
    assert pack_lua(net, CPU, torch.float32).spec == net.spec
    assert "amplifies rounding" in caplog.text


def test_a_network_of_zeros_is_packed() -> None:
    net = random_lua(SPECS["tiny"])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert isinstance(pack_lua(net, CPU, torch.float32), PackedLua)
