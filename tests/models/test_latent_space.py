"""Latent spaces: round trips in both libraries, the packings against diffusers' own, refusals that name a family."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    QwenImage21Pipeline,
    QwenImagePipeline,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from giantleap.models.latent_space import LATENT_SPACES, LatentSpace, LatentSpaceError, read_vae_statistics

NORMED = LatentSpace("normed", 3, 8, scale=0.5, mean=(0.0, 1.0, -2.0), std=(1.0, 0.25, 4.0))
FLUX2 = LATENT_SPACES["flux2"].with_statistics([0.01 * c for c in range(128)], [1 + 0.02 * c for c in range(128)])
COMPLETE: dict[str, LatentSpace] = {**LATENT_SPACES, "flux2": FLUX2}
EVERY = [*COMPLETE.values(), NORMED]


@given(st.sampled_from(EVERY), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
def test_from_raw_undoes_to_raw(space: LatentSpace, batch: int, rows: int, cols: int) -> None:
    raw = torch.randn(batch, space.channels, 2 * rows, 2 * cols)
    scaled = space.from_raw(raw)
    space.check_scaled(scaled.shape)
    assert scaled.ndim == space.scaled_dims
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


def tokens_of(space: LatentSpace, height_px: int, width_px: int) -> Tensor:
    """Scaled random latents of two images of this size in the form of a pipeline with tokens."""
    height, width = space.latent_size(height_px, width_px)
    fold = 4 if space.packing == "flux" else 1
    return torch.randn(2, height * width // fold, fold * space.channels)


@pytest.mark.parametrize("pipeline", [Flux2Pipeline, Flux2KleinPipeline])
@pytest.mark.parametrize(("height_px", "width_px"), [(64, 96), (1000, 1016), (32, 16)])
def test_flux2_latents_become_raw_as_its_pipelines_do_it(pipeline: Any, height_px: int, width_px: int) -> None:
    packed = tokens_of(FLUX2, height_px, width_px)
    height, width = FLUX2.latent_size(height_px, width_px)
    ids = pipeline._prepare_latent_ids(torch.empty(2, 128, height // 2, width // 2))
    spread = pipeline._unpack_latents_with_ids(packed, ids)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (FLUX2.mean, FLUX2.std))
    expected = pipeline._unpatchify_latents(spread * std + mean)
    raw = FLUX2.to_raw(packed, height_px, width_px)
    assert raw.shape == (2, 32, height, width)
    torch.testing.assert_close(raw, expected)
    torch.testing.assert_close(FLUX2.from_raw(expected), packed)


@pytest.mark.parametrize(
    ("name", "pipeline", "vae"),
    [
        ("qwen-image", QwenImagePipeline, AutoencoderKLQwenImage),
        ("qwen-image-21", QwenImage21Pipeline, AutoencoderKLQwenImage21),
    ],
)
@pytest.mark.parametrize(("height_px", "width_px"), [(64, 96), (1000, 1016), (96, 32)])
def test_qwen_latents_become_raw_as_its_pipelines_do_it(
    name: str, pipeline: Any, vae: Any, height_px: int, width_px: int
) -> None:
    space, config = LATENT_SPACES[name], default_config(vae)
    packed = tokens_of(space, height_px, width_px)
    spread = pipeline._unpack_latents(packed, height_px, width_px, space.stride_px)
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    expected = (spread * std + mean)[:, :, 0]
    raw = space.to_raw(packed, height_px, width_px)
    torch.testing.assert_close(raw, expected)
    again = pipeline._pack_latents(spread, 2, space.channels, *raw.shape[2:])
    torch.testing.assert_close(space.from_raw(expected), again, rtol=1e-5, atol=1e-5)


def default_config(vae: Any) -> dict[str, Any]:
    """The values that a VAE class has where its configuration does not say."""
    return {key: parameter.default for key, parameter in inspect.signature(vae.__init__).parameters.items()}


def test_wan_latents_are_videos_of_one_frame() -> None:
    space, config = LATENT_SPACES["wan21"], default_config(AutoencoderKLWan)
    scaled = torch.randn(2, 16, 1, 3, 5)
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(space.to_raw(scaled), (scaled * std + mean)[:, :, 0])
    for shape in ((2, 16, 2, 3, 5), (2, 16, 3, 5)):
        with pytest.raises(LatentSpaceError, match=r"wan21 takes .* latents \[batch, 16, 1, "):
            space.to_raw(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "raw", "scaled"),
    [
        ("sd15", 2.0, 0.3643), ("sdxl", 2.0, 0.2605), ("sd3", 1.0609, 1.5305), ("z-image", 1.1159, 0.3611),
        ("flux1", 1.1159, 0.3611), ("sana", 2.0, 0.82814), ("pocket24", 2.0, 1.0),
    ],
)  # fmt: skip
def test_known_families_have_their_published_factors(name: str, raw: float, scaled: float) -> None:
    space = LATENT_SPACES[name]
    latent = torch.full((1, space.channels, 2, 2), raw)
    found = space.from_raw(latent)
    assert found.allclose(torch.full_like(found, scaled))


def test_statistics_are_applied_per_channel() -> None:
    scaled = torch.ones(1, 3, 2, 2)
    assert NORMED.to_raw(scaled)[0, :, 0, 0].tolist() == [2.0, 1.5, 6.0]


@pytest.mark.parametrize(
    ("name", "size", "multiple_px"),
    [
        ("sd15", (125, 127), 8), ("sdxl", (125, 127), 8), ("sd3", (124, 126), 16), ("flux1", (124, 126), 16),
        ("z-image", (124, 126), 16), ("flux2", (124, 126), 16), ("qwen-image", (124, 126), 16),
        ("wan21", (124, 126), 16), ("qwen-image-21", (62, 62), 32), ("pocket24", (250, 254), 4),
    ],
)  # fmt: skip
def test_a_size_is_a_whole_number_of_what_the_pipeline_makes(
    name: str, size: tuple[int, int], multiple_px: int
) -> None:
    assert LATENT_SPACES[name].latent_size(1000, 1016) == size
    assert LATENT_SPACES[name].multiple_px == multiple_px


@pytest.mark.parametrize("name", LATENT_SPACES)
def test_only_tokens_need_the_size_of_their_image(name: str) -> None:
    space = COMPLETE[name]
    scaled = space.from_raw(torch.zeros(1, space.channels, 4, 4))
    assert space.is_packed == (scaled.ndim == 3)
    if space.is_packed:
        with pytest.raises(LatentSpaceError, match="size of the image in pixels"):
            space.to_raw(scaled)
    else:
        assert space.to_raw(scaled).shape == (1, space.channels, 4, 4)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("sdxl", (1, 16, 8, 8), r"sdxl takes scaled latents \[batch, 4, .*found \[1, 16, 8, 8\], .* like sd3 or"),
        ("sdxl", (1, 32, 8, 8), "looks like raw flux2 or sana$"),
        ("sd3", (1, 4, 8, 8), "looks like sd15 or sdxl$"),
        ("sd3", (1, 16, 64), "looks like packed flux1 or packed qwen-image or packed qwen-image-21$"),
        ("z-image", (1, 16, 1, 8, 8), "looks like packed wan21$"),
        ("flux1", (1, 16, 8, 8), r"packed latents \[batch, .*, 64\]; found .* looks like sd3 or raw flux1 or z-image"),
        ("flux1", (1, 16, 128), "looks like packed flux2$"),
        ("flux2", (1, 32, 8, 8), r"takes scaled and packed latents \[batch, .*, 128\].*looks like raw flux2 or sana$"),
        ("qwen-image-21", (1, 64, 8, 8), "looks like raw qwen-image-21$"),
        ("sdxl", (1, 7, 8, 8), r"found \[1, 7, 8, 8\]$"),
        ("sdxl", (4, 8, 8), r"found \[4, 8, 8\]$"),
        ("sdxl", (1, 4, 0, 8), r"found \[1, 4, 0, 8\]$"),
    ],
)  # fmt: skip
def test_a_wrong_latent_is_refused_and_its_family_named(name: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(LatentSpaceError, match=words):
        LATENT_SPACES[name].to_raw(torch.zeros(shape), 64, 64)


def test_a_raw_latent_is_checked_in_a_packed_space_too() -> None:
    LATENT_SPACES["flux1"].check_raw((1, 16, 4, 4))
    with pytest.raises(LatentSpaceError, match=r"flux1 takes raw latents \[batch, 16.*looks like packed flux1 or"):
        LATENT_SPACES["flux1"].check_raw((1, 4, 64))


def test_a_packed_latent_needs_a_size_that_fits() -> None:
    space, packed = LATENT_SPACES["flux1"], torch.zeros(1, 16, 64)
    with pytest.raises(LatentSpaceError, match="64x80 px is 20 tokens; found 16"):
        space.to_raw(packed, height_px=80, width_px=64)
    with pytest.raises(LatentSpaceError, match="512x1024 px is 2048 tokens; found 16"):
        LATENT_SPACES["qwen-image-21"].to_raw(packed, height_px=1024, width_px=512)
    with pytest.raises(LatentSpaceError, match="even sides; found 3x4"):
        space.from_raw(torch.zeros(1, 16, 3, 4))


@pytest.mark.parametrize("to_array", [Tensor.numpy, lambda latent: latent], ids=["numpy", "torch"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_raw_latent_that_is_called_scaled_is_refused(name: str, to_array: Callable[[Tensor], Any]) -> None:
    space = LATENT_SPACES[name]
    scaled = torch.randn(1, 4, 16, 16)
    space.check_scaled_values(to_array(scaled))
    space.check_scaled_values(to_array(2.5 * scaled))  # a burnt image is an image still
    with pytest.raises(LatentSpaceError, match=r"root mean square about 1; found [4-9].*looks like a raw latent"):
        space.check_scaled_values(to_array(space.to_raw(scaled)))


def test_values_of_a_family_that_cannot_tell_pass() -> None:
    for name in ("flux1", "sd3", "qwen-image"):
        LATENT_SPACES[name].check_scaled_values(np.full((1, 16, 4, 4), 9.0, dtype=np.float32))


def test_a_space_without_its_vaes_statistics_says_so() -> None:
    space = LATENT_SPACES["flux2"]
    space.check_raw((1, 32, 4, 4))
    for convert in (
        lambda: space.from_raw(torch.zeros(1, 32, 4, 4)),
        lambda: space.to_raw(torch.zeros(1, 4, 128), 32, 32),
    ):
        with pytest.raises(LatentSpaceError, match="weights of its VAE and were not read"):
            convert()
    with pytest.raises(LatentSpaceError, match="need 32 or 128 values"):
        space.with_statistics([0.0] * 64, [1.0] * 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_read_from_a_vae_of_flux2(tmp_path: Path, dtype: torch.dtype) -> None:
    vae: Any = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        norm_num_groups=2,
        batch_norm_eps=0.5,
    )
    vae.bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    vae.bn.running_var.uniform_(0.1, 4.0, generator=torch.Generator().manual_seed(1))
    vae.to(dtype).save_pretrained(tmp_path)
    mean, std = read_vae_statistics(tmp_path)
    torch.testing.assert_close(torch.tensor(mean), vae.bn.running_mean.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(std), (vae.bn.running_var.float() + 0.5).sqrt(), rtol=1e-6, atol=0)
    assert LATENT_SPACES["flux2"].with_statistics(mean, std).mean == mean


def test_a_vae_without_statistics_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"batch_norm_eps": 1e-4}))
    save_file({"bn.running_mean": torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(LatentSpaceError, match="no safetensors file here holds the statistics"):
        read_vae_statistics(tmp_path)
    save_file({"bn.running_mean": torch.zeros(4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(LatentSpaceError, match="stored as I32"):
        read_vae_statistics(tmp_path)


@pytest.mark.parametrize(
    "numbers",
    [
        {"channels": 0}, {"stride_px": 0}, {"scale": 0.0}, {"scale": float("nan")}, {"mean": (0.0, 0.0)},
        {"mean": (0.0,), "std": (1.0,)}, {"mean": (0.0, 0.0), "std": (1.0, 0.0)}, {"side_multiple": 0},
        {"mean": (0.0, 0.0), "std": (1.0, 1.0), "shift": 0.1}, {"packing": "squeezed"},
        {"mean": (0.0,) * 8, "std": (1.0,) * 8}, {"mean": (0.0,) * 8, "std": (1.0,) * 8, "packing": "rows"},
    ],
)  # fmt: skip
def test_numbers_that_contradict_each_other_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(LatentSpaceError, match="latent space own"):
        own: dict[str, Any] = {"name": "own", "channels": 2, "stride_px": 8, "scale": 1.0}
        LatentSpace(**{**own, **numbers})


def test_the_table_of_families_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        LATENT_SPACES["sdxl"] = NORMED  # type: ignore[index]


def test_bundle_and_latent_space_import_no_torch() -> None:
    code = "import sys, giantleap.models.bundle.bundle, giantleap.models.latent_space; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
