"""The curriculum's numbers are those of the paper, and what follows from them follows from the step alone."""

import pytest
import torch
from torch import nn

from giantleap.training.curriculum import loss_terms, rate_at, scales_at, tiles_at, total
from giantleap.training.run_config import (
    OWN,
    PAPER,
    ConfigError,
    LuaConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    StageWeights,
)


def test_stages_are_those_of_the_paper() -> None:
    weights = {name: {k: v for k, v in stage.weights.model_dump().items() if v} for name, stage in PAPER.items()}
    assert weights == {
        "I": {"latent_l1": 1.0, "latent_fft": 0.1},
        "II": {"latent_l1": 1.0, "latent_fft": 0.1, "pixel_ds": 0.1, "pixel_hf": 0.05},
        "III": {"pixel_l1": 10.0, "pixel_fft": 1.0, "eagle": 5e-5},
    }
    assert [stage.betas for stage in PAPER.values()] == [(0.9, 0.995), (0.9, 0.995), (0.9, 0.99)]
    assert [(stage.micro_batch, stage.effective_batch) for stage in PAPER.values()] == [(64, 2048), (8, 32), (8, 32)]
    assert {stage.steps for stage in PAPER.values()} == {125_000}
    assert [stage.weights.decodes for stage in PAPER.values()] == [False, True, True]
    shared = OptimizerConfig()
    assert (shared.rate, shared.clip, shared.ema_decay, shared.warmup_steps) == (2e-4, 0.4, 0.999, 0)


def test_rates_are_those_of_multi_step_lr_at_the_published_milestones() -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=2e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [625, 938, 1125], gamma=0.5)
    for step in range(1250):
        assert rate_at(OptimizerConfig(), 1250, step) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    for milestone, rate in ((62_500, 1e-4), (93_750, 5e-5), (112_500, 2.5e-5)):
        assert rate_at(OptimizerConfig(), 125_000, milestone - 1) == pytest.approx(2 * rate)
        assert rate_at(OptimizerConfig(), 125_000, milestone) == pytest.approx(rate)


def test_a_warm_up_rises_to_the_rate() -> None:
    rates = [rate_at(OptimizerConfig(warmup_steps=4), 100, step) for step in range(5)]
    assert rates == pytest.approx([5e-5, 1e-4, 1.5e-4, 2e-4, 2e-4])


def test_both_heads_until_the_last_50_000_steps_then_each_in_half_of_them() -> None:
    stage = PAPER["I"]
    assert scales_at(stage, (2, 4), 0, 0, 0) == scales_at(stage, (2, 4), 0, 0, 74_999) == (2, 4)
    drawn = [scales_at(stage, (2, 4), 0, 0, step) for step in range(75_000, 77_000)]
    assert set(drawn) == {(2,), (4,)} and 900 < drawn.count((2,)) < 1100
    assert drawn[:50] != [scales_at(stage, (2, 4), 0, 1, step) for step in range(75_000, 75_050)]


def test_every_tile_comes_once_before_any_comes_again() -> None:
    drawn = [tile for step in range(30) for tile in tiles_at(10, 4, 7, 0, step)]
    for deck in range(12):
        assert sorted(drawn[10 * deck : 10 * deck + 10]) == list(range(10))
    assert drawn[:10] != drawn[10:20]
    assert tiles_at(10, 4, 7, 0, 5) != tiles_at(10, 4, 8, 0, 5)
    assert sorted(tiles_at(3, 8, 0, 0, 0)) == [0, 0, 0, 1, 1, 1, 2, 2] or len(tiles_at(3, 8, 0, 0, 0)) == 8


def test_an_effective_batch_is_shared_evenly_or_refused() -> None:
    assert PAPER["I"].micro_batches(8) == 4 and PAPER["II"].micro_batches(4) == 1
    with pytest.raises(ConfigError, match="effective_batch 32 is no multiple of micro_batch 8 times 8"):
        PAPER["II"].micro_batches(8)


def test_a_stage_needs_a_loss() -> None:
    with pytest.raises(ValueError, match="at least one loss"):
        StageWeights()
    with pytest.raises(ValueError, match="pixel_l1"):
        StageWeights(pixel_l1=-1.0)


def test_terms_are_weighted_and_summed() -> None:
    generator = torch.Generator().manual_seed(0)
    upscaled, large = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    decoded, target = (torch.randn(1, 3, 16, 16, generator=generator) for _ in range(2))
    ones = StageWeights(**dict.fromkeys(StageWeights.model_fields, 1.0))
    twice = StageWeights(**dict.fromkeys(StageWeights.model_fields, 2.0))
    mapping = torch.randn(12, 4, 3, 3, generator=generator)
    one, two = (loss_terms(each, upscaled, large, decoded, target, picture_map=mapping) for each in (ones, twice))
    assert one.keys() == set(StageWeights.model_fields)
    for name, value in one.items():
        assert float(two[name]) == pytest.approx(2 * float(value)) and float(value) > 0
    assert float(total(one)) == pytest.approx(sum(float(value) for value in one.values()), rel=1e-5)


def test_a_pixel_loss_without_pictures_is_an_error_and_not_zero() -> None:
    latent = torch.zeros(1, 4, 8, 8)
    for stage in ("II", "III"):
        with pytest.raises(ValueError, match="no decoded pictures"):
            loss_terms(PAPER[stage].weights, latent, latent, None, None)


def test_a_linear_loss_without_its_map_is_an_error_and_not_zero() -> None:
    latent = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="linear map of the decoder"):
        loss_terms(OWN["linear"].weights, latent, latent, None, None)


def test_a_cosine_falls_from_the_rate_to_zero_within_the_stage() -> None:
    config = OptimizerConfig(rate=0.01, schedule="cosine", warmup_steps=10)
    rates = [rate_at(config, 100, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.001) and max(rates) == pytest.approx(0.01, rel=0.05)
    assert rates[50] == pytest.approx(0.005) and rates[100] == pytest.approx(0.0, abs=1e-9)


def test_a_run_knows_the_stage_of_each_step() -> None:
    stages = tuple(
        StageConfig(**{**PAPER[name].model_dump(), "steps": steps})  # type: ignore[index]
        for name, steps in (("I", 2), ("III", 3))
    )
    config = RunConfig(bundle="b", pairs="p", lua=LuaConfig(preset="medium"), stages=stages)  # type: ignore[arg-type]
    assert [config.at(step) for step in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert config.total_steps == 5
    with pytest.raises(ValueError, match="no such step"):
        config.at(5)


def test_a_network_is_a_preset_or_its_fields() -> None:
    assert LuaConfig(preset="release").to_spec(4).channels == 4
    fields = {"embed_dim": 12, "depths": [2], "num_heads": 2, "window": 4}
    assert LuaConfig(spec=fields).to_spec(16).depths == (2,)
    for wrong in (LuaConfig(preset="huge"), LuaConfig(spec={"width": 3}), LuaConfig(spec={**fields, "window": 1})):
        with pytest.raises(ConfigError, match="lua: "):
            wrong.to_spec(16)
