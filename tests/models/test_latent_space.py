"""Latent spaces: round trips in both libraries, the packing against diffusers' own, and refusals that name a family."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import given
from hypothesis import strategies as st

from models.latent_space import LATENT_SPACES, LatentSpace, LatentSpaceError

NORMED = LatentSpace("normed", 3, 8, scale=0.5, mean=(0.0, 1.0, -2.0), std=(1.0, 0.25, 4.0))
EVERY = [*LATENT_SPACES.values(), NORMED]


@given(st.sampled_from(EVERY), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_from_raw_undoes_to_raw(space: LatentSpace, batch: int, rows: int, cols: int) -> None:
    raw = torch.randn(batch, space.channels, 2 * rows, 2 * cols)
    scaled = space.from_raw(raw)
    again = space.to_raw(scaled, height_px=2 * rows * space.stride_px, width_px=2 * cols * space.stride_px)
    assert again.shape == raw.shape
    assert (again - raw).abs().max() <= 1e-5


@pytest.mark.parametrize("space", EVERY, ids=lambda space: space.name)
def test_numpy_and_torch_agree(space: LatentSpace) -> None:
    raw = torch.randn(2, space.channels, 4, 6)
    scaled = space.from_raw(raw.numpy())
    assert scaled.dtype == np.float32
    assert np.allclose(scaled, space.from_raw(raw).numpy(), atol=1e-6)
    assert np.allclose(space.to_raw(scaled, 4 * space.stride_px, 6 * space.stride_px), raw.numpy(), atol=1e-5)


@pytest.mark.parametrize(("height_px", "width_px"), [(64, 96), (1024, 512), (1000, 1016), (48, 17)])
def test_flux_packing_is_that_of_diffusers(height_px: int, width_px: int) -> None:
    space = LATENT_SPACES["flux1"]
    height, width = space.latent_size(height_px, width_px)
    raw = torch.randn(2, 16, height, width)
    scaled = (raw - 0.1159) * 0.3611
    packed = FluxPipeline._pack_latents(scaled, 2, 16, height, width)
    assert torch.equal(space.from_raw(raw), packed)
    unpacked = FluxPipeline._unpack_latents(packed, height_px, width_px, vae_scale_factor=8)
    assert torch.equal(space.to_raw(packed, height_px, width_px), unpacked / 0.3611 + 0.1159)


@pytest.mark.parametrize(
    ("name", "raw", "scaled"),
    [("sd15", 2.0, 0.3643), ("sdxl", 2.0, 0.2605), ("sd3", 1.0609, 1.5305), ("pocket16", 2.0, 2.0)],
)
def test_known_families_have_their_published_factors(name: str, raw: float, scaled: float) -> None:
    space = LATENT_SPACES[name]
    latent = torch.full((1, space.channels, 2, 2), raw)
    assert space.from_raw(latent).allclose(torch.full_like(latent, scaled))


def test_statistics_are_applied_per_channel() -> None:
    scaled = torch.ones(1, 3, 2, 2)
    assert NORMED.to_raw(scaled)[0, :, 0, 0].tolist() == [2.0, 1.5, 6.0]


def test_a_packed_size_is_a_whole_number_of_patches() -> None:
    assert LATENT_SPACES["flux1"].latent_size(1000, 1016) == (124, 126)
    assert LATENT_SPACES["sdxl"].latent_size(1000, 1016) == (125, 127)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("sdxl", (1, 16, 8, 8), r"sdxl takes raw latents \[batch, 4, .*found \[1, 16, 8, 8\], which looks like sd3 or"),
        ("sd3", (1, 4, 8, 8), "looks like sd15 or sdxl"),
        ("sd3", (1, 16, 64), "looks like flux1"),
        ("flux1", (1, 16, 8, 8), r"packed latents \[batch, .*, 64\]; found .* looks like sd3 or pocket16"),
        ("sdxl", (1, 7, 8, 8), r"found \[1, 7, 8, 8\]$"),
        ("sdxl", (4, 8, 8), r"found \[4, 8, 8\]$"),
        ("sdxl", (1, 4, 0, 8), r"found \[1, 4, 0, 8\]"),
    ],
)
def test_a_wrong_latent_is_refused_and_its_family_named(name: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(LatentSpaceError, match=words):
        LATENT_SPACES[name].to_raw(torch.zeros(shape), 64, 64)


def test_a_raw_latent_is_checked_in_a_packed_space_too() -> None:
    LATENT_SPACES["flux1"].check_raw((1, 16, 4, 4))
    with pytest.raises(LatentSpaceError, match=r"flux1 takes raw latents \[batch, 16"):
        LATENT_SPACES["flux1"].check_raw((1, 4, 64))


def test_a_packed_latent_needs_a_size_that_fits() -> None:
    space, packed = LATENT_SPACES["flux1"], torch.zeros(1, 16, 64)
    with pytest.raises(LatentSpaceError, match="size of the image in pixels"):
        space.to_raw(packed)
    with pytest.raises(LatentSpaceError, match="64x80 px is 20 tokens; found 16"):
        space.to_raw(packed, height_px=80, width_px=64)
    with pytest.raises(LatentSpaceError, match="even sides; found 3x4"):
        space.from_raw(torch.zeros(1, 16, 3, 4))


@pytest.mark.parametrize(
    "numbers",
    [
        {"channels": 0}, {"stride_px": 0}, {"scale": 0.0}, {"scale": float("nan")}, {"mean": (0.0, 0.0)},
        {"mean": (0.0,), "std": (1.0,)}, {"mean": (0.0, 0.0), "std": (1.0, 0.0)},
        {"mean": (0.0, 0.0), "std": (1.0, 1.0), "shift": 0.1}, {"packing": "squeezed"},
    ],
)  # fmt: skip
def test_numbers_that_contradict_each_other_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(LatentSpaceError, match="latent space own"):
        LatentSpace(**({"name": "own", "channels": 2, "stride_px": 8, "scale": 1.0} | numbers))


def test_the_table_of_families_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        LATENT_SPACES["sdxl"] = NORMED  # type: ignore[index]


def test_bundle_and_latent_space_import_no_torch() -> None:
    code = "import sys, models.bundle, models.latent_space; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
