"""SwinIR in pixels: files, sizes, batches, and tiles that leave no seam."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from giantleap.models.device import choose_upscaler_dtype
from giantleap.models.engines.eager import TorchEngine
from giantleap.models.engines.swinir import HALO_PX, TILE_PX, PixelUpscaler, blend_weights, plan_spans
from giantleap.models.lua.checkpoints import CheckpointError, write_lua
from giantleap.models.lua.network import Lua, LuaSpec
from giantleap.models.lua.released_layouts import RGB_MEAN

CPU = torch.device("cpu")
WINDOW = 4


class CountingNet(Lua):
    """A SwinIR that remembers the shapes it was given."""

    def __init__(self, spec: LuaSpec) -> None:
        super().__init__(spec)
        self.seen: list[tuple[int, ...]] = []

    def forward_scales(self, latent: Tensor, scales: Sequence[float]) -> dict[float, Tensor]:
        self.seen.append(tuple(latent.shape))
        return super().forward_scales(latent, scales)


def build(scale: int) -> CountingNet:
    """A network of random weights that sees at most 12 pixels around each: six convolutions and two windows."""
    torch.manual_seed(scale)
    net = CountingNet(LuaSpec(3, 12, (2,), 2, window=WINDOW, num_feat=6, scales=(scale,), image_mean=RGB_MEAN)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.2)
        head = net.heads[f"x{scale}"]
        head.get_parameter("conv_last.weight").mul_(0.2)  # so that few pixels are clamped
    return net


def official_weights(net: Lua) -> dict[str, Tensor]:
    """The same weights under the published keys, with the buffers of a published file."""
    (scale,) = net.spec.scales
    weights = {}
    for key, value in net.state_dict().items():
        own = key.removeprefix(f"heads.x{scale}.")
        weights[own.replace("conv_before.", "conv_before_upsample.")] = value
    block = "layers.0.residual_group.blocks"
    weights[f"{block}.0.attn.relative_position_index"] = torch.zeros(WINDOW**2, WINDOW**2, dtype=torch.int64)
    weights[f"{block}.1.attn_mask"] = torch.zeros(4, WINDOW**2, WINDOW**2)
    return weights


def upscaler(net: Lua, tile_px: int = TILE_PX, halo_px: int = HALO_PX) -> PixelUpscaler:
    return PixelUpscaler({net.spec.scales[0]: net}, CPU, torch.float32, tile_px, halo_px)


def whole(net: Lua, images: Tensor) -> Tensor:
    with torch.no_grad():
        enlarged: Tensor = net(images, net.spec.scales[0])
    return enlarged.clamp(0.0, 1.0)


def test_published_files_are_opened_by_scale(tmp_path: Path) -> None:
    nets = {scale: build(scale) for scale in (2, 4)}
    save_file(official_weights(nets[2]), tmp_path / "x2.safetensors")
    torch.save({"params": official_weights(nets[4])}, tmp_path / "x4.pth")
    opened = PixelUpscaler.open({4: tmp_path / "x4.pth", 2: tmp_path / "x2.safetensors"}, CPU, torch.float32)
    assert opened.scales == (2, 4)
    images = torch.rand(2, 3, 9, 14)
    for scale, net in nets.items():
        upscaled = opened.upscale(images, scale)
        assert upscaled.shape == (2, 3, 9 * scale, 14 * scale)
        torch.testing.assert_close(upscaled, whole(net, images), rtol=0, atol=1e-5)


def test_the_mean_is_taken_off_and_put_back(tmp_path: Path) -> None:
    weights = official_weights(build(2))
    weights["conv_last.weight"] = torch.zeros_like(weights["conv_last.weight"])
    weights["conv_last.bias"] = torch.zeros_like(weights["conv_last.bias"])
    save_file(weights, tmp_path / "x2.safetensors")
    upscaled = PixelUpscaler.open({2: tmp_path / "x2.safetensors"}, CPU, torch.float32).upscale(
        torch.rand(1, 3, 8, 8), 2
    )
    torch.testing.assert_close(
        upscaled, torch.tensor(RGB_MEAN).view(1, 3, 1, 1).expand(1, 3, 16, 16), rtol=0, atol=1e-6
    )


def test_a_file_of_another_scale_is_refused(tmp_path: Path) -> None:
    save_file(official_weights(build(4)), tmp_path / "swinir.safetensors")
    with pytest.raises(CheckpointError, match=r"heads for scales \(4,\); expected .* scale 2"):
        PixelUpscaler.open({2: tmp_path / "swinir.safetensors"}, CPU, torch.float32)


def test_a_file_for_latents_is_refused(tmp_path: Path) -> None:
    write_lua(tmp_path / "lua.safetensors", Lua(LuaSpec(4, 6, (1,), 1, window=2, num_feat=2, scales=(2,))))
    with pytest.raises(CheckpointError, match=r"found 4 channels"):
        PixelUpscaler.open({2: tmp_path / "lua.safetensors"}, CPU, torch.float32)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="swinir_x2"):
        PixelUpscaler.open({2: tmp_path / "swinir_x2.safetensors"}, CPU, torch.float32)


@pytest.mark.parametrize(
    ("images", "scale", "words"),
    [
        (torch.rand(1, 3, 8, 8), 4, r"scale 4: .* \(2,\)"),
        (torch.rand(1, 4, 8, 8), 2, r"found torch.float32 \[1, 4, 8, 8\]"),
        (torch.rand(3, 8, 8), 2, r"found torch.float32 \[3, 8, 8\]"),
        (torch.rand(1, 3, 0, 8), 2, r"\[1, 3, 0, 8\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 2, r"found torch.uint8"),
    ],
)
def test_what_does_not_fit_is_refused(images: Tensor, scale: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        upscaler(build(2)).upscale(images, scale)


def test_results_are_clamped_floats_without_a_gradient() -> None:
    net = build(2)
    with torch.no_grad():
        net.heads["x2"].get_parameter("conv_last.bias").copy_(torch.tensor([-5.0, 0.0, 5.0]))
    upscaled = upscaler(net).upscale(torch.rand(1, 3, 8, 8, dtype=torch.float64), 2)
    assert upscaled.dtype == torch.float32
    assert not upscaled.requires_grad
    assert float(upscaled[:, 0].max()) == 0.0
    assert float(upscaled[:, 2].min()) == 1.0


def test_a_value_that_is_not_finite_shows_and_stays_in_its_image() -> None:
    images = torch.rand(2, 3, 40, 40)
    images[0, 1, 3, 3] = torch.inf
    for tile_px in (64, 32):
        upscaled = upscaler(build(2), tile_px, 8).upscale(images, 2)
        assert not bool(upscaled[0].isfinite().all())
        assert bool(upscaled[1].isfinite().all())


def test_a_batch_equals_its_images_one_by_one() -> None:
    net = build(2)
    images = torch.rand(3, 3, 21, 18)
    for tile_px in (64, 16):
        model = upscaler(net, tile_px, 4)
        singles = torch.cat([model.upscale(image[None], 2) for image in images])
        torch.testing.assert_close(model.upscale(images, 2), singles, rtol=0, atol=1e-5)


def test_small_pictures_go_whole_and_large_ones_in_tiles() -> None:
    net = build(2)
    model = upscaler(net, 32, 4)
    model.upscale(torch.rand(1, 3, 32, 32), 2)
    model.upscale(torch.rand(1, 3, 8, 128), 2)  # long, yet within the budget of pixels
    assert net.seen == [(1, 3, 32, 32), (1, 3, 8, 128)]
    net.seen.clear()
    model.upscale(torch.rand(1, 3, 33, 100), 2)
    assert len(net.seen) > 1
    assert max(max(shape[2:]) for shape in net.seen) <= 32
    net.seen.clear()
    model.upscale(torch.rand(1, 3, 30, 100), 2)
    assert {shape[2] for shape in net.seen} == {30}  # a side that fits is not cut


@pytest.mark.parametrize(("scale", "height", "width"), [(2, 130, 75), (2, 75, 150), (4, 97, 96)])
def test_tiles_equal_the_whole_where_half_a_halo_covers_the_reach(scale: int, height: int, width: int) -> None:
    net = build(scale)
    images = torch.rand(1, 3, height, width)
    expected = whole(net, images)
    net.seen.clear()
    torch.testing.assert_close(upscaler(net, 96, 24).upscale(images, scale), expected, rtol=0, atol=1e-5)
    assert len(net.seen) > 1


def test_bfloat16_is_near_float32() -> None:
    net, images = build(2), torch.rand(1, 3, 24, 24)
    upscaled = PixelUpscaler({2: net}, CPU, torch.bfloat16).upscale(images, 2)
    assert upscaled.dtype == torch.float32
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    difference = (upscaled - whole(net, images)).abs()
    assert 0.0 < float(difference.max()) < 0.05


@settings(max_examples=200, deadline=None)
@given(
    side_px=st.integers(1, 3000),
    window=st.sampled_from([2, 7, 8, 16]),
    halo_px=st.integers(0, 40),
    more_px=st.integers(0, 400),
)
def test_spans_cover_the_side_on_windows_and_their_weights_sum_to_one(
    side_px: int, window: int, halo_px: int, more_px: int
) -> None:
    tile_px = 4 * (halo_px + window) + window + more_px
    spans = plan_spans(side_px, tile_px, halo_px, window)
    assert [span.first for span in spans] == [0, *(span.last for span in spans[:-1])]
    assert spans[-1].last == spans[-1].stop == side_px
    for span in spans:
        assert span.start % window == 0
        assert span.stop % window == 0 or span.stop == side_px
        assert span.start == 0 or span.first - span.start >= halo_px
        assert span.stop == side_px or span.stop - span.last >= halo_px
        assert span.stop - span.start <= tile_px
    total = torch.zeros(2 * side_px)
    for span in spans:
        total[2 * span.start : 2 * span.stop] += blend_weights(span, side_px, 2, halo_px)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-4)


def test_the_outer_half_of_a_halo_weighs_nothing() -> None:
    spans = plan_spans(400, 160, 32, 8)
    weights = blend_weights(spans[1], 400, 2, 32)
    assert spans[1].start > 0
    assert float(weights[:32].max()) == 0.0  # 16 px at scale 2
    assert 0.0 < float(weights[32]) < 0.1
    assert float(weights[96]) == 1.0


def test_a_tile_shorter_than_four_halos_is_refused() -> None:
    with pytest.raises(ValueError, match="96 px are too short for a halo of 32 px"):
        plan_spans(1000, 96, 32, 8)


def growing_swinir(scale: int = 2) -> Lua:
    """A SwinIR whose residual stream grows by 8 in each group, beyond the range of float16."""
    torch.manual_seed(0)
    spec = LuaSpec(3, 12, (2,) * 6, 2, window=WINDOW, num_feat=6, scales=(scale,), image_mean=RGB_MEAN)
    net = Lua(spec).eval()
    with torch.no_grad():
        for group in net.layers:
            conv = group.get_submodule("conv")
            torch.nn.init.dirac_(conv.get_parameter("weight")).mul_(7.0)
            conv.get_parameter("bias").zero_()
        net.conv_first.weight.mul_(3.0)
    return net


def test_a_residual_stream_beyond_float16_stays_finite_in_a_pipeline_of_float16(tmp_path: Path) -> None:
    net = growing_swinir()
    images = torch.rand(1, 3, 8, 8)
    peaks: list[float] = []
    for layer in net.layers:
        layer.register_forward_hook(lambda module, given, given_back: peaks.append(float(given_back.abs().max())))
    expected = whole(net, images)
    assert max(peaks) > 65_504, "the case is what it is for"
    write_lua(tmp_path / "x2.safetensors", net)
    opened = PixelUpscaler.open({2: tmp_path / "x2.safetensors"}, CPU, torch.float16)
    assert opened.dtype != torch.float16
    assert torch.allclose(opened.upscale(images, 2), expected, atol=0.01)


def test_lua_never_computes_in_float16() -> None:
    for head in ("pixelshuffle", "liif"):
        net = Lua(LuaSpec(4, 12, (2,), 2, window=WINDOW, num_feat=6, head=head)).eval()
        assert TorchEngine.open(net, CPU, torch.float16)._dtype == torch.float32


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_on_a_gpu_the_range_of_bfloat16_is_taken_where_it_has_one(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_upscaler_dtype(torch.float16, torch.device("cuda:0")) == chosen
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_upscaler_dtype(dtype, torch.device("cuda:0")) == dtype
