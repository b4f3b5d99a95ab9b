"""The pocket SwinIRs' training: a start at bicubic, aligned pairs of both kinds, published files, runs that resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.engines.swinir import PixelUpscaler
from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.network import Lua
from giantleap.training.evaluation.cases import shrink
from giantleap.training.optim import Budget
from giantleap.training.pocket.autoencoder import psnr_db
from giantleap.training.pocket.drawing.leaves import draw_leaves
from giantleap.training.pocket.network import make_autoencoder
from giantleap.training.pocket.swinir import (
    PicturePairs,
    read_pairs,
    start_as_bicubic,
    swinir_spec,
    to_images,
    train_swinir,
    write_swinir,
)


@pytest.fixture(scope="module")
def vae() -> AutoencoderDC:
    torch.manual_seed(0)
    return make_autoencoder().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pictures of 128 px."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(2):
        Image.fromarray(draw_leaves(np.random.default_rng((7, index)), 128)).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


def fresh(scale: int) -> Lua:
    torch.manual_seed(0)
    net = Lua(swinir_spec(scale)).eval()
    start_as_bicubic(net)
    return net


@pytest.mark.parametrize("scale", [2, 4])
def test_an_untrained_network_enlarges_nearly_bicubically(scale: int) -> None:
    large = to_images(draw_leaves(np.random.default_rng((7, 0)), 96)[None]) * 2.0 - 1.0
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


def test_pairs_hold_the_shrunk_picture_and_its_decode(vae: AutoencoderDC, files: list[Path]) -> None:
    pairs = read_pairs(vae, files, 4)
    assert pairs.scale == 4
    assert [part.shape for part in (pairs.large, pairs.clean, pairs.decoded)] == [
        (2, 128, 128, 3), (2, 32, 32, 3), (2, 32, 32, 3),
    ]  # fmt: skip
    large, small = (to_images(part) * 2.0 - 1.0 for part in (pairs.large, pairs.clean))
    assert float((shrink(large, 4) - small).abs().max()) <= 1.01 * 2 / 255
    with torch.no_grad():
        decoded = vae.decode(vae.encode(small).latent).sample.clamp(-1.0, 1.0)
    assert float((to_images(pairs.decoded) * 2.0 - 1.0 - decoded).abs().max()) < 1.01 * 2 / 255


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


def test_a_run_writes_its_files_and_resumes(vae: AutoencoderDC, files: list[Path], tmp_path: Path) -> None:
    out, small = tmp_path / "x2", tmp_path / "x2" / "swinir_x2.safetensors"
    pairs = read_pairs(vae, files[:1], 2), read_pairs(vae, files[1:], 2)
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
    pairs = read_pairs(vae, files[:1], 4), read_pairs(vae, files[1:], 4)
    train_swinir(tmp_path / "x4", *pairs, small, Budget(steps=1), 0, False)
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
