"""The text training of stride 4 learns, resumes exactly, and leaves a stock SanaPipeline."""

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from transformers import PreTrainedTokenizerFast

from giantleap.training.optim import Budget, MuonAdamW
from giantleap.training.pocket import text as pocket_text
from giantleap.training.pocket.network import SCALING_FACTOR, make_autoencoder
from giantleap.training.pocket.state import TrainState
from giantleap.training.pocket.studio import write_pool
from giantleap.training.pocket.text import (
    ADAM_NAMES,
    CONTINUED,
    FRESH,
    HALVED,
    SHORT,
    Recipe,
    TextToLatent,
    choose_schedule,
    draw_sigma,
    flow_loss,
    make_scheduler,
    make_text_encoder,
    picture_gains,
    tokenize,
    train_reader,
    train_text,
)
from giantleap.training.pocket.tokenizer import MAX_TOKENS, open_sana_tokenizer, open_tokenizer

SMALL = Recipe(batch=2, width=64, depth=1, is_bfloat16=False)


@pytest.fixture(scope="module")
def vae() -> AutoencoderDC:
    torch.manual_seed(0)
    return make_autoencoder().eval()


@pytest.fixture(scope="module")
def scenes(vae: AutoencoderDC, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_pool(folder, vae, 6, seed=0)
    return folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pocket_text, "READER_STEPS", 2)
    monkeypatch.setattr(pocket_text, "HELD_OUT", 2)


def test_the_instruction_before_a_prompt_is_dropped(tmp_path: Path) -> None:
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    open_sana_tokenizer().save_pretrained(tmp_path)
    for tokenizer in (open_sana_tokenizer(), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        for prompt in ("a large red sphere on the left", "", "a dog, a red cube"):
            assert tokenizer("\n".join(lines) + prompt).input_ids == open_tokenizer()(prompt).input_ids


def test_sampler_follows_the_clean_latents_of_the_network() -> None:
    scheduler = make_scheduler()
    scheduler.set_timesteps(12)
    clean, sample = torch.randn(1, 24, 4, 4), torch.randn(1, 24, 4, 4)
    for timestep in scheduler.timesteps:
        (sample,) = scheduler.step(clean, timestep, sample, return_dict=False)
    assert torch.allclose(sample, clean, atol=1e-5)


def test_error_of_the_clean_latents_counts_as_that_of_the_velocity() -> None:
    network = TextToLatent(len(open_sana_tokenizer()), SMALL)  # its last layer is zero: it predicts zeros
    latents, sigma = torch.ones(2, 24, 32, 32), torch.tensor([0.5, 0.01])
    captions = tokenize(open_sana_tokenizer(), ["a red cube", ""])
    loss = flow_loss(network, latents, captions, sigma, torch.zeros_like(latents), torch.ones(24), is_bfloat16=False)
    assert float(loss.detach()) == pytest.approx((1 / 0.5**2 + 1 / pocket_text.SIGMA_FLOOR**2) / 2)


def test_a_channel_counts_by_what_it_changes_in_the_picture(vae: AutoencoderDC) -> None:
    torch.manual_seed(0)
    latents = torch.randn(2, 24, 8, 8)
    deaf = make_autoencoder().eval()
    deaf.load_state_dict(vae.state_dict())
    first = deaf.decoder.conv_in
    with torch.no_grad():
        first.weight[:, 3] = 0.0  # hears channel 3 by no way
    gains = picture_gains(deaf, latents)
    assert gains.shape == (24,)
    assert float(gains.mean()) == pytest.approx(1.0)
    assert float(gains[3]) < 1e-6 < float(gains[2])


def test_caption_changes_the_picture_after_steps() -> None:
    torch.manual_seed(0)
    network, tokenizer = TextToLatent(len(open_sana_tokenizer()), SMALL), open_sana_tokenizer()
    optimizer = MuonAdamW(network.named_parameters(), 0.02, 1e-3, ADAM_NAMES)
    latents = torch.randn(4, 24, 32, 32)
    captions = tokenize(tokenizer, ["a red cube", "", "a blue cone", "right"])
    for _ in range(3):
        sigma = draw_sigma(4, FRESH.early_shifts)
        flow_loss(
            network, latents, captions, sigma, torch.randn_like(latents), torch.ones(24), is_bfloat16=False
        ).backward()
        optimizer.step(1.0)
    other = tokenize(tokenizer, ["right", "a blue cone", "", "a red cube"])
    with torch.no_grad():
        one, two = (network(latents, torch.full((4,), 0.9), words) for words in (captions, other))
    assert not torch.allclose(one, two, atol=1e-5)


def test_text_encoder_learns_to_read_slots() -> None:
    torch.manual_seed(0)
    tokenizer = open_sana_tokenizer()
    few, more = (train_reader(make_text_encoder(len(tokenizer)), tokenizer, steps, seed=0) for steps in (2, 60))
    assert more > few + 0.2


def test_rate_warms_up_stays_and_falls_to_zero() -> None:
    assert FRESH.rate(0.0, 0) == pytest.approx(0.02)
    assert FRESH.rate(0.3, 1000) == 1.0
    assert FRESH.rate(1.0, 1000) == 0.0


def test_rate_of_a_run_with_a_start_is_lower_and_falls_all_the_time() -> None:
    assert [CONTINUED.rate(share, 1000) for share in (0.0, 0.5, 1.0)] == pytest.approx([0.4, 0.2, 0.0])
    assert HALVED.rate(0.0, 1000) < CONTINUED.rate(0.0, 1000) and HALVED.rate(1.0, 1000) == 0.0


def test_the_tokens_of_start_and_run_choose_the_schedule() -> None:
    assert choose_schedule(4, 4) is CONTINUED and choose_schedule(4, 2) is HALVED and choose_schedule(2, 2) is SHORT
    assert [CONTINUED.freedom(share) for share in (0.0, 0.5, 1.0)] == [0.0, 0.0, 0.6]
    assert SHORT.freedom(0.0) == SHORT.freedom(1.0) == 0.7


def test_noise_levels_fall_in_the_course_of_a_run() -> None:
    levels = [draw_sigma(4096, each).mean() for each in (FRESH.shifts(0.0), FRESH.shifts(0.2), CONTINUED.shifts(0.9))]
    assert levels[0] > levels[1] > levels[2]
    assert FRESH.shifts(0.2) == CONTINUED.shifts(0.2)


def test_stopped_run_goes_on_as_if_it_had_not_been(
    scenes: Path, vae: AutoencoderDC, tmp_path: Path, short: None
) -> None:
    train_text(tmp_path / "whole", scenes, vae, Budget(steps=4), 0, False, SMALL)
    # A budget's length shapes the rate, so the first half of the same run is stopped by hand.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pocket_text, "train_steps", lambda *_, **__: iter((0.0, 0.25)))
        patch.setattr(TrainState, "is_due", lambda state, *_: state.step == 2)
        train_text(tmp_path / "parts", scenes, vae, Budget(steps=4), 0, False, SMALL)
    train_text(tmp_path / "parts", scenes, vae, Budget(steps=4), 0, True, SMALL)
    whole, parts = (torch.load(tmp_path / run / "state.pt", weights_only=True) for run in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    assert all(torch.equal(whole["network"][name], value) for name, value in parts["network"].items())


def test_pipeline_is_stock_and_draws(scenes: Path, vae: AutoencoderDC, tmp_path: Path, short: None) -> None:
    train_text(tmp_path, scenes, vae, Budget(steps=1), 0, False, SMALL)
    pipeline = SanaPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae.config.scaling_factor == SCALING_FACTOR
    pictures = pipeline(
        ["a red cube", "a large blue sphere on the left"],
        num_inference_steps=2,
        guidance_scale=2.0,
        width=128,
        height=128,
        generator=[torch.Generator().manual_seed(seed) for seed in range(2)],
        max_sequence_length=MAX_TOKENS,
        use_resolution_binning=False,
        output_type="np",
    ).images
    assert pictures.shape == (2, 128, 128, 3)
    assert np.isfinite(pictures).all()


def test_a_run_of_small_tokens_begins_with_one_of_large_ones(
    scenes: Path, vae: AutoencoderDC, tmp_path: Path, short: None
) -> None:
    train_text(tmp_path / "large", scenes, vae, Budget(steps=1), 0, False, SMALL)
    fine = replace(SMALL, patch=2)
    train_text(tmp_path / "fine", scenes, vae, Budget(steps=1), 0, False, fine, tmp_path / "large" / "state.pt")
    pipeline = SanaPipeline.from_pretrained(tmp_path / "fine" / "pipeline")
    assert pipeline.transformer.config.patch_size == 2
