"""The text-to-latent training learns, resumes, and leaves a pipeline that stock diffusers opens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from giantleap.training.optim import Budget
from giantleap.training.pocket import text as pocket_text
from giantleap.training.pocket.captions import known_words
from giantleap.training.pocket.scenes import write_pool
from giantleap.training.pocket.text import (
    EARLY_SHIFTS,
    LATE_SHIFTS,
    TextToLatent,
    compass_loss,
    draw_sigma,
    flow_loss,
    low_level_features,
    make_optimizer,
    make_scheduler,
    to_tokens,
    train_text,
)
from giantleap.training.pocket.tokenizer import MAX_TOKENS, open_tokenizer


def small_network() -> TextToLatent:
    torch.manual_seed(0)
    return TextToLatent(len(open_tokenizer()), (32, 32, 32))


def test_every_known_word_is_one_token_and_no_other_word_is() -> None:
    tokenizer = open_tokenizer()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in known_words())
    strangers = ("dog", "re", "gre", "sp", "spheres", "rred", "floo", "é", "ed", "nk", "3")
    for word in strangers:
        pieces = tokenizer.tokenize(word)
        assert len(pieces) > 1 or pieces == [tokenizer.unk_token], word


def test_tokens_survive_saving(tmp_path: Path) -> None:
    tokenizer = open_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    caption = ["A Large red SPHERE on a green floor, on the left", ""]
    again = type(tokenizer).from_pretrained(tmp_path)
    assert torch.equal(to_tokens(tokenizer, caption), to_tokens(again, caption))
    assert to_tokens(tokenizer, caption).shape == (2, MAX_TOKENS)


def test_sampler_times_are_thousandths_of_its_noise_levels() -> None:
    scheduler = make_scheduler()
    scheduler.set_timesteps(20)
    assert scheduler.init_noise_sigma == 1.0
    assert np.allclose(scheduler.timesteps.numpy() / 1000, scheduler.sigmas[:-1].numpy(), atol=1.1e-3)
    assert scheduler.sigmas[0] > 0.99 and scheduler.sigmas[-1] == 0.0


def test_sampler_follows_the_velocity_of_the_loss_back_to_the_latent() -> None:
    scheduler = make_scheduler()
    scheduler.set_timesteps(12)
    latent, noise = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    sample = noise
    for timestep in scheduler.timesteps:
        (sample,) = scheduler.step(noise - latent, timestep, sample, return_dict=False)
    assert torch.allclose(sample, latent, atol=0.02)


def test_loss_moves_both_networks() -> None:
    network, tokenizer = small_network(), open_tokenizer()
    optimizer = make_optimizer(network, 0.02, 1e-3)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    torch.manual_seed(1)
    latents, tokens = torch.randn(4, 16, 16, 16), to_tokens(tokenizer, ["a red cube"] * 4)
    for _ in range(3):  # the first steps open the zero-initialised layers for the gradient behind them
        flow_loss(network, latents, tokens, draw_sigma(4), torch.randn_like(latents)).backward()
        optimizer.step(1.0)
    moved = {name.split(".")[0] for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"text_encoder", "unet"}


def test_caption_changes_the_velocity_after_a_step() -> None:
    network, tokenizer = small_network(), open_tokenizer()
    optimizer = make_optimizer(network, 0.02, 1e-3)
    latents = torch.randn(4, 16, 16, 16)
    tokens = to_tokens(tokenizer, ["a red cube", "", "a blue cone", "right"])
    for _ in range(3):
        flow_loss(network, latents, tokens, draw_sigma(4), torch.randn_like(latents)).backward()
        optimizer.step(1.0)
    sigma = torch.full((4,), 0.9)
    with torch.no_grad():
        assert not torch.allclose(network(latents, sigma, tokens), network(latents, sigma, tokens.flip(0)), atol=1e-5)


def test_compass_teaches_the_unet_left_from_right() -> None:
    network, tokenizer = small_network(), open_tokenizer()
    optimizer = make_optimizer(network, 0.02, 3e-3)
    tokens, losses = to_tokens(tokenizer, [""] * 4), []
    for _ in range(12):
        latents = torch.randn(4, 16, 16, 16)
        with low_level_features(network.unet) as features:
            network(latents, torch.full((4,), 0.9), tokens)
        losses.append(compass_loss(network, features))
        losses[-1].backward()
        optimizer.step(1.0)
    assert len(features) == 3
    assert losses[-1] < 0.8 * losses[0]
    with low_level_features(network.unet) as features:
        pass
    network(latents, torch.full((4,), 0.9), tokens)
    assert features == []


def test_noise_levels_lean_to_high_noise_until_the_late_part() -> None:
    early = draw_sigma(4000, EARLY_SHIFTS, torch.Generator().manual_seed(0))
    late = draw_sigma(4000, LATE_SHIFTS, torch.Generator().manual_seed(0))
    assert early.min() > 0.0 and early.max() < 1.0
    assert late.median() < 0.7 < 0.78 < early.median() < 0.9


@pytest.fixture
def vae_folder(tmp_path: Path) -> Path:
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        sample_size=128,
        scaling_factor=1.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_training_resumes_and_leaves_a_stock_pipeline(
    tmp_path: Path, vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pocket_text, "HELD_OUT", 4)
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    write_pool(scenes, 12, seed=0)
    train_text(out, scenes, vae_folder, Budget(steps=2), seed=0, resume=False, threads=1, batch=2)
    train_text(out, scenes, vae_folder, Budget(steps=3), seed=0, resume=True, threads=1, batch=2)
    steps = [line.split(",")[0] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == ['{"step": 2', '{"step": 3']

    pipeline = DiffusionPipeline.from_pretrained(out / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert {module.dtype for module in (pipeline.vae, pipeline.unet, pipeline.text_encoder)} == {torch.float32}
    image = pipeline("a red cube", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (128, 128, 3) and np.isfinite(image).all()
