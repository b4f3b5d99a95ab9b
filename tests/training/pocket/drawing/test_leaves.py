"""Dead-leaves pictures: seeded, full range, with the edges and the spectrum that make them useful."""

from pathlib import Path

import numpy as np
import pytest

from giantleap.training.pocket.drawing.leaves import draw_leaves, fractal_noise, read_leaf_pool


def test_same_seed_draws_the_same_picture() -> None:
    first, again, other = (draw_leaves(np.random.default_rng(seed), 64) for seed in (3, 3, 4))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_pictures_have_contrast_and_color() -> None:
    pictures = np.stack([draw_leaves(np.random.default_rng((0, i)), 64) for i in range(12)]).astype(float)
    assert pictures.std(axis=(1, 2)).mean() > 15.0
    assert np.abs(pictures[..., 0] - pictures[..., 2]).mean() > 5.0


def test_noise_power_falls_with_the_given_slope() -> None:
    field = fractal_noise(np.random.default_rng(0), 256, slope=1.0)
    power = np.abs(np.fft.fft2(field)) ** 2
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None, :])
    low = power[(frequency > 0.02) & (frequency < 0.04)].mean()
    high = power[(frequency > 0.2) & (frequency < 0.4)].mean()
    assert field.std() == pytest.approx(1.0, abs=1e-3)
    assert low / high == pytest.approx(100.0, rel=0.3)  # ten times the frequency, a hundredth of the power


def test_pool_is_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    one = read_leaf_pool(tmp_path / "one", count=3, size_px=32, seed=5, processes=1)
    two = read_leaf_pool(tmp_path / "two", count=3, size_px=32, seed=5, processes=2)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one[2], draw_leaves(np.random.default_rng((5, 2)), 32))


def test_pool_is_drawn_once(tmp_path: Path) -> None:
    read_leaf_pool(tmp_path, count=2, size_px=32, seed=5, processes=1)
    written_ns = next(tmp_path.iterdir()).stat().st_mtime_ns
    read_leaf_pool(tmp_path, count=2, size_px=32, seed=5, processes=1)
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [written_ns]
