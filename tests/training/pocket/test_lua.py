"""The pocket LUA's training: aligned pairs, gradients through the frozen decoder, stages that follow each other."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from giantleap.models.lua.checkpoints import read_lua
from giantleap.models.lua.network import PRESETS, Lua
from giantleap.training.optim import Budget
from giantleap.training.pocket.leaves import draw_leaves
from giantleap.training.pocket.lua import (
    STAGES,
    Stage,
    channel_weights,
    mean_log_square,
    picture_map,
    shown_error,
    stage_loss,
    train_lua,
    validate,
)
from giantleap.training.pocket.pairs import Pairs, draw_view, read_pairs, shrink, write_pairs
from giantleap.training.pocket.vae import Pictures, make_vae

SIZES_PX = ((64, 96), (128, 128))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return make_vae().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def leaves() -> Any:
    return np.stack([draw_leaves(np.random.default_rng((7, i)), 256) for i in range(2)])


@pytest.fixture(scope="module")
def pairs_dir(vae: AutoencoderKL, leaves: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for part, seed in (("train", 0), ("held_out", 1)):
        write_pairs(vae, Pictures(leaves, leaves[:, :128, :128]), folder / part, 1, seed, SIZES_PX)
    return folder


@pytest.fixture(scope="module")
def groups(pairs_dir: Path) -> list[Pairs]:
    return read_pairs(pairs_dir / "train")


def test_pairs_are_encodings_of_the_shrunk_pictures(vae: AutoencoderKL, groups: list[Pairs]) -> None:
    """Whole pictures of every size, each size with the same share of the pixels."""
    assert sorted(pairs.pictures.shape for pairs in groups) == [(2, 128, 128, 3), (5, 64, 96, 3)]
    for pairs in groups:
        height, width = pairs.pictures.shape[1:3]
        images = pairs.pictures_at(np.array([1]))
        for scale in (1, 2, 4):
            with torch.no_grad():
                latent = vae.encode(images if scale == 1 else shrink(images, scale)).latent_dist.mode()
            assert latent.shape[-2:] == (height // 8 // scale, width // 8 // scale)
            error = (latent - pairs.latents[scale][1:2].float()).square().mean().sqrt()
            assert float(error) < 0.02 * float(latent.std())  # encoded in bfloat16


def test_latents_and_pictures_of_a_place_belong_together() -> None:
    numbers = torch.arange(3.0).view(3, 1, 1, 1)
    latents = {scale: (10.0 * scale + numbers).half().expand(3, 16, 4 // scale, 4 // scale) for scale in (1, 2, 4)}
    pictures = np.broadcast_to(np.arange(3, dtype=np.uint8)[:, None, None, None] * 100, (3, 32, 32, 3)).copy()
    pairs, places = Pairs(latents, pictures), np.array([2, 0])
    small, large = pairs.latents_at(places, 4)
    assert small[:, 0, 0, 0].tolist() == [42.0, 40.0]
    assert large[:, 0, 0, 0].tolist() == [12.0, 10.0]
    assert ((pairs.pictures_at(places)[:, 0, 0, 0] + 1.0) * 127.5).round().tolist() == [200.0, 0.0]


def test_views_are_seeded_bounded_and_of_many_kinds(leaves: Any) -> None:
    rng, again = np.random.default_rng(3), np.random.default_rng(3)
    views = [draw_view(rng, leaves, 64, 96) for _ in range(24)]
    torch.testing.assert_close(views[0], draw_view(again, leaves, 64, 96), rtol=0, atol=0)
    assert all(view.shape == (1, 3, 64, 96) and float(view.abs().max()) <= 1.0 for view in views)
    detail = torch.stack([view.diff(dim=-1).abs().mean() / view.std() for view in views])
    assert float(detail.max() / detail.min()) > 3.0  # from blurred to grainy
    chroma = torch.stack([(view - view.mean(dim=1, keepdim=True)).abs().mean() for view in views])
    assert float(chroma.max()) > 0.2
    assert float(chroma.min()) < 0.1


def test_reading_pairs_that_are_not_there_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"training\.pocket pairs"):
        read_pairs(tmp_path)


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if not stage.is_linear])
def test_each_stage_moves_the_adapter_and_not_the_decoder(name: str, vae: AutoencoderKL, groups: list[Pairs]) -> None:
    torch.manual_seed(0)
    stage, places = STAGES[name], np.array([0])
    net = Lua(PRESETS["pocket"])
    small, large = groups[0].latents_at(places, 2)
    upscaled = net(small, 2)
    decoded, pictures = (vae.decode(upscaled).sample, groups[0].pictures_at(places)) if stage.decodes else (None, None)
    torch.autograd.backward(stage_loss(stage, upscaled, large, decoded, pictures))
    moved = net.get_parameter("heads.x2.conv_last.weight").grad
    assert moved is not None
    assert float(moved.abs().sum()) > 0.0
    assert all(weight.grad is None for weight in vae.parameters())


def test_picture_terms_need_the_decoder_for_their_gradient(vae: AutoencoderKL, groups: list[Pairs]) -> None:
    """With every latent term off, the adapter still learns: the decode keeps its graph."""
    stage, places = replace(STAGES["2"], latent_l1=0.0, latent_fourier=0.0), np.array([0])
    _, large = groups[0].latents_at(places, 2)
    upscaled = torch.zeros_like(large).requires_grad_()
    loss = stage_loss(stage, upscaled, large, vae.decode(upscaled).sample, groups[0].pictures_at(places))
    (gradient,) = torch.autograd.grad(loss, upscaled)
    assert float(gradient.abs().sum()) > 0.0


def linear_decoder() -> Any:
    """A decoder in which a code shows in its own block of pixels and in the eight around it."""
    kernel = 0.05 * torch.randn(16, 3, 24, 24, generator=torch.Generator().manual_seed(0))

    def decode(latent: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=F.conv_transpose2d(latent, kernel, stride=8, padding=8) + 0.3)

    return SimpleNamespace(decode=decode)


def test_picture_map_is_exact_for_a_linear_decoder(groups: list[Pairs]) -> None:
    decoder = linear_decoder()
    weight = picture_map(decoder, groups, seed=0, count=8)
    error = torch.randn(1, 16, 5, 7, generator=torch.Generator().manual_seed(1))
    mapped = F.conv2d(error, weight, padding=1)
    shown = F.pixel_unshuffle(decoder.decode(error).sample - 0.3, 8)
    torch.testing.assert_close(mapped, shown, rtol=0, atol=1e-2 * float(shown.std()))


def test_channel_weights_are_what_a_channel_costs_in_the_picture() -> None:
    weight = torch.zeros(192, 16, 3, 3)
    weight[5, :, 1, 1] = 1.0
    weight[7, 3, 0, 2] = 3.0
    weights = channel_weights(weight).flatten()
    assert float(weights.mean()) == pytest.approx(1.0)
    assert float(weights[3] / weights[0]) == pytest.approx(10.0**0.5)


def test_logarithm_weighs_pictures_alike() -> None:
    """Halving the error of a good picture counts as much as halving that of a bad one."""
    error = torch.stack([torch.full((3, 8, 8), 2.0), torch.full((3, 8, 8), 9.0)])
    better_first, better_last = error.clone(), error.clone()
    better_first[0] /= 2.0
    better_last[1] /= 2.0
    gain_first, gain_last = (mean_log_square(error) - mean_log_square(e) for e in (better_first, better_last))
    assert float(gain_first) == pytest.approx(float(gain_last), rel=0.05)


def test_error_beyond_a_clipped_black_or_white_does_not_count() -> None:
    decoded = torch.tensor([-1.5, 1.5, -0.5, 0.5, -1.5, 1.5], requires_grad=True)
    pictures = torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0, 0.0])
    error = shown_error(decoded, pictures)
    assert error.tolist() == [0.0, 0.0, 0.5, -0.5, -1.5, 1.5]
    (gradient,) = torch.autograd.grad(error.square().sum(), decoded)
    assert gradient.tolist() == [0.0, 0.0, 1.0, -1.0, -3.0, 3.0]


def test_batches_hold_about_the_same_pixels_whatever_the_size() -> None:
    def pairs(side: int) -> Pairs:
        return Pairs({}, np.zeros((1, side, side, 3), dtype=np.uint8))

    stage, decoding = Stage(0.01, 8.0, is_linear=True), Stage(0.01, 8.0, picture_square=1.0)
    assert (stage.batch(pairs(256), 2), stage.batch(pairs(512), 2)) == (8, 2)
    assert (stage.batch(pairs(256), 4), stage.batch(pairs(1024), 2)) == (20, 1)
    assert decoding.batch(pairs(256), 4) == 8


def test_untrained_adapter_is_latent_bicubic(groups: list[Pairs]) -> None:
    small, _ = groups[0].latents_at(np.array([0]), 2)
    with torch.no_grad():
        upscaled = Lua(PRESETS["pocket"]).eval()(small, 2)
    expected = F.interpolate(small, scale_factor=2.0, mode="bicubic")
    torch.testing.assert_close(upscaled, expected, rtol=0, atol=1e-4)


def test_gain_is_measured_against_decode_then_bicubic(groups: list[Pairs]) -> None:
    decoder, pairs, values = linear_decoder(), groups[0], []
    scores = validate(Lua(PRESETS["pocket"]), decoder, groups[:1])
    for index in range(len(pairs.pictures)):
        place = np.array([index])
        small, _ = pairs.latents_at(place, 2)
        picture = F.interpolate(decoder.decode(small).sample, scale_factor=2.0, mode="bicubic").clamp(-1.0, 1.0)
        error = ((picture + 1.0) * 127.5).round() / 127.5 - 1.0 - pairs.pictures_at(place)
        values.append(float(-10.0 * torch.log10(error.square().mean() / 4.0)))
    assert scores["x2"] - scores["x2_gain"] == pytest.approx(float(np.mean(values)), abs=0.02)  # bfloat16
    assert abs(scores["x2_gain"]) > 0.1


@pytest.mark.slow
def test_stages_follow_each_other_and_resume(vae: AutoencoderKL, pairs_dir: Path, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "vae")
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    shared = (tmp_path / "vae", pairs_dir)
    train_lua(first, *shared, "linear", None, Budget(steps=2), 0, False)
    train_lua(first, *shared, "linear", None, Budget(steps=3), 0, True)
    train_lua(second, *shared, "square", first / "lua.safetensors", Budget(steps=1), 0, False)
    before, after = read_lua(first / "lua.safetensors"), read_lua(second / "lua.safetensors")
    assert before.spec == PRESETS["pocket"]
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
