"""The autoencoder of stride 4: it starts as the PCA, trains from there, goes on where it stopped, becomes a bundle."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from giantleap.models.bundle.bundle import read_bundle
from giantleap.training.data.frozen_vae import read_vae
from giantleap.training.optim import Budget
from giantleap.training.pocket import autoencoder as autoencoder_training
from giantleap.training.pocket.autoencoder import Recipe, picture_loss, psnr_db, train_autoencoder
from giantleap.training.pocket.bundle import write_autoencoder_bundle
from giantleap.training.pocket.drawing.leaves import draw_leaves
from giantleap.training.pocket.drawing.photographs import cut_crop
from giantleap.training.pocket.network import BlockPca, make_autoencoder, start_at_pca
from giantleap.training.pocket.pictures import PicturePools, draw_held_out_scene, to_images


@pytest.fixture(scope="module")
def pools() -> PicturePools:
    leaves = np.stack([draw_leaves(np.random.default_rng((7, i)), 256) for i in range(3)])
    return PicturePools((leaves, leaves, leaves))


@pytest.fixture(scope="module")
def images(pools: PicturePools) -> Tensor:
    return to_images(pools.pools[0])


@pytest.mark.parametrize("channels", [8, 24])
def test_the_network_starts_as_the_pca(images: Tensor, channels: int) -> None:
    pca = BlockPca.fit(images, channels)
    network = make_autoencoder(channels)
    start_at_pca(network, pca)
    with torch.no_grad():
        codes = network.encode(images).latent
        decoded = network.decode(codes).sample
    assert (codes - pca.encode(images)).abs().max() < 1e-4
    assert psnr_db(decoded, pca.decode(codes).clamp(-1.0, 1.0)) > 50.0


def test_codes_are_in_the_order_of_their_variance(images: Tensor) -> None:
    deviations = BlockPca.fit(images, 24).encode(images).double().std(dim=(0, 2, 3))
    assert bool((deviations.diff() <= 1e-6).all())


def test_every_weight_that_matters_gets_a_gradient_after_one_update(images: Tensor) -> None:
    network = make_autoencoder(8)
    start_at_pca(network, BlockPca.fit(images, 8))
    for name, weight in network.named_parameters():
        if name.endswith(".norm.weight"):
            torch.nn.init.constant_(weight, 0.01)  # as after one update
    decoded = network.decoder(network.encoder(images[:1, :, :32, :32]))
    torch.autograd.backward(picture_loss(decoded, images[:1, :, :32, :32]))
    still = [name for name, weight in network.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == []


def test_crops_are_seeded_and_in_range(pools: PicturePools) -> None:
    first, again = (pools.crops(np.random.default_rng(1), 8, 32) for _ in range(2))
    assert first.shape == (8, 3, 32, 32)
    assert -1.0 <= float(first.min()) < float(first.max()) <= 1.0
    assert torch.equal(first, again)


def test_a_crop_is_the_most_detailed_window() -> None:
    picture = np.zeros((64, 512, 3), dtype=np.uint8)
    picture[:, 256:] = np.random.default_rng(0).integers(0, 255, (64, 256, 3))
    means = [cut_crop(np.random.default_rng(seed), picture, 32).mean() for seed in range(20)]
    assert np.mean(means) > 90.0  # without a choice about 64


def test_a_run_that_was_stopped_goes_on_where_it_stood(
    pools: PicturePools, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoencoder_training, "read_pools", lambda *_: pools)
    monkeypatch.setattr(autoencoder_training, "read_held_out", lambda *_: images[:, :, :64, :64])
    monkeypatch.setattr(autoencoder_training, "PCA_CROPS", 6)
    recipe = Recipe(batch=1, crop_px=32, is_bfloat16=False)
    train_autoencoder(tmp_path / "run", tmp_path, Budget(steps=2), 0, resume=False, recipe=recipe, channels=8)
    train_autoencoder(tmp_path / "run", tmp_path, Budget(steps=4), 0, resume=True, recipe=recipe, channels=8)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all(line["full"] > 15.0 for line in lines)
    assert (tmp_path / "run/vae/diffusion_pytorch_model.safetensors").is_file()


def test_the_bundle_is_read_as_any_other(images: Tensor, tmp_path: Path) -> None:
    network = make_autoencoder(8)
    start_at_pca(network, BlockPca.fit(images, 8))
    write_autoencoder_bundle(tmp_path / "tiny8", network)
    bundle = read_bundle(tmp_path / "tiny8")
    space = bundle.latent_space
    assert (space.name, space.channels, space.stride_px) == ("tiny8", 8, 4)
    vae = read_vae(bundle, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        expected = network.float().encode(images).latent
    assert (vae.encode(images) - expected).abs().max() < 1e-5


def test_held_out_scenes_follow_from_their_number() -> None:
    first, again, other = (draw_held_out_scene(index, 32) for index in (0, 0, 1))
    assert first.shape == (3, 32, 32) and 0.0 <= float(first.min()) < float(first.max()) <= 1.0
    assert torch.equal(first, again) and not torch.equal(first, other)
