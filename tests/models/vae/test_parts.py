"""Every decode, the encoder and the tiles of SwinIR report how far they are, and can be ended from the report."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

from giantleap.models.device import PartCallback, part_of
from giantleap.models.engines.swinir import PixelUpscaler
from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from giantleap.models.vae.decode import decode_exact, decode_plain, decode_tiled, decode_tiny, encode_mean
from giantleap.models.vae.strip_plan import DecoderShape, plan_decode
from tests.models.vae.test_decode import latents_of, make_vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return make_vae()


def exact(vae: AutoencoderKL, on_part: PartCallback) -> object:
    plan = plan_decode(DecoderShape.from_config(vae.config), 17, 9, "float32", strip_bytes=20_000)
    return decode_exact(vae, latents_of(vae, 17, 9, batch=2), plan=plan, on_part=on_part)


def tiny(vae: AutoencoderKL, on_part: PartCallback) -> object:
    torch.manual_seed(0)
    decoder = AutoencoderTiny(latent_channels=16).eval()
    return decode_tiny(decoder, torch.randn(1, 16, 4, 4), LATENT_SPACES["flux1"], on_part)


def pixels(vae: AutoencoderKL, on_part: PartCallback) -> object:
    spec = LuaSpec(3, 12, (2,), 2, window=4, num_feat=8, scales=(2,))
    upscaler = PixelUpscaler({2: Lua(spec)}, torch.device("cpu"), torch.float32, tile_px=32, halo_px=4)
    return upscaler.upscale(torch.rand(2, 3, 40, 40), 2, on_part)


RUNS: dict[str, Callable[[Any, PartCallback], object]] = {
    "exact": exact,
    "plain": lambda vae, on_part: decode_plain(vae, latents_of(vae, 6, 6), on_part),
    "tiny": tiny,
    "encode": lambda vae, on_part: encode_mean(vae, torch.zeros(1, 3, 32, 32), on_part),
    "swinir": pixels,
}


@pytest.mark.parametrize("name", RUNS)
def test_the_fractions_rise_to_one(name: str, vae: AutoencoderKL) -> None:
    fractions: list[float | None] = []
    RUNS[name](vae, fractions.append)
    known = [fraction for fraction in fractions if fraction is not None]
    assert len(known) == len(fractions) >= 4
    assert known == sorted(set(known))
    assert known[0] > 0 and known[-1] == pytest.approx(1.0)


def test_tiles_of_diffusers_report_that_they_go_on(vae: AutoencoderKL) -> None:
    fractions: list[float | None] = []
    decode_tiled(vae, latents_of(vae, 6, 6), fractions.append)
    assert fractions and set(fractions) == {None}, "how many there are is not known"


@pytest.mark.parametrize("name", RUNS)
def test_a_report_may_end_the_work_and_leaves_nothing_behind(name: str, vae: AutoencoderKL) -> None:
    seen: list[float | None] = []

    def end(fraction: float | None) -> None:
        seen.append(fraction)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RUNS[name](vae, end)
    decode_plain(vae, latents_of(vae, 2, 2))
    encode_mean(vae, torch.zeros(1, 3, 16, 16))
    assert len(seen) == 2, "a hook was left on a layer"


def test_the_parts_of_equal_items_make_one_whole() -> None:
    seen: list[float | None] = []
    for index in range(2):
        report = part_of(seen.append, index, 2)
        assert report is not None
        report(0.5)
        report(None)
    assert seen == [0.25, None, 0.75, None] and part_of(None, 0, 2) is None
