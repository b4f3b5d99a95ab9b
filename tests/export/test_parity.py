"""The comparison finds the faults that a graph hides: a constant batch, a wrong size, values that are not finite."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.export.manifest import ArtifactError, Parity, Precision
from giantleap.export.parity import CASES, choose_cases, compare, sample_latents
from giantleap.export.tensorrt_plans import plan_profiles
from giantleap.models.engines.base import Runner
from giantleap.models.pixels.images import MAX_PSNR_DB

CHANNELS = 4
STATISTICS = torch.tensor([0.0, 1.0, -1.0, 0.5]), torch.tensor([1.0, 2.0, 0.5, 1.0])


def doubled(latent: Tensor) -> Tensor:
    return F.interpolate(latent, scale_factor=2.0, mode="nearest")


def to_image(latent: Tensor) -> Tensor:
    return latent[:, :3].tanh()


def run(artifact: Runner, precision: Precision = "fp32", decodes: bool = True) -> Parity:
    image = to_image if decodes else None
    return compare("lua", precision, artifact, doubled, image, choose_cases(8), STATISTICS, torch.device("cpu"))


def test_an_equal_artifact_passes_with_its_figures() -> None:
    parity = run(lambda latent: doubled(latent) + 1e-5)
    assert parity.max_error == pytest.approx(1e-5, rel=0.1) and parity.mean_error == pytest.approx(1e-5, rel=0.1)
    assert parity.allowed_error == 1e-4 and parity.psnr_db is not None and parity.psnr_db > 90
    assert [(c.batch, c.latent_height, c.latent_width) for c in parity.cases] == [*choose_cases(8)]
    assert run(doubled).psnr_db == MAX_PSNR_DB and run(doubled, decodes=False).psnr_db is None


def test_the_cases_leave_the_traced_batch_and_size() -> None:
    assert {batch for batch, _, _ in CASES} >= {1, 3, 8}
    assert {(rows, columns) for _, rows, columns in CASES} >= {(1, 1), (5, 8)}
    assert any(rows != columns for _, rows, columns in CASES)
    assert (1, 40, 64) in choose_cases(8) and (3, 32, 48) in choose_cases(16)


def test_every_profile_is_compared_at_its_best_and_at_its_largest_batch() -> None:
    profiles = plan_profiles(8, max_batch=4)
    cases = choose_cases(8, profiles)
    assert all(any(profile.holds(case) for profile in profiles) for case in cases)
    for profile in profiles:
        assert profile.opt_shape in cases
        assert any(case[0] == 4 and case[2] == profile.max_shape[2] and case[1] != case[2] for case in cases)


def test_a_batch_that_became_a_constant_is_found() -> None:
    def as_if_two(latent: Tensor) -> Tensor:
        return doubled(latent) if latent.shape[0] == 2 else doubled(latent).roll(1, dims=-1)

    with pytest.raises(
        ArtifactError, match=r"differs from PyTorch by .* at batch \d, latents of .*; allowed are 1\.00e-04"
    ):
        run(as_if_two)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_single_wrong_case_is_enough(batch: int) -> None:
    with pytest.raises(ArtifactError, match=f"at batch {batch}"):
        run(lambda latent: doubled(latent) + (2e-4 if latent.shape[0] == batch else 0))


def test_another_shape_or_a_nan_is_found() -> None:
    with pytest.raises(ArtifactError, match=r"returns \[1, 4, 8, 8\]; expected \[1, 4, 16, 16\]"):
        run(lambda latent: latent)
    with pytest.raises(ArtifactError, match="not finite in fp16"):
        run(lambda latent: doubled(latent) * float("nan"), "fp16")


def test_on_a_gpu_float32_is_compared_without_tf32() -> None:
    seen = []

    def looking(latent: Tensor) -> Tensor:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled))
        return doubled(latent)

    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled
    compare("lua", "fp32", looking, looking, None, choose_cases(8), STATISTICS, torch.device("cpu"))
    assert set(seen) == {(False, before[1])}
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled) == before


def test_half_types_may_differ_by_a_share_of_the_values_but_not_in_the_image() -> None:
    def noisy(share: float) -> Runner:
        return lambda latent: (
            doubled(latent) + share * torch.randn(doubled(latent).shape, generator=torch.Generator().manual_seed(0))
        )

    assert run(noisy(1e-3), "fp16").max_error > 1e-3
    with pytest.raises(ArtifactError, match="differs from PyTorch"):
        run(noisy(1e-3), "fp32")
    with pytest.raises(ArtifactError, match="differs from PyTorch"):
        run(noisy(0.5), "bf16")
    with pytest.raises(ArtifactError, match="dB from PyTorch's; at least 50 dB"):
        run(lambda latent: doubled(latent) + 0.03, "fp16")


def test_sampled_latents_have_the_statistics_of_real_ones_and_are_smooth() -> None:
    mean, std = STATISTICS
    latents = sample_latents((8, CHANNELS, 64, 64), mean, std, seed=0)
    assert torch.allclose(latents.mean((0, 2, 3)), mean, atol=0.1)
    assert torch.allclose(latents.std((0, 2, 3)), std, rtol=0.1)
    neighbors = (latents[..., 1:] - latents[..., :-1]).std() / latents.std()
    assert neighbors < 1.2  # 1.41 for white noise
    assert torch.equal(latents, sample_latents((8, CHANNELS, 64, 64), mean, std, seed=0))
