"""The pocket VAE: teacher, batches, loss, folding, and a run of a few steps from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from giantleap.training.optim import Budget
from giantleap.training.pocket.decoder import fold_statistics, freeze_encoder, measure_codes, train_decoder
from giantleap.training.pocket.leaves import draw_leaves
from giantleap.training.pocket.parallel import Peers, run_peers
from giantleap.training.pocket.vae import PcaTeacher, Pictures, Pool, make_vae, psnr_db, train_vae, vae_loss


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    leaves = np.stack([draw_leaves(np.random.default_rng((7, i)), 128) for i in range(3)])
    scenes = np.full((2, 128, 128, 3), 90, dtype=np.uint8)
    return Pictures(leaves, scenes)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return Pool(tmp_path / "pool", leaf_count=3, scene_count=2, held_out_count=2, leaf_px=128)


def test_crops_are_seeded_and_in_range(pictures: Pictures) -> None:
    first, again = (pictures.crops(np.random.default_rng(1), 6, 32) for _ in range(2))
    assert first.shape == (6, 3, 32, 32)
    assert float(first.min()) >= -1.0
    assert float(first.max()) <= 1.0
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, pictures.crops(np.random.default_rng(2), 6, 32))


@pytest.mark.parametrize(("channels", "max_error"), [(16, 0.2), (4, 0.4)])
def test_teacher_codes_are_centred_and_rebuild_the_picture(pictures: Pictures, channels: int, max_error: float) -> None:
    images = pictures.crops(np.random.default_rng(0), 64, 32)
    teacher = PcaTeacher(images, channels)
    codes = teacher.encode(images)
    assert codes.shape == (64, channels, 4, 4)
    assert float(codes.mean(dim=(0, 2, 3)).abs().max()) < 1e-3
    assert float(codes.square().mean()) == pytest.approx(1.0, abs=0.01)
    error = (teacher.decode(codes) - images).square().mean()
    assert float(error) < max_error * float(images.var())


def test_residual_branches_start_at_zero() -> None:
    vae = make_vae()
    branches = [weight for name, weight in vae.named_parameters() if name.endswith("conv2.weight")]
    assert len(branches) == 16
    assert all(float(weight.detach().abs().max()) == 0.0 for weight in branches)


@pytest.mark.parametrize(("progress", "channels"), [(0.0, 16), (0.9, 16), (0.9, 4)])
def test_loss_moves_encoder_and_decoder(pictures: Pictures, progress: float, channels: int) -> None:
    torch.manual_seed(0)
    images = pictures.crops(np.random.default_rng(0), 4, 32)
    vae = make_vae(channels)
    assert vae.config["latent_channels"] == channels
    loss, _ = vae_loss(vae, PcaTeacher(images, channels), images, progress)
    torch.autograd.backward(loss)
    for part in (vae.encoder, vae.decoder):
        gradients = [weight.grad for weight in part.parameters() if weight.grad is not None]
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0.0


def test_teacher_phase_keeps_the_decoder_out_of_the_encoders_gradient(pictures: Pictures) -> None:
    images = pictures.crops(np.random.default_rng(0), 4, 32)
    vae = make_vae()
    _, picture = vae_loss(vae, PcaTeacher(images), images, 0.0)
    gradients = torch.autograd.grad(picture, list(vae.encoder.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in gradients)


@pytest.mark.parametrize("channels", [16, 4])
def test_folding_scales_the_codes_and_the_decoder_takes_it_back(pictures: Pictures, channels: int) -> None:
    torch.manual_seed(0)
    vae = make_vae(channels).eval()
    for weight in vae.parameters():
        weight.data.add_(0.02 * torch.randn_like(weight))
    images = pictures.crops(np.random.default_rng(0), 2, 128)
    with torch.no_grad():
        codes, spread = vae.encode(images).latent_dist.mode(), vae.encode(images).latent_dist.std
        before = vae.decoder.conv_in(codes)
        mean, deviation = measure_codes(vae, images)
        fold_statistics(vae, mean, deviation)
        folded, new_spread = vae.encode(images).latent_dist.mode(), vae.encode(images).latent_dist.std
        after = vae.decoder.conv_in(folded)
    torch.testing.assert_close(folded.mean(dim=(0, 2, 3)), torch.zeros(channels), rtol=0, atol=1e-4)
    torch.testing.assert_close(folded.std(dim=(0, 2, 3)), torch.ones(channels), rtol=0, atol=1e-4)
    torch.testing.assert_close(new_spread, spread / deviation.view(-1, 1, 1), rtol=1e-3, atol=1e-5)
    inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))  # the outer ring sees another padding
    torch.testing.assert_close(after[inner], before[inner], rtol=1e-3, atol=1e-4)


def test_psnr_of_a_known_error() -> None:
    target = torch.zeros(2, 3, 8, 8)
    assert psnr_db(target + 0.2, target) == pytest.approx(20.0, abs=0.2)
    assert psnr_db(target + 9.0, target) == pytest.approx(psnr_db(target + 1.0, target))


@pytest.mark.slow
def test_run_trains_freezes_and_goes_on(tmp_path: Path, pool: Pool) -> None:
    out, frozen, decoder = tmp_path / "vae", tmp_path / "frozen", tmp_path / "decoder"
    out.mkdir()
    decoder.mkdir()
    train_vae(Peers(), out, pool, Budget(steps=2), 0, False)
    train_vae(Peers(), out, pool, Budget(steps=3), 0, True)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    freeze_encoder(out / "vae", frozen, pool, 0, count=4)
    assert {"psnr_db", "mixed_std", "scenes_std"} <= json.loads((frozen / "READY").read_text()).keys()
    train_decoder(decoder, frozen, pool, Budget(steps=2), 0, False)
    before, after = (AutoencoderKL.from_pretrained(path) for path in (frozen, decoder / "vae"))
    for name, weight in before.encoder.state_dict().items():
        torch.testing.assert_close(after.encoder.state_dict()[name], weight, rtol=0, atol=0)
    moved = [
        name
        for name, weight in before.decoder.state_dict().items()
        if not torch.equal(after.decoder.state_dict()[name], weight)
    ]
    assert moved


@pytest.mark.slow
def test_two_peers_stop_together(tmp_path: Path, pool: Pool) -> None:
    (tmp_path / "vae").mkdir()
    pool.read(0)
    pool.read_held_out(0)
    run_peers(2, train_vae, tmp_path / "vae", pool, Budget(steps=2), 0, False)
    assert json.loads((tmp_path / "vae/log.jsonl").read_text().splitlines()[-1])["step"] == 2
