"""The pocket LUA's training: aligned pairs, gradients through the frozen decoder, stages that follow each other."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from models.checkpoints import read_lua
from models.lua import PRESETS, Lua
from training.leaves import draw_leaves
from training.optim import Budget
from training.pocket_lua import STAGES, Pairs, read_pairs, shrink, stage_loss, train_lua, write_pairs
from training.pocket_vae import Pictures, make_vae


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return make_vae().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def pairs_path(vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    leaves = np.stack([draw_leaves(np.random.default_rng((7, i)), 256) for i in range(2)])
    path = tmp_path_factory.mktemp("pairs") / "train"
    write_pairs(vae, Pictures(leaves, leaves[:, :128, :128]), path, count=4, seed=0)
    return path


def test_pairs_are_encodings_of_the_shrunk_pictures(vae: AutoencoderKL, pairs_path: Path) -> None:
    pairs = read_pairs(pairs_path)
    assert {scale: tuple(latents.shape[1:]) for scale, latents in pairs.latents.items()} == {
        1: (16, 32, 32),
        2: (16, 16, 16),
        4: (16, 8, 8),
    }
    images = torch.from_numpy(np.array(pairs.pictures[:1])).permute(0, 3, 1, 2) / 127.5 - 1.0
    with torch.no_grad():
        latent = vae.encode(shrink(images, 4)).latent_dist.mode()
    error = (latent - pairs.latents[4][:1].float()).square().mean().sqrt()
    assert float(error) < 0.02 * float(latent.std())  # encoded in bfloat16


@pytest.mark.parametrize("scale", [2, 4])
def test_drawn_crops_are_aligned(scale: int) -> None:
    place = torch.arange(32.0)[:, None] * 100 + torch.arange(32.0)[None, :]
    latents = {s: place[::s, ::s].expand(2, 16, -1, -1) for s in (1, 2, 4)}
    pictures = np.zeros((2, 256, 256, 3), dtype=np.uint8)
    pictures[..., 0], pictures[..., 1] = np.arange(256)[:, None], np.arange(256)[None, :]
    small, large, images = Pairs(latents, pictures).draw(np.random.default_rng(0), scale, 5, 16)
    torch.testing.assert_close(small, large[..., ::scale, ::scale])
    corner = ((images[:, :2, 0, 0] + 1.0) * 127.5).round()
    torch.testing.assert_close(corner[:, 0] / 8 * 100 + corner[:, 1] / 8, large[:, 0, 0, 0])


@pytest.mark.parametrize("name", list(STAGES))
def test_each_stage_moves_the_adapter_and_not_the_decoder(name: str, vae: AutoencoderKL, pairs_path: Path) -> None:
    torch.manual_seed(0)
    stage, pairs = STAGES[name], read_pairs(pairs_path)
    net = Lua(PRESETS["pocket"])
    small, large, pictures = pairs.draw(np.random.default_rng(0), 2, 2, 16)
    grown = net(small, 2)
    decoded = vae.decode(grown).sample if stage.decodes else None
    torch.autograd.backward(stage_loss(stage, grown, large, decoded, pictures))
    last = net.heads["x2"].conv_last.weight
    assert last.grad is not None
    assert float(last.grad.abs().sum()) > 0.0
    assert all(weight.grad is None for weight in vae.parameters())


def test_picture_terms_need_the_decoder_for_their_gradient(vae: AutoencoderKL, pairs_path: Path) -> None:
    """With every latent term off, the adapter still learns: the decode keeps its graph."""
    stage = replace(STAGES["2"], latent_l1=0.0, latent_fourier=0.0)
    _, large, pictures = read_pairs(pairs_path).draw(np.random.default_rng(0), 2, 2, 16)
    grown = torch.zeros_like(large).requires_grad_()
    loss = stage_loss(stage, grown, large, vae.decode(grown).sample, pictures)
    (gradient,) = torch.autograd.grad(loss, grown)
    assert float(gradient.abs().sum()) > 0.0


def test_untrained_adapter_is_latent_bicubic(pairs_path: Path) -> None:
    small, _, _ = read_pairs(pairs_path).draw(np.random.default_rng(0), 2, 2, 32)
    with torch.no_grad():
        grown = Lua(PRESETS["pocket"]).eval()(small, 2)
    bicubic = torch.nn.functional.interpolate(small, scale_factor=2.0, mode="bicubic")
    torch.testing.assert_close(grown, bicubic, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_stages_follow_each_other_and_resume(vae: AutoencoderKL, pairs_path: Path, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "vae")
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    shared = (tmp_path / "vae", pairs_path, pairs_path)
    train_lua(first, *shared, "1", None, Budget(steps=2), 0, False)
    train_lua(first, *shared, "1", None, Budget(steps=3), 0, True)
    train_lua(second, *shared, "2", first / "lua.safetensors", Budget(steps=1), 0, False)
    before, after = read_lua(first / "lua.safetensors"), read_lua(second / "lua.safetensors")
    assert after.spec == PRESETS["pocket"]
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
