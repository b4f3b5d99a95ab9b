"""Schedules: the published times, and that a plain run is the stock pipeline's, bit for bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from giantleap.models.methods.demofusion import cosine_factor
from giantleap.models.methods.denoiser import Denoiser
from giantleap.models.methods.steppers import FlowStepper, open_stepper, sample
from giantleap.models.methods.views import View
from tests.models.methods.tiny_unets import ITEM, NO_PROGRESS, WIDE, noise_of, open_generator, stock_latent
from tests.tiny_pipelines import tiny_sd3

CPU = torch.device("cpu")
SDXL: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def sdxl_scheduler() -> Any:
    return DDIMScheduler(**SDXL, clip_sample=False, set_alpha_to_one=False)


@pytest.mark.parametrize(
    ("steps", "first", "last"), [(50, [981, 961], [21, 1]), (40, [976, 951], [26, 1]), (30, [958, 925], [34, 1])]
)
@pytest.mark.parametrize("scheduler", [sdxl_scheduler(), EulerDiscreteScheduler(**SDXL)], ids=["DDIM", "Euler"])
def test_the_times_of_sdxl(scheduler: Any, steps: int, first: list[int], last: list[int]) -> None:
    times = open_stepper(scheduler, steps, CPU).timesteps.tolist()
    assert (times[:2], times[-2:], len(times)) == (first, last, steps)


@pytest.mark.parametrize(
    ("index", "signal", "noise", "cosine"),
    [
        (0, 0.0760, 0.9971, 0.9991),
        (10, 0.2085, 0.9780, 0.8863),
        (15, 0.3076, 0.9515, 0.7692),
        (20, 0.4241, 0.9056, 0.6259),
        (35, 0.7889, 0.6145, 0.1825),
        (49, 0.9991, 0.0413, 2.5e-6),
    ],
)
def test_noise_levels_and_cosine_factors_of_sdxl(index: int, signal: float, noise: float, cosine: float) -> None:
    stepper = open_stepper(sdxl_scheduler(), 50, CPU)
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert float(stepper.add_noise(one, zero, index)) == pytest.approx(signal, abs=1e-4)
    assert float(stepper.add_noise(zero, one, index)) == pytest.approx(noise, abs=1e-4)
    assert cosine_factor(float(stepper.timesteps[index])) == pytest.approx(cosine, abs=1e-4)
    assert cosine_factor(1000) == 1 and cosine_factor(0) == 0


@pytest.mark.parametrize("item", [ITEM, WIDE, replace(ITEM, guidance_scale=1.0)], ids=["square", "wide", "unguided"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_plain_run_is_the_stock_pipeline_bit_for_bit(name: str, item: Any) -> None:
    pipeline = open_generator(name).pipeline
    stepper = open_stepper(pipeline.scheduler, item.steps, CPU)
    start = noise_of(item.seed).normal((1, 4, item.height_px // 8, item.width_px // 8))
    view = View(item.height_px, item.width_px, item.guidance_scale)
    with torch.no_grad():
        drawn, _ = sample(Denoiser.open(pipeline, item), stepper, start, view, NO_PROGRESS)
    assert torch.equal(drawn, stock_latent(pipeline, item))


def test_a_plain_run_of_sana_is_the_stock_pipeline_with_one_step_of_memory() -> None:
    pipeline = open_generator("sana").pipeline
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=1)
    own = {"use_resolution_binning": False, "max_sequence_length": 90, "complex_human_instruction": None}
    stepper = open_stepper(pipeline.scheduler, 3, CPU)
    start = noise_of(3).normal((1, 24, 16, 16))
    with torch.no_grad():
        drawn, _ = sample(Denoiser.open(pipeline, ITEM), stepper, start, View(64, 64, 3.0), NO_PROGRESS)
    item = replace(ITEM, negative_prompt="")
    expected = pipeline(
        item.prompt,
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **own,
    ).images
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "sample"])
def test_flow_matching_ends_at_what_its_network_sees(prediction_type: str) -> None:
    scheduler: Any = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type=prediction_type)
    stepper = open_stepper(scheduler, 6, CPU)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)

    def predict(x: Tensor, t: Tensor, view: View) -> Tensor:
        return clean if prediction_type == "sample" else noise - clean

    drawn, _ = sample(predict, stepper, stepper.add_noise(clean, noise, 0), View(64, 64, 1.0), NO_PROGRESS)
    torch.testing.assert_close(drawn, clean, rtol=0, atol=1e-5)


def test_flow_times_are_those_of_the_bundles_scheduler() -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stepper = open_stepper(scheduler, 5, CPU)
    scheduler.set_timesteps(5)
    assert isinstance(stepper, FlowStepper) and torch.equal(stepper.timesteps, scheduler.timesteps)


def test_schedulers_and_pipelines_that_cannot_are_refused() -> None:
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        open_stepper(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 5, CPU)
    with pytest.raises(ValueError, match="flow_prediction or sample"):
        FlowStepper(torch.ones(1), torch.ones(2), "epsilon")
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline has no loop"):
        Denoiser.open(tiny_sd3(), ITEM)


def test_a_step_with_eta_takes_one_noise_for_the_whole_latent() -> None:
    stepper = open_stepper(sdxl_scheduler(), 4, CPU, eta=1.0)
    drawn = []

    def predict(x: Tensor, t: Tensor, view: View) -> Tensor:
        drawn.append(x)
        return torch.zeros_like(x)

    start = noise_of(0).normal((1, 4, 8, 8))
    noisy, _ = sample(predict, stepper, start, View(64, 64, 1.0), NO_PROGRESS, noise=noise_of(1))
    plain, _ = sample(predict, stepper, start, View(64, 64, 1.0), NO_PROGRESS)
    assert len(drawn) == 8 and not torch.equal(noisy, plain)
