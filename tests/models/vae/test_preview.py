"""Small views of latents: the linear map that is fitted to a VAE, and the tiny VAE where a bundle has one."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

from giantleap.models.bundle.bundle import Bundle, BundleError, check_files, read_bundle
from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.pixels.images import psnr_db, to_signed
from giantleap.models.vae.autoencoder import Vae, read_vae_model
from giantleap.models.vae.preview import PREVIEW_FILE, LinearMap, Previewer, open_previewer
from giantleap.models.vae.preview_fit import add_preview_map, choose_factor, draw_picture, fit_linear_map
from giantleap.service.settings import POCKET_BUNDLE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pocket() -> tuple[Bundle, Vae]:
    bundle = read_bundle(POCKET_BUNDLE)
    return bundle, Vae(read_vae_model(bundle, CPU, torch.float32), bundle.latent_space, dtype=torch.float32)


def test_the_shipped_map_comes_close_to_the_decoder(pocket: tuple[Bundle, Vae]) -> None:
    bundle, vae = pocket
    previewer = open_previewer(bundle, None)
    assert previewer is not None
    picture = torch.from_numpy(draw_picture(128, np.random.default_rng(99))).permute(2, 0, 1)
    raw = vae.encode(picture[None])[0]
    shown = previewer.show(raw)
    assert shown.shape == (128, 128, 3) and shown.dtype == torch.uint8
    # 24.5 dB when this was written; a map of the mean color alone has 8.
    assert psnr_db(to_signed(shown), vae.decode(raw[None])[0]) > 20


def test_the_shipped_map_is_what_a_fit_gives(pocket: tuple[Bundle, Vae]) -> None:
    bundle, vae = pocket
    shipped, fitted = LinearMap.read(bundle.directory / PREVIEW_FILE, 24), fit_linear_map(vae, 128)
    assert (shipped.factor, fitted.factor) == (4, 4)
    torch.testing.assert_close(shipped.weight, fitted.weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("stride_px", "base_px", "factor"), [(4, 128, 4), (8, 1024, 2), (8, 512, 4), (32, 1024, 8), (8, 4096, 1)]
)
def test_a_preview_of_a_base_image_fills_its_size(stride_px: int, base_px: int, factor: int) -> None:
    assert choose_factor(stride_px, base_px) == factor


def test_large_latents_give_small_previews_of_their_shape() -> None:
    linear = LinearMap(torch.zeros(3 * 4, 4), torch.zeros(3 * 4))
    assert Previewer(LATENT_SPACES["sdxl"], linear).show(torch.zeros(4, 300, 512)).shape == (150, 256, 3)
    tiny = AutoencoderTiny(latent_channels=4, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    shown = Previewer(LATENT_SPACES["sdxl"], tiny).show(torch.randn(4, 128, 64))
    assert shown.shape == (256, 128, 3) and shown.float().std() > 1
    nan = Previewer(LATENT_SPACES["sdxl"], linear).show(torch.full((4, 8, 8), torch.nan))
    assert nan.shape == (16, 16, 3)


def test_a_fitted_map_becomes_a_part_of_a_bundle(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "tiny"
    shutil.copytree(tiny_bundle_dir, directory)
    before = read_bundle(directory)
    assert "no [preview]" in before.descriptor.previews_unavailable and open_previewer(before, None) is None
    made = add_preview_map(before)
    check_files(made)
    assert made.descriptor.previews_unavailable == "" and open_previewer(made, None) is not None
    path = directory / PREVIEW_FILE
    with pytest.raises(BundleError, match=r"weight \[3 k\^2, 4\]"):
        LinearMap.read(path, 4)
    path.write_bytes(b"no map")
    with pytest.raises(BundleError, match="damaged or no safetensors"):
        open_previewer(made, None)
