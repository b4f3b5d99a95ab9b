"""The refine pass with the stock pipeline of every family: its schedule, its noise, its windows, and how it ends."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import wraps
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from giantleap.models.bundle.descriptor import REFINING
from giantleap.models.generation.families import FAMILIES
from giantleap.models.generation.refine import refine_latent
from giantleap.models.generation.refinement import Refinement, refine_seed, window_starts
from tests.models.generation.test_generator_families import LONG, Family, build, draw

REFINE = Refinement(strength=0.25, steps=3)
REFINED = ["sd15", "sdxl", "sd3", "flux1-dev", "qwen-image", "qwen-image-21", "z-image", "prx", "sana", "sana-short"]
SQUARE, WIDE = (96, 96), (64, 128)  # width and height, pixels


@pytest.fixture(scope="module", params=REFINED)
def family(request: pytest.FixtureRequest) -> Family:
    return build(request.param)


def latent_of(family: Family, size_px: tuple[int, int] = SQUARE, seed: int = 3) -> Tensor:
    """A raw latent for an image of a size, with the spread of the family's."""
    space = family.generator.latent_space
    noise = torch.randn(
        1,
        space.channels,
        size_px[1] // space.stride_px,
        size_px[0] // space.stride_px,
        generator=torch.Generator().manual_seed(seed),
    )
    return space.to_raw(space.pack(noise), size_px[1], size_px[0])[0]


def refine(family: Family, latent: Tensor, refinement: Refinement = REFINE, **changes: Any) -> Tensor:
    return refine_latent(family.generator, latent, replace(family.item, refine=refinement, **changes))


def exact_unet(monkeypatch: pytest.MonkeyPatch, family: Family, clean: Tensor) -> list[int]:
    """Replace what the UNet predicts by the noise that is in its input, if that was made from a known raw latent.

    Returns the timesteps that it sees.
    """
    target = family.generator.latent_space.from_raw(clean[None])
    alphas = family.pipeline.scheduler.alphas_cumprod
    seen: list[int] = []

    def forward(sample: Tensor, timestep: Tensor, *args: Any, **options: Any) -> tuple[Tensor]:
        seen.append(int(timestep))
        alpha = alphas[int(timestep)]
        return ((sample - alpha.sqrt() * target) / (1 - alpha).sqrt(),)

    monkeypatch.setattr(family.pipeline.unet, "forward", forward)
    return seen


def exact_flow(monkeypatch: pytest.MonkeyPatch, family: Family, clean: Tensor) -> list[float]:
    """Replace what a flow model predicts by the exact velocity from a known raw latent; returns the sigmas it sees."""
    target = family.generator.latent_space.from_raw(clean[None])
    scheduler_class = type(family.pipeline.scheduler)
    step = scheduler_class.step
    seen: list[float] = []

    @wraps(step)
    def exact(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        sigma = self.sigmas[self.step_index or 0]
        seen.append(float(sigma))
        return step(self, (sample - target) / sigma, timestep, sample, *args, **options)

    monkeypatch.setattr(scheduler_class, "step", exact)
    return seen


def exact(monkeypatch: pytest.MonkeyPatch, family: Family, clean: Tensor) -> Sequence[float]:
    return (exact_unet if hasattr(family.pipeline, "unet") else exact_flow)(monkeypatch, family, clean)


def final_alpha(family: Family) -> float:
    """What is left of a latent after the last step of a perfect model: of DDIM not all of it."""
    return float(getattr(family.pipeline.scheduler, "final_alpha_cumprod", 1.0))


def test_the_families_under_test_are_those_that_the_api_knows() -> None:
    assert {cls.__name__ for cls, family in FAMILIES.items() if family.refines} == REFINING


@pytest.mark.parametrize("name", ["flux2", "flux2-klein", "sana-sprint"])
def test_other_families_are_refused(name: str) -> None:
    made = build(name)
    with pytest.raises(ValueError, match="does not refine"):
        refine(made, latent_of(made))


@pytest.mark.parametrize("size_px", [SQUARE, WIDE])
def test_a_perfect_model_gives_the_latent_back(
    family: Family, size_px: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = latent_of(family, size_px)
    seen = exact(monkeypatch, family, clean)
    refined = refine(family, clean)
    assert len(seen) == REFINE.steps and refined.dtype == torch.float32
    space, alpha = family.generator.latent_space, final_alpha(family)
    seed = refine_seed(family.item.seed)
    noise = space.pack(torch.randn(clean[None].shape, generator=torch.Generator().manual_seed(seed)))
    expected = math.sqrt(alpha) * space.from_raw(clean[None]) + math.sqrt(1 - alpha) * noise
    torch.testing.assert_close(space.from_raw(refined[None]), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size_px", [SQUARE, WIDE])
def test_a_real_network_changes_the_latent_alike_each_time(family: Family, size_px: tuple[int, int]) -> None:
    clean = latent_of(family, size_px)
    kept = clean.clone()
    torch.manual_seed(0)
    first = refine(family, clean)
    torch.manual_seed(9)
    draw(family.generator, family.item)  # leaves its own schedule in the scheduler
    again = refine(family, clean)
    assert torch.equal(first, again) and torch.equal(clean, kept)
    assert first.shape == clean.shape and first.isfinite().all() and not torch.equal(first, clean)
    assert not torch.equal(refine(family, clean, seed=2), first)
    assert not torch.equal(refine(family, clean, prompt=LONG), first)


def test_an_image_is_generated_as_before_after_a_refine_pass(family: Family) -> None:
    before = draw(family.generator, family.item)[0]
    with pytest.raises(KeyboardInterrupt):
        refine_latent(family.generator, latent_of(family), replace(family.item, refine=REFINE), _interrupt)
    assert torch.equal(draw(family.generator, family.item)[0], before)
    assert "prepare_latents" not in vars(family.pipeline) and "set_timesteps" not in vars(family.pipeline.scheduler)


def _interrupt(fraction: float | None) -> None:
    raise KeyboardInterrupt


def test_a_pass_ends_at_the_step_that_is_canceled(family: Family) -> None:
    reported: list[float] = []

    def stop(fraction: float | None) -> None:
        assert fraction is not None
        reported.append(fraction)
        if len(reported) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        refine_latent(family.generator, latent_of(family), replace(family.item, refine=REFINE), stop)
    assert reported == pytest.approx([1 / 3, 2 / 3])


def test_the_noise_grows_with_the_strength(family: Family) -> None:
    clean = latent_of(family)
    changes = [float((refine(family, clean, Refinement(strength, 2)) - clean).std()) for strength in (0.02, 0.1, 0.5)]
    assert changes == sorted(changes)


@pytest.mark.parametrize(
    ("refinement", "schedule_steps"),
    [
        (Refinement(0.15, 4), 27),
        (Refinement(0.15, 6), 40),
        (Refinement(0.5, 8), 16),
        (Refinement(0.3, 3), 10),
        (Refinement(0.07, 7), 100),
        (Refinement(0.02, 20), 1000),
    ],
)
def test_the_schedule_is_as_long_as_the_strength_says(refinement: Refinement, schedule_steps: int) -> None:
    assert refinement.schedule_steps == schedule_steps


# Stable Diffusion's own schedule in 40 steps is 976, 951 ... 26, 1; that of 12 is 913, 830 ... 84, 1.
def test_a_unet_runs_the_last_steps_of_its_own_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    made = build("sd15")
    clean = latent_of(made)
    seen = exact_unet(monkeypatch, made, clean)
    refine(made, clean, Refinement(0.15, 6), guidance_scale=1.0)
    assert seen == [126, 101, 76, 51, 26, 1]


# FLUX's schedule of 8 steps is 1, 7/8 ... 1/8 before the shift, which for 96 x 96 px, 36 tokens, is exp(0.5 + 0.65 x
# (36 - 256) / (4096 - 256)) = 1.588 (sigma' = 1.588 / (1.588 + 1 / sigma - 1)); at 64 x 128 px there are 32 tokens.
@pytest.mark.parametrize(("size_px", "shift"), [(SQUARE, 1.5884), (WIDE, 1.5873)])
def test_a_shift_that_depends_on_the_size_is_applied_once(
    size_px: tuple[int, int], shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build("flux1-dev")
    assert made.pipeline.scheduler.config.use_dynamic_shifting
    clean = latent_of(made, size_px)
    seen = exact_flow(monkeypatch, made, clean)
    refine(made, clean, Refinement(0.5, 4))
    assert seen == pytest.approx([shift / (shift + 1 / (step / 8) - 1) for step in (4, 3, 2, 1)], abs=1e-4)


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [
        (PNDMScheduler, 5),  # it looks twice at its second step
        (DDPMScheduler, 4),
        (EulerDiscreteScheduler, 4),
        (EulerAncestralDiscreteScheduler, 4),
        (HeunDiscreteScheduler, 7),
        (DPMSolverMultistepScheduler, 4),
        (UniPCMultistepScheduler, 4),
    ],
)
def test_every_scheduler_of_stable_diffusion_gives_the_latent_back(
    scheduler: Any, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build("sd15")
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    made.pipeline.scheduler = scheduler.from_config(made.pipeline.scheduler.config, **options)
    clean = latent_of(made)
    seen = exact_unet(monkeypatch, made, clean)
    refined = refine(made, clean, Refinement(0.5, 4), guidance_scale=1.0)
    assert len(seen) == calls and max(seen) <= 501
    spread = float(clean.std())
    assert float((refined - clean).std()) < 0.05 * spread, "noise of the last step stays with some"


@pytest.mark.parametrize("window", [64, 100])
@pytest.mark.parametrize("unit", [1, 2, 4])
@pytest.mark.parametrize("extra", range(0, 300, 12))
def test_windows_cover_a_side_and_overlap_by_a_quarter(window: int, unit: int, extra: int) -> None:
    side = window + extra
    starts = window_starts(side, window, unit)
    assert starts[0] == 0 and starts[-1] == side - window and all(start % unit == 0 for start in starts)
    assert all(0 < after - before <= window * 3 // 4 for before, after in pairwise(starts))
    assert len(starts) == -(-extra // (window * 3 // 4 // unit * unit)) + 1


def test_a_side_within_a_window_has_one() -> None:
    assert window_starts(40, 64) == window_starts(64, 64) == [0]
    assert window_starts(65, 64) == [0, 1] and window_starts(16, 8, 8) == [0, 8]


def windowed(name: str, max_side_px: int) -> tuple[Family, Family]:
    """A family without windows and with them."""
    whole, cut = build(name), build(name)
    cut.generator.max_side_px = max_side_px
    return whole, cut


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sana-short"])
@pytest.mark.parametrize("size_px", [(160, 160), (96, 224)])
def test_windows_make_what_a_whole_pass_makes_where_the_network_sees_single_pixels(
    name: str, size_px: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = windowed(name, 96)
    sizes: list[torch.Size] = []
    for made in (whole, cut):
        network = made.pipeline.unet if hasattr(made.pipeline, "unet") else made.pipeline.transformer
        forward = network.forward

        def pointwise(sample: Tensor, *args: Any, made: Family = made, **options: Any) -> tuple[Tensor]:
            if made is cut:
                sizes.append(sample.shape[-2:])
            return (torch.sin(3 * sample),)

        monkeypatch.setattr(network, "forward", wraps(forward)(pointwise))
    clean = latent_of(whole, size_px)
    expected, blended = refine(whole, clean), refine(cut, clean)
    torch.testing.assert_close(blended, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    side = 96 // cut.generator.latent_space.stride_px
    assert max(max(size) for size in sizes) == side and len(sizes) > REFINE.steps


def test_windows_reach_every_pixel_with_a_real_network() -> None:
    whole, cut = windowed("sd15", 64)
    clean = latent_of(whole, (144, 80))
    blended = refine(cut, clean)
    assert blended.shape == clean.shape and bool((blended != clean).all())
    assert not torch.equal(blended, refine(whole, clean))


@pytest.mark.parametrize("name", ["flux1-dev", "sana-short"])
def test_a_latent_off_the_grid_of_the_pipeline_keeps_its_size(name: str) -> None:
    made = build(name)
    clean = latent_of(made, (128, 96))[:, 1:, :-3]
    refined = refine(made, clean)
    assert refined.shape == clean.shape and refined.isfinite().all()


def test_the_noise_of_a_refine_pass_is_that_of_no_near_image() -> None:
    near = set(range(100))
    assert not near & {refine_seed(seed) for seed in near}
    assert len({refine_seed(seed) % 2**32 for seed in near}) == 100 and refine_seed(2**63 - 1) >= 0
