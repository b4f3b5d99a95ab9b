"""What runs on a GPU makes every tensor there: the networks, the decode, the guard and the losses, one by one."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.engines.published_swinir import PublishedForward
from giantleap.models.engines.packed_lua import Grid, Grids, PackedLua
from giantleap.models.engines.swinir import PixelUpscaler
from giantleap.models.lua.clamp import LatentClamp
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from giantleap.models.lua.statistics import LatentStatistics
from giantleap.models.vae.dc_strips import DcStrips
from giantleap.models.vae.decode import decode_exact, decode_plain
from giantleap.models.vae.strip_plan import DecoderShape, plan_decode
from giantleap.training import losses
from giantleap.training.optim import to_orthogonal
from tests.models.vae.test_decode import make_vae
from tests.one_device import META, MixedDevicesError, OneDevice
from tests.tiny_pipelines import tiny_dc_vae

SPEC = LuaSpec(4, 12, (2, 2), 2, window=4, num_feat=8, bicubic_skip=True, latent_norm=True)
SPECS = {
    "latents": SPEC,
    "pictures": LuaSpec(3, 12, (2, 2), 2, window=4, num_feat=8, scales=(2,), image_mean=(0.1, 0.2, 0.3)),
    "liif": LuaSpec(4, 12, (2, 2), 2, window=4, num_feat=8, head="liif"),
}
LOSSES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    losses.l1,
    losses.fourier_l1,
    losses.downsampled_l1,
    losses.high_frequency_l1,
    losses.eagle,
)


def on_meta(*shape: int, **options: Any) -> Tensor:
    return torch.empty(*shape, device=META, **options)


def test_a_tensor_made_on_the_cpu_is_found() -> None:
    with OneDevice(), pytest.raises(MixedDevicesError, match=r"aten\.add"):
        on_meta(3) + torch.ones(3)


@pytest.mark.parametrize("name", SPECS)
def test_lua_makes_everything_where_its_input_is(name: str) -> None:
    net = Lua(SPECS[name]).eval().to(META)
    latent = on_meta(2, SPECS[name].channels, 9, 11)
    with OneDevice(), torch.inference_mode():
        assert net(latent, 2).device == META
    with OneDevice():
        net.train()(latent, 2).sum().backward()


@pytest.mark.parametrize("width_multiple", [1, 8])
def test_the_packed_network_makes_everything_where_its_input_is(
    width_multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_autocast(device_type: str, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()  # "meta" has none

    monkeypatch.setattr(torch, "autocast", no_autocast)
    net = Lua(SPEC).eval().to(META)
    grids = Grids.build(2, 8, 12, SPEC.window, torch.empty(0, dtype=torch.bfloat16))  # which windows it masks is data
    with OneDevice(), torch.inference_mode():
        packed = PackedLua(net, torch.bfloat16, packed=False, width_multiple=width_multiple)
        upscaled = packed.core(on_meta(2, 4, 8, 12), _to_meta(grids), 4)
    assert (upscaled.device, upscaled.dtype, list(upscaled.shape)) == (META, torch.float32, [2, 4, 32, 48])


def _to_meta(grids: Grids) -> Grids:
    def moved(grid: Any) -> Any:
        if isinstance(grid, Tensor):
            return grid.to(META)
        return Grid(grid.gather.to(META), grid.scatter.to(META), grid.mask.to(META))

    return Grids(**{each.name: moved(getattr(grids, each.name)) for each in fields(grids)})


def test_the_yardstick_of_the_engines_has_its_buffers_where_the_network_is() -> None:
    published = PublishedForward(Lua(SPEC).eval().to(META))
    with OneDevice(), torch.inference_mode():
        assert published(on_meta(2, 4, 8, 12), 2).device == META


def test_the_guard_makes_everything_where_its_input_is() -> None:
    guard = LatentClamp(LatentStatistics((0.0, 1.0), (1.0, 2.0), {2: (0.5, 0.5)}, 8), 4.0, META)
    with OneDevice(), torch.inference_mode():
        assert guard.limit(on_meta(1, 2, 3, 5), on_meta(1, 2, 6, 10), 2).device == META


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decodes_make_everything_where_their_input_is(dtype: torch.dtype) -> None:
    vae = make_vae()
    nn.Module.to(vae, META, dtype)
    latents = on_meta(2, 4, 8, 12, dtype=dtype)
    plan = plan_decode(DecoderShape.from_config(vae.config), 8, 12, "float32", strip_bytes=4096)
    with OneDevice(), torch.inference_mode():
        for image in (decode_plain(vae, latents), decode_exact(vae, latents, plan=replace(plan, attention_queries=7))):
            assert (image.device, image.dtype, list(image.shape)) == (META, dtype, [2, 3, 32, 48])


@pytest.mark.parametrize("attention", [0, 1])
def test_strips_of_an_autoencoder_dc_are_where_their_input_is(attention: int) -> None:
    vae = tiny_dc_vae(8, (8, 16, 8), attention)
    cut = DcStrips.of(vae, torch.float32)
    assert cut is not None
    nn.Module.to(vae, META)
    with OneDevice():
        image = cut.decode(vae, on_meta(2, 8, 21, 6), 4)
    assert (image.device, list(image.shape)) == (META, [2, 3, 84, 24])


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_make_everything_where_their_input_is(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    prediction = on_meta(2, 3, 24, 30, requires_grad=True)
    with OneDevice():
        loss(prediction, on_meta(2, 3, 24, 30)).backward()
    assert prediction.grad is not None


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 6, 4)])
def test_the_optimizer_makes_everything_where_its_weights_are(shape: tuple[int, ...]) -> None:
    with OneDevice():
        assert to_orthogonal(on_meta(*shape)).device == META


def test_tiles_of_pictures_are_made_where_the_networks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_autocast(device_type: str, dtype: torch.dtype, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()

    monkeypatch.setattr(torch, "autocast", no_autocast)
    net = Lua(SPECS["pictures"]).eval().to(META)
    upscaler = PixelUpscaler({2: net}, META, torch.bfloat16, tile_px=32, halo_px=4)
    with OneDevice():
        assert upscaler.upscale(torch.rand(2, 3, 40, 20), 2).device == META
        assert upscaler.upscale(torch.rand(1, 3, 80, 40), 2).device == META
