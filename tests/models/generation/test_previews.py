"""When previews are made, and that the clean latent of a step is what a perfect network points at."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from giantleap.models.generation.previews import preview_steps, to_clean
from giantleap.models.methods.steppers import DdimStepper, FlowStepper, Stepper

CLEAN, NOISE = torch.randn(2, 1, 4, 6, 6, generator=torch.Generator().manual_seed(0)).unbind()
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "flow": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "dpm": (DPMSolverMultistepScheduler, {}),
    "dpm flow": (DPMSolverMultistepScheduler, FLOW),
    "dpm sample": (DPMSolverMultistepScheduler, FLOW | {"prediction_type": "sample"}),
    "dpm sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "ddim v": (DDIMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "tcd": (TCDScheduler, {}),
}


@pytest.mark.parametrize(
    ("previews", "steps", "expected"),
    [(0, 12, ()), (1, 12, (6,)), (2, 12, (4, 8)), (3, 4, (1, 2, 3)), (10, 4, (1, 2, 3)), (2, 2, (1,)), (5, 1, ())],
)
def test_previews_are_spread_and_leave_the_last_step_out(previews: int, steps: int, expected: tuple[int, ...]) -> None:
    assert preview_steps(previews, steps) == expected


def perfect_output(scheduler: Any, timestep: torch.Tensor) -> torch.Tensor:
    """What a network that knows the clean latent predicts for a noisy one."""
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    if kind == "sample":
        return CLEAN
    if kind == "flow_prediction":
        return NOISE - CLEAN
    if kind == "v_prediction":
        alpha = scheduler.alphas_cumprod[int(timestep)]
        velocity: torch.Tensor = alpha**0.5 * NOISE - (1 - alpha) ** 0.5 * CLEAN
        return velocity
    return NOISE


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_clean_latent_is_that_of_the_network(name: str) -> None:
    kind, options = SCHEDULERS[name]
    scheduler: Any = kind(**options)
    scheduler.set_timesteps(8)
    timestep = scheduler.timesteps[:1]
    mix = getattr(scheduler, "scale_noise", None)
    sample = scheduler.add_noise(CLEAN, NOISE, timestep) if mix is None else mix(CLEAN, timestep, NOISE)
    scheduler.scale_model_input(sample, timestep[0]) if hasattr(scheduler, "scale_model_input") else None
    output = perfect_output(scheduler, timestep)
    made = scheduler.step(output, timestep[0], sample, return_dict=False)
    arguments = {"model_output": output, "timestep": timestep[0], "sample": sample}
    clean = to_clean(scheduler, arguments, made)
    assert clean is not None
    torch.testing.assert_close(clean, CLEAN, rtol=0, atol=2e-3)


def test_what_a_scheduler_says_itself_is_taken() -> None:
    arguments = {"model_output": NOISE, "timestep": torch.tensor(500), "sample": NOISE}
    assert to_clean(LCMScheduler(), arguments, (NOISE, CLEAN)) is CLEAN
    sprint = to_clean(SCMScheduler(sigma_data=0.5), arguments, (NOISE, 0.5 * CLEAN))
    assert sprint is not None and torch.equal(sprint, CLEAN)


@pytest.mark.parametrize("kind", ["ddim", "flow"])
def test_the_clean_latent_between_two_steps_is_that_of_the_step(kind: str) -> None:
    cpu = torch.device("cpu")
    sigmas = torch.linspace(1, 0, 7)
    stepper: Stepper = DdimStepper({}, 6, cpu) if kind == "ddim" else FlowStepper(sigmas[:-1], sigmas, "sample")
    x = NOISE
    for index in range(6):
        following, clean = stepper.step(CLEAN, index, x)
        expected = x if torch.equal(following, x) else clean  # the last step of some schedules does nothing
        torch.testing.assert_close(stepper.clean_between(x, following, index), expected, rtol=1e-3, atol=1e-3)
        x = following
    assert x.isfinite().all()
