"""The loops outside the network with an oracle for one: it knows the noise, so the end of each loop is known."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from giantleap.models.methods.demofusion import restandardize, sample_demofusion, sample_phase
from giantleap.models.methods.lsrna import edge_strength, sample_lsrna
from giantleap.models.methods.passes import first_step, plan_stages
from giantleap.models.methods.rectifiedhr import sample_rectifiedhr
from giantleap.models.methods.steppers import DdimStepper, FlowStepper, Stepper, sample
from giantleap.models.methods.views import Progress, View
from tests.models.methods.tiny_unets import NO_PROGRESS, noise_of

CPU = torch.device("cpu")
WINDOW, PAD, STRIDE_PX = 16, 2, 8
FINAL_SIGNAL, FINAL_NOISE = 0.99915**0.5, 0.02916


def sdxl_stepper(steps: int = 50) -> DdimStepper:
    scheduler: Any = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    return DdimStepper(scheduler.config, steps, CPU)


def flow_stepper(steps: int = 12) -> FlowStepper:
    sigmas = torch.linspace(1, 0, steps + 1)
    return FlowStepper(sigmas[:-1] * 1000, sigmas, "flow_prediction")


class NoiseOracle:
    """Sees the noise of a large latent through every window and every strided copy.

    Args:
        truth: What it predicts for the large latent.
        factor: Of the large latent over the base.
    """

    def __init__(self, truth: Tensor, factor: int) -> None:
        self._padded = F.pad(truth, (PAD,) * 4)
        self._strided = [truth[:, :, a::factor, b::factor] for a in range(factor) for b in range(factor)]
        self._next = 0

    def __call__(self, x: Tensor, t: Tensor, view: View) -> Tensor:
        if set(view.corners_px) == {(0, 0)} and len(x) > 1:  # windows all lie elsewhere
            start, self._next = self._next, (self._next + len(x)) % len(self._strided)
            return torch.cat(self._strided[start : start + len(x)])
        height, width = x.shape[-2:]
        places = [(top // STRIDE_PX, left // STRIDE_PX) for top, left in view.corners_px]
        return torch.cat([self._padded[:, :, top : top + height, left : left + width] for top, left in places])


@pytest.mark.parametrize(("height", "width", "factor"), [(16, 16, 2), (16, 24, 2), (24, 16, 4)])
def test_a_phase_of_demofusion_ends_at_the_enlarged_latent_with_the_last_noise(
    height: int, width: int, factor: int
) -> None:
    large = noise_of(5).normal((1, 4, factor * height, factor * width))
    fixed = noise_of(1).normal(large.shape)
    oracle = NoiseOracle(fixed, factor)
    view = View(8 * factor * height, 8 * factor * width, 7.5)
    drawn = sample_phase(oracle, sdxl_stepper(), large, view, factor, WINDOW, STRIDE_PX, noise_of(1), NO_PROGRESS)
    torch.testing.assert_close(drawn, FINAL_SIGNAL * large + FINAL_NOISE * fixed, rtol=0, atol=5e-5)


def test_a_phase_of_demofusion_by_flow_matching_ends_at_the_enlarged_latent() -> None:
    large = noise_of(5).normal((1, 4, 32, 48))
    oracle = NoiseOracle(noise_of(1).normal(large.shape) - large, 2)
    drawn = sample_phase(
        oracle, flow_stepper(), large, View(256, 384, 3.0), 2, WINDOW, STRIDE_PX, noise_of(1), NO_PROGRESS
    )
    torch.testing.assert_close(drawn, large, rtol=0, atol=1e-5)


def shrink(x: Tensor, t: Tensor, view: View) -> Tensor:
    """A network that depends on everything it is given."""
    return 0.3 * x + 1e-4 * t + 0.01 * view.guidance_scale + 1e-5 * view.width_px


@pytest.mark.parametrize("stepper", [sdxl_stepper(6), flow_stepper(6)], ids=["DDIM", "flow"])
def test_one_times_the_base_size_is_a_plain_run_bit_for_bit(stepper: Stepper) -> None:
    start, view = noise_of(2).normal((1, 4, 16, 24)), View(128, 192, 5.0)
    plain, _ = sample(shrink, stepper, start, view, NO_PROGRESS)
    fused = sample_demofusion(shrink, stepper, start, view, 1, WINDOW, STRIDE_PX, noise_of(1), NO_PROGRESS)
    stages = plan_stages(6, 1)
    grown = sample_rectifiedhr(
        shrink, stepper, start, view, stages, lambda clean, growth: clean, noise_of(1), NO_PROGRESS
    )
    assert torch.equal(fused, plain) and torch.equal(grown, plain)


def run_demofusion(seed: int, progress: Progress = NO_PROGRESS) -> Tensor:
    start = noise_of(2).normal((1, 4, 16, 24))
    view = View(384, 576, 5.0)
    return sample_demofusion(shrink, sdxl_stepper(4), start, view, 3, WINDOW, STRIDE_PX, noise_of(seed), progress)


def test_demofusion_repeats_with_its_seed_whatever_others_draw() -> None:
    first = run_demofusion(1)
    torch.rand(7)
    assert torch.equal(run_demofusion(1), first) and not torch.equal(run_demofusion(2), first)
    assert tuple(first.shape) == (1, 4, 48, 72)


def test_demofusion_reports_each_step_of_each_phase_and_each_batch_of_windows() -> None:
    seen: list[str] = []
    run_demofusion(1, Progress(lambda to_clean: seen.append("step"), lambda: seen.append("part")))
    assert seen.count("step") == 3 * 4
    windows = {2: 3 * 5, 3: 5 * 8}  # of 32x48 and 48x72 latents
    assert seen.count("part") == 4 * sum(-(-n // 4) + -(-(factor**2) // 4) for factor, n in windows.items())


def test_the_last_latent_has_the_statistics_of_the_first_phase() -> None:
    x, anchor = 3 * torch.randn(1, 4, 8, 8) + 1, torch.randn(1, 4, 4, 4)
    made = restandardize(x, anchor)
    torch.testing.assert_close((made.mean(), made.std()), (anchor.mean(), anchor.std()))


@pytest.mark.parametrize(
    ("steps", "scale", "ends", "growths", "guidances"),
    [
        (50, 2, [30, 50], [1, 2], [5, 30]),
        (50, 4, [40, 47, 50], [1, 2.5, 4], [5, 36.8, 50]),
        (50, 1, [50], [1], [5]),
        (30, 2, [18, 30], [1, 2], [5, 30]),
        (12, 4, [9, 11, 12], [1, 2.5, 4], [5, 36.8, 50]),
        (3, 4, [1, 2, 3], [1, 2.5, 4], [5, 36.8, 50]),
        (2, 2, [1, 2], [1, 2], [5, 30]),
    ],
)
def test_the_stages_of_rectifiedhr(
    steps: int, scale: int, ends: list[int], growths: list[float], guidances: list[float]
) -> None:
    stages = plan_stages(steps, scale)
    assert [stage.steps.stop for stage in stages] == ends
    assert [stage.steps.start for stage in stages] == [0, *ends[:-1]]
    assert [stage.growth for stage in stages] == growths
    assert [5 * stage.guidance for stage in stages] == pytest.approx(guidances, abs=0.03)


def test_guidance_stays_where_it_is_not_raised() -> None:
    assert [stage.guidance for stage in plan_stages(50, 4, raises_guidance=False)] == [1, 1, 1]


def test_too_few_steps_for_the_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 steps; found 2"):
        plan_stages(2, 4)
    with pytest.raises(ValueError, match="at least 2 steps; found 1"):
        first_step(1)
    assert (first_step(50), first_step(30), first_step(2)) == (20, 12, 1)


def resize(clean: Tensor, growth: float) -> Tensor:
    sides = [round(16 * growth), round(24 * growth)]
    return F.interpolate(clean, size=sides, mode="nearest")


def test_rectifiedhr_grows_from_the_clean_latent_and_tells_the_network_its_size() -> None:
    base = noise_of(4).normal((1, 4, 16, 24))
    stepper, seen = sdxl_stepper(), []

    def oracle(x: Tensor, t: Tensor, view: View) -> Tensor:
        seen.append((view.height_px, view.width_px, round(view.guidance_scale, 1)))
        truth = resize(base, x.shape[-2] / 16)
        index = stepper.timesteps.tolist().index(int(t))
        noise = float(stepper.add_noise(torch.zeros(1), torch.ones(1), index))
        return (x - stepper.add_noise(truth, torch.zeros_like(truth), index)) / noise

    def grow(clean: Tensor, growth: float) -> Tensor:
        torch.testing.assert_close(clean, resize(base, clean.shape[-2] / 16), rtol=0, atol=1e-4)
        return resize(base, growth)

    start = stepper.add_noise(base, noise_of(0).normal(base.shape), 0)
    stages = plan_stages(50, 4)
    drawn = sample_rectifiedhr(
        oracle,
        stepper,
        start,
        View(128, 192, 5.0),
        stages,
        grow,
        noise_of(1),
        NO_PROGRESS,
    )
    truth = resize(base, 4)
    assert ((drawn - FINAL_SIGNAL * truth) / FINAL_NOISE).std() == pytest.approx(1, abs=0.05)
    assert list(dict.fromkeys(seen)) == [(128, 192, 5.0), (320, 480, 36.8), (512, 768, 50.0)]
    assert len(seen) == 50


def test_without_guidance_rectifiedhr_raises_none() -> None:
    seen = set()

    def predict(x: Tensor, t: Tensor, view: View) -> Tensor:
        seen.add(view.guidance_scale)
        return x

    start = noise_of(0).normal((1, 4, 16, 24))
    sample_rectifiedhr(
        predict, sdxl_stepper(6), start, View(128, 192, 1.0), plan_stages(6, 2), resize, noise_of(1), NO_PROGRESS
    )
    assert seen == {1.0}


def test_lsrna_enlarges_once_and_samples_the_last_steps_of_the_final_size() -> None:
    seen: list[tuple[int, int]] = []

    def enlarge(clean: Tensor) -> Tensor:
        return F.interpolate(clean, scale_factor=2.0)

    def predict(x: Tensor, t: Tensor, view: View) -> Tensor:
        seen.append((int(t), view.width_px))
        return shrink(x, t, view)

    def draw(image: Tensor) -> Tensor:
        start = noise_of(2).normal((1, 4, 16, 24))
        view = View(128, 192, 5.0)
        return sample_lsrna(
            predict,
            sdxl_stepper(),
            start,
            view,
            2,
            WINDOW,
            STRIDE_PX,
            lambda clean: image,
            enlarge,
            noise_of(1),
            NO_PROGRESS,
        )

    flat = draw(torch.zeros(1, 3, 128, 192))
    times = sdxl_stepper().timesteps.tolist()
    assert seen[:50] == [(t, 192) for t in times]
    assert list(dict.fromkeys(seen[50:])) == [(t, 384) for t in times[20:]]
    assert tuple(flat.shape) == (1, 4, 32, 48) and bool(flat.isfinite().all())
    assert not torch.equal(draw(torch.rand(1, 3, 128, 192)), flat), "noise where edges are"


def test_edges_are_found_where_they_are_and_nowhere_in_a_flat_image() -> None:
    image = torch.zeros(1, 3, 64, 96)
    image[..., 48:] = 1
    strength = edge_strength(image, (16, 24))
    assert tuple(strength.shape) == (1, 1, 16, 24) and float(strength.min()) == 0 and float(strength.max()) == 1
    assert set(strength[0, 0].nonzero()[:, 1].tolist()) == {11, 12}
    assert float(edge_strength(torch.full((1, 3, 64, 96), 0.5), (16, 24)).abs().max()) == 0
