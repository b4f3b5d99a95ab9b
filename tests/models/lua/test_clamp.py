"""The clamp: nothing passes its bound, nothing inside changes, the gradient flows, and it is off by default."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from giantleap.models.bundle.bundle import BundleError, read_bundle
from giantleap.models.bundle.digests import file_hashes
from giantleap.models.lua.checkpoints import read_lua, write_lua
from giantleap.models.lua.clamp import KNEE, LatentClamp, limit_softly
from giantleap.models.lua.statistics import STATISTICS_KEY, LatentStatistics, StatisticsError, read_statistics
from giantleap.models.route import Route
from tests.tiny_bundle import LATENT_CHANNELS

CPU = torch.device("cpu")
STATISTICS = LatentStatistics((0.5, -2.0), (1.0, 3.0), {2: (0.25, 1.0), 4: (0.5, 1.5)}, tiles=7)
SIGMAS = 4.0
GUARD = LatentClamp(STATISTICS, SIGMAS, CPU)
MEAN, STD = (torch.tensor(values).view(2, 1, 1) for values in (STATISTICS.mean, STATISTICS.std))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reach_of(scale: int) -> Tensor:
    return SIGMAS * torch.tensor(STATISTICS.residual_rms[scale]).view(2, 1, 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    small_power=st.floats(-3, 38),
    upscaled_power=st.floats(-3, 38),
    scale=st.sampled_from([2, 4]),
)
def test_nothing_passes_the_bound(seed: int, small_power: float, upscaled_power: float, scale: int) -> None:
    small = (normal(1, 2, 3, 5, seed=seed).double() * 10**small_power).clamp(-3e38, 3e38).float()
    upscaled = (
        (normal(1, 2, 3 * scale, 5 * scale, seed=seed + 1).double() * 10**upscaled_power).clamp(-3e38, 3e38).float()
    )
    found = GUARD.limit(small, upscaled, scale)
    low, high = MEAN - SIGMAS * STD, MEAN + SIGMAS * STD
    assert found.shape == upscaled.shape and found.dtype == torch.float32
    assert bool(((found >= low) & (found <= high)).all()), "within k deviations of the mean"
    base = F.interpolate(small.clamp(low, high), scale_factor=scale, mode="bicubic").clamp(low, high)
    assert bool(((found - base).abs() <= reach_of(scale) * (1 + 1e-5) + 1e-5).all()), "within k residuals of bicubic"


def test_infinite_outputs_are_bounded_and_nan_stays_visible() -> None:
    small = normal(1, 2, 4, 4)
    upscaled = torch.full((1, 2, 8, 8), float("inf"))
    upscaled[0, 1] = float("-inf")
    upscaled[0, 0, 3, 3] = float("nan")
    found = GUARD.limit(small, upscaled, 2)
    assert found.isnan().sum() == 1 and bool(found[0, 0, 3, 3].isnan())
    assert bool(found[0, 1].isfinite().all())


def test_what_is_inside_passes_to_the_bit() -> None:
    small = MEAN + 0.5 * STD * normal(2, 2, 6, 6).clamp(-2, 2)
    base = F.interpolate(small, scale_factor=2, mode="bicubic")
    sign = normal(2, 2, 12, 12, seed=1).sign()
    inside = base + 0.999 * KNEE * reach_of(2) * sign
    assert torch.equal(GUARD.limit(small, inside, 2), inside)
    near_zero = 1e-3 * normal(2, 2, 12, 12, seed=2)  # the sum of bicubic latent and residual would round these
    assert torch.equal(GUARD.limit(0.1 * normal(2, 2, 6, 6).clamp(-2, 2), near_zero, 2), near_zero)
    outside = base + 1.5 * KNEE * reach_of(2) * sign
    found = GUARD.limit(small, outside, 2)
    assert bool(((found - base).abs() < (outside - base).abs()).all()), "beyond the knee it is drawn in"
    assert bool(((found - base).abs() > 0.999 * KNEE * reach_of(2)).all()), "but not behind the knee"


def test_the_soft_limit_is_that_of_its_formula() -> None:
    bound = torch.tensor(2.0, dtype=torch.float64)
    x = torch.linspace(-9, 9, 2001, dtype=torch.float64, requires_grad=True)
    y = limit_softly(x, bound)
    expected = torch.where(x.abs() <= 1, x, x.sign() * (1 + torch.tanh(x.abs() - 1)))
    torch.testing.assert_close(y, expected)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert bool((slope > 0).all()) and float(slope.max()) == 1.0
    assert float(slope.diff().abs().max()) < 0.01, "no kink: steps of the slope shrink with those of x"
    zero = limit_softly(x.detach(), torch.tensor(0.0, dtype=torch.float64))
    assert bool((zero == 0).all())


def test_the_gradient_reaches_the_adapter() -> None:
    small = normal(1, 2, 4, 4)
    upscaled = (3.0 * normal(1, 2, 8, 8, seed=1)).requires_grad_()
    (gradient,) = torch.autograd.grad(GUARD.limit(small, upscaled, 2).square().sum(), upscaled)
    assert bool(gradient.isfinite().all())
    assert float((gradient != 0).float().mean()) > 0.9
    at_the_edge = torch.full((1, 2, 8, 8), 1e6, requires_grad=True)
    (flat,) = torch.autograd.grad(GUARD.limit(1e6 + small, at_the_edge, 2).sum(), at_the_edge)
    assert bool(flat.isfinite().all()), "also where there is no room at all"


def test_a_scale_between_takes_the_next_larger_statistics() -> None:
    small, far = torch.zeros(1, 2, 4, 4), torch.full((1, 2, 12, 12), 1e9)
    low, high = MEAN - SIGMAS * STD, MEAN + SIGMAS * STD
    expected = torch.minimum(reach_of(4), high).expand(1, 2, 12, 12)
    assert bool((low < 0).all())
    torch.testing.assert_close(GUARD.limit(small, far, 3.0), expected)
    with pytest.raises(StatisticsError, match="at scale 6"):
        GUARD.limit(small, torch.zeros(1, 2, 24, 24), 6)
    with pytest.raises(StatisticsError, match="3 channels"):
        GUARD.limit(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8), 2)


@pytest.mark.parametrize("sigmas", [0.0, -1.0, float("nan")])
def test_sigmas_must_be_positive(sigmas: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        LatentClamp(STATISTICS, sigmas, CPU)


def test_statistics_survive_the_header(tmp_path: Path, tiny_bundle_dir: Path) -> None:
    path = tmp_path / "lua.safetensors"
    write_lua(path, read_lua(tiny_bundle_dir / "lua.safetensors"), {STATISTICS_KEY: STATISTICS.to_json()})
    assert read_statistics(path) == STATISTICS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": [0.0]}, "channels"),
        ({"std": [1.0, float("nan")]}, "not finite"),
        ({"residual_rms": {"2": [1.0, -1.0]}}, "negative"),
        ({"residual_rms": {"two": [1.0, 1.0]}}, "no latent statistics"),
        ({"tiles": None}, "no latent statistics"),
    ],
)
def test_damaged_statistics_are_refused(changes: dict[str, object], words: str) -> None:
    said = json.loads(STATISTICS.to_json()) | changes
    with pytest.raises(StatisticsError, match=words):
        LatentStatistics.from_json(json.dumps(said))
    with pytest.raises(StatisticsError):
        LatentStatistics.from_json("[]")


def guarded_bundle(source: Path, directory: Path, sigmas: float, channels: int = LATENT_CHANNELS) -> Path:
    """A copy of the tiny bundle that asks for the guard, its statistics those of unit normal latents."""
    shutil.copytree(source, directory)
    ones = (1.0,) * channels
    statistics = LatentStatistics((0.0,) * channels, ones, {2: ones, 4: ones}, tiles=1)
    old_hash = file_hashes(directory)["lua.safetensors"]
    net = read_lua(directory / "lua.safetensors")
    write_lua(directory / "lua.safetensors", net, {STATISTICS_KEY: statistics.to_json()})
    text = (directory / "bundle.toml").read_text().replace(old_hash, file_hashes(directory)["lua.safetensors"])
    (directory / "bundle.toml").write_text(text.replace("[lua]\n", f"[lua]\nclamp_sigmas = {sigmas}\n"))
    return directory


def test_a_route_bounds_lua_where_the_bundle_asks_for_it(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    plain = Route.open(read_bundle(tiny_bundle_dir), CPU, torch.float32)
    guarded = Route.open(read_bundle(guarded_bundle(tiny_bundle_dir, tmp_path / "guarded", 3.0)), CPU, torch.float32)
    assert plain.clamp is None
    usual, far = normal(1, LATENT_CHANNELS, 8, 8), 50.0 * normal(1, LATENT_CHANNELS, 8, 8)
    for scale in (2, 4):
        assert plain.upscale(far, scale).abs().max() > 50
        assert guarded.upscale(far, scale).abs().max() <= 3.0
        assert guarded.upscale_items([far[0]], scale)[0].abs().max() <= 3.0
        assert torch.equal(guarded.upscale(0.1 * usual, scale), plain.upscale(0.1 * usual, scale))
    assert torch.equal(guarded.upscale(far, 1), far)
    assert torch.equal(guarded.upscale(far, 2, "bicubic"), plain.upscale(far, 2, "bicubic"))


def test_a_guard_without_its_statistics_is_refused(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_bundle_dir, tmp_path / "none")
    text = (directory / "bundle.toml").read_text()
    (directory / "bundle.toml").write_text(text.replace("[lua]\n", "[lua]\nclamp_sigmas = 6.0\n"))
    with pytest.raises(BundleError, match="no latent statistics"):
        read_bundle(directory)
    (directory / "bundle.toml").write_text(text.replace("[lua]\n", "[lua]\nclamp_sigmas = 0.0\n"))
    with pytest.raises(BundleError, match="clamp_sigmas"):
        read_bundle(directory)
    with pytest.raises(BundleError, match="statistics of 4 channels"):
        read_bundle(guarded_bundle(tiny_bundle_dir, tmp_path / "other", 6.0, channels=4))
