"""The pocket SwinIRs' training: a start at bicubic, aligned pairs of both kinds, published files, runs that resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.engines.swinir import PixelUpscaler
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.network import Lua
from giantleap.training.optim import Budget
from giantleap.training.pocket.leaves import draw_leaves
from giantleap.training.pocket.lua import shrink
from giantleap.training.pocket.stride4.network import make_autoencoder
from giantleap.training.pocket.swinir import (
    PicturePairs,
    make_pairs,
    pool_pairs,
    read_pairs,
    start_as_bicubic,
    swinir_spec,
    to_images,
    train_swinir,
    write_swinir,
)
from giantleap.training.pocket.vae import Pictures, Pool, make_vae, psnr_db


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return make_vae().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    leaves = np.stack([draw_leaves(np.random.default_rng((7, i)), 128) for i in range(2)])
    return Pictures(leaves, leaves)


def fresh(scale: int) -> Lua:
    torch.manual_seed(0)
    net = Lua(swinir_spec(scale)).eval()
    start_as_bicubic(net)
    return net


@pytest.mark.parametrize("scale", [2, 4])
def test_an_untrained_network_enlarges_nearly_bicubically(scale: int, pictures: Pictures) -> None:
    large = to_images(pictures.leaves[:1, :96, :96]) * 2.0 - 1.0
    small = (shrink(large, scale) + 1.0) / 2.0
    bicubic = F.interpolate(small, scale_factor=float(scale), mode="bicubic")
    with torch.no_grad():
        difference = fresh(scale)(small, scale) - bicubic
    inside = difference[..., 8:-8, 8:-8]  # convolutions pad with zeros
    assert float(inside.square().mean().sqrt()) < 0.02
    assert float(inside.square().mean()) < 0.05 * float(bicubic.var())


@pytest.mark.parametrize("scale", [2, 4])
def test_the_bicubic_start_leaves_no_weight_without_gradient(scale: int) -> None:
    net = fresh(scale).train()
    torch.manual_seed(1)
    images, target = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16 * scale, 16 * scale)
    for _ in range(3):  # the zeros of the last convolution move first, then what is before them
        net.zero_grad()
        torch.autograd.backward((net(images, scale) - target).abs().mean())
        with torch.no_grad():
            for weight in net.parameters():
                assert weight.grad is not None
                weight.sub_(weight.grad, alpha=0.1)
    still = [name for name, weight in net.named_parameters() if weight.grad is None or not bool(weight.grad.any())]
    assert still == []


def test_pairs_hold_the_shrunk_picture_and_its_decode(vae: AutoencoderKL, pictures: Pictures) -> None:
    pairs = make_pairs(vae, pictures, 2, 32, 5, seed=0)
    assert pairs.scale == 2
    assert [part.shape for part in (pairs.large, pairs.clean, pairs.decoded)] == [
        (5, 64, 64, 3), (5, 32, 32, 3), (5, 32, 32, 3),
    ]  # fmt: skip
    large = to_images(pairs.large) * 2.0 - 1.0
    small = to_images(pairs.clean) * 2.0 - 1.0
    assert float((shrink(large, 2) - small).abs().max()) <= 1.01 * 2 / 255
    with torch.no_grad():
        decoded = vae.decode(vae.encode(small).latent_dist.mode()).sample.clamp(-1.0, 1.0)
    assert float((to_images(pairs.decoded) * 2.0 - 1.0 - decoded).abs().max()) < 1.01 * 2 / 255
    again = make_pairs(vae, pictures, 2, 32, 5, seed=0)
    assert np.array_equal(again.large, pairs.large)


def test_pairs_of_files_are_those_of_their_pictures(pictures: Pictures, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = make_autoencoder().requires_grad_(False).eval()
    for index, picture in enumerate(pictures.leaves):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    pairs = read_pairs(vae, sorted(tmp_path.glob("*.png")), 4)
    assert pairs.scale == 4
    assert np.array_equal(pairs.large, pictures.leaves)
    small = to_images(pairs.clean) * 2.0 - 1.0
    decoded = vae.decode(vae.encode(small).latent).sample.clamp(-1.0, 1.0)
    assert float((to_images(pairs.decoded) * 2.0 - 1.0 - decoded).abs().mean()) < 0.02


@pytest.mark.parametrize("scale", [2, 4])
def test_drawn_crops_are_aligned_and_of_both_kinds(scale: int) -> None:
    rows, columns = np.mgrid[0:32, 0:32].astype(np.uint8)
    clean = np.stack([rows, columns, np.zeros_like(rows)], axis=-1)[None]
    decoded = clean + np.array([0, 0, 200], dtype=np.uint8)
    pairs = PicturePairs(clean.repeat(scale, 1).repeat(scale, 2), clean, decoded)
    small, large = pairs.draw(np.random.default_rng(0), 64, 8)
    assert large.shape == (64, 3, 8 * scale, 8 * scale)
    nearest = F.interpolate(small, scale_factor=float(scale))
    assert torch.equal(nearest[:, :2], large[:, :2])
    kinds = small[:, 2].flatten(1).amax(dim=1) > 0.5
    assert 10 < int(kinds.sum()) < 54
    first_rows = {tuple((small[i, 0, 0, :2] - small[i, 0, 0, 0]).sign().tolist()) for i in range(64)}
    assert len(first_rows) == 3  # turned and mirrored: the row index stands still, falls or rises along a row


@pytest.mark.parametrize("scale", [2, 4])
def test_the_file_has_the_published_keys_and_opens_as_the_same_network(scale: int, tmp_path: Path) -> None:
    net = fresh(scale)
    path = tmp_path / "swinir.safetensors"
    write_swinir(path, net)
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
    ends = {"conv_before_upsample.0.weight", "upsample.0.weight", "conv_last.bias", "patch_embed.norm.bias"}
    assert ends <= keys
    assert not any(key.startswith("heads.") for key in keys)
    assert ("upsample.2.weight" in keys) == (scale == 4)
    assert path.stat().st_size < 700_000
    assert path.stat().st_mode & 0o777 == 0o644
    assert read_lua(path).spec == swinir_spec(scale)
    images: Tensor = torch.rand(1, 3, 16, 16)
    opened = PixelUpscaler.open({scale: path}, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.half())
        expected = net(images, scale).clamp(0.0, 1.0)
    torch.testing.assert_close(opened.upscale(images, scale), expected, rtol=0, atol=1e-5)


def test_a_run_writes_its_files_and_resumes(vae: AutoencoderKL, pictures: Pictures, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "vae")
    pool = Pool(tmp_path / "pool", leaf_count=2, scene_count=2, held_out_count=2, leaf_px=128, scene_px=128)
    pool.folder.mkdir()
    for seed in (0, 1):
        for kind in ("leaves", "scenes"):
            np.save(pool.folder / f"{kind}_{seed}_128_2.npy", pictures.leaves)
    out, small = tmp_path / "x2", tmp_path / "x2" / "swinir_x2.safetensors"
    pairs = pool_pairs(tmp_path / "vae", pool, 2, 0)
    train_swinir(out, *pairs, None, Budget(steps=2), 0, False)
    first = read_lua(small)
    train_swinir(out, *pairs, None, Budget(steps=2), 0, True)  # its budget is spent already
    assert len((out / "log.jsonl").read_text().splitlines()) == 1
    train_swinir(out, *pairs, None, Budget(steps=3), 0, True)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 3]
    assert {"clean_gain", "decoded_gain"} <= log[0].keys()
    trained = read_lua(small)
    assert not torch.equal(trained.conv_first.weight, first.conv_first.weight)
    train_swinir(tmp_path / "x4", *pool_pairs(tmp_path / "vae", pool, 4, 0), small, Budget(steps=1), 0, False)
    larger = read_lua(tmp_path / "x4" / "swinir_x4.safetensors")
    key = "layers.1.residual_group.blocks.3.mlp.fc2.weight"
    taken, own = trained.state_dict()[key], larger.state_dict()[key]
    assert float((own - taken).abs().mean()) < 0.2 * float(taken.abs().mean())


@pytest.mark.parametrize("scale", [2, 4])
def test_the_shipped_network_beats_bicubic_on_a_new_picture_and_its_tiles_show_no_seam(scale: int) -> None:
    bundle = read_bundle(Path(__file__).parents[3] / "bundles" / "pocket")
    assert bundle.scales_of("swinir") == (1, 2, 4)
    large = torch.from_numpy(draw_leaves(np.random.default_rng((99, 0)), 384)).permute(2, 0, 1)[None] / 127.5 - 1.0
    small = (shrink(large, scale) + 1.0) / 2.0
    upscaler = PixelUpscaler.open(bundle.swinir, torch.device("cpu"), torch.float32)
    upscaled = upscaler.upscale(small, scale)
    bicubic = F.interpolate(small, scale_factor=float(scale), mode="bicubic")
    assert psnr_db(upscaled * 2.0 - 1.0, large) > psnr_db(bicubic * 2.0 - 1.0, large) + 0.5
    tiled = PixelUpscaler(upscaler.nets, torch.device("cpu"), torch.float32, tile_px=80, halo_px=16).upscale(
        small, scale
    )
    assert 0.0 < float((tiled - upscaled).abs().max()) < 1.0 / 255.0
