"""The route with real, tiny networks: sizes, isolation of items, parity with the stock pipeline, devices."""

import platform
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from giantleap.models.bundle.bundle import BundleError, read_bundle
from giantleap.models.device import StageClock, choose_device, choose_dtype, is_out_of_memory
from giantleap.models.generation.items import GenerationItem
from giantleap.models.pixels.images import finite_items
from giantleap.models.route import Route
from giantleap.models.runs import run_once, warm
from giantleap.models.vae.pixels import decode_items

CPU = torch.device("cpu")
ITEM = GenerationItem(
    "a red sphere on a green floor", "", seed=1, width_px=64, height_px=48, steps=4, guidance_scale=3.0
)


@pytest.fixture(scope="module")
def route(tiny_bundle_dir: Path) -> Route:
    return Route.open(read_bundle(tiny_bundle_dir), CPU, torch.float32)


def draw(route: Route, *items: GenerationItem) -> list[Tensor]:
    latents = route.generate(items)
    return [latent for latent in latents if latent is not None]


def images_of(route: Route, scale: int, *items: GenerationItem) -> list[Tensor]:
    images = decode_items(route.vae, route.upscale_items(draw(route, *items), scale))
    assert all(image is not None for image in images)
    return [image for image in images if image is not None]


def assert_same_pixels(found: Tensor, expected: Tensor) -> None:
    """Equal within 1 of 255 in every pixel."""
    assert found.shape == expected.shape
    assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_an_image_is_the_same_alone_and_in_a_batch(route: Route, scale: int) -> None:
    (alone,) = images_of(route, scale, ITEM)
    batched = images_of(route, scale, replace(ITEM, seed=2, prompt="a blue cube"), ITEM, replace(ITEM, seed=3))
    assert alone.shape == (48 * scale, 64 * scale, 3) and alone.dtype == torch.uint8
    assert_same_pixels(batched[1], alone)
    assert (batched[0].int() - alone.int()).abs().max() > 1, "another seed is another image"


def test_scale_one_gives_the_image_of_the_stock_pipeline(route: Route) -> None:
    stock = route.generator.pipeline(
        prompt=ITEM.prompt,
        negative_prompt="",
        width=64,
        height=48,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images
    expected = (torch.from_numpy(stock[0]) * 255).round().to(torch.uint8)
    assert_same_pixels(images_of(route, 1, ITEM)[0], expected)


def test_latents_of_several_sizes_are_enlarged_together_as_each_alone(route: Route) -> None:
    sizes = [(5, 8), (8, 8), (7, 5), (8, 6)]  # all are 8x8 once padded to a window of 4
    latents = [torch.randn(16, h, w, generator=torch.Generator().manual_seed(h * w)) for h, w in sizes]
    for scale in (2, 4):
        together = route.upscale_items(latents, scale)
        assert [tuple(upscaled.shape) for upscaled in together] == [(16, scale * h, scale * w) for h, w in sizes]
        for latent, upscaled in zip(latents, together, strict=True):
            torch.testing.assert_close(upscaled, route.upscale(latent[None], scale)[0], rtol=1e-4, atol=1e-4)


def test_latents_of_unequal_padded_sizes_are_refused(route: Route) -> None:
    with pytest.raises(ValueError, match="one size after padding"):
        route.upscale_items([torch.zeros(16, 8, 8), torch.zeros(16, 9, 8)], 2)


def test_scale_one_changes_nothing_and_an_unknown_scale_is_refused(route: Route) -> None:
    latent = torch.randn(1, 16, 5, 7)
    assert torch.equal(route.upscale(latent, 1), latent)
    with pytest.raises(ValueError, match="3"):
        route.upscale(latent, 3)


def test_upscaling_does_more_than_enlarge(route: Route) -> None:
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.functional.interpolate(latent, scale_factor=2, mode="bicubic")
    assert (route.upscale(latent, 2) - plain).abs().max() > 0.01, "the tiny LUA's weights take part"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_spoils_only_its_own_image(route: Route, bad: float) -> None:
    latents = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    spoiled = latents.clone()
    spoiled[1, 3, 2, 2] = bad
    for scale in (1, 2):
        good = route.decode(route.upscale(latents, scale))
        first, second, third = route.decode(route.upscale(spoiled, scale))
        assert second is None
        for found, expected in ((first, good[0]), (third, good[2])):
            assert found is not None and expected is not None
            assert_same_pixels(found, expected)


def test_finite_items_are_found_per_item() -> None:
    batch = torch.zeros(3, 2, 2)
    batch[1, 0, 1] = float("-inf")
    assert finite_items(batch) == [True, False, True]


def test_images_of_several_sizes_are_decoded_in_order(route: Route) -> None:
    latents = [torch.randn(16, h, 4, generator=torch.Generator().manual_seed(h)) for h in (4, 5, 4)]
    images = decode_items(route.vae, latents)
    for latent, image in zip(latents, images, strict=True):
        (alone,) = route.decode(latent[None])
        assert image is not None and alone is not None
        assert_same_pixels(image, alone)


def test_bfloat16_stays_close_to_float32(tiny_bundle_dir: Path, route: Route) -> None:
    half = Route.open(read_bundle(tiny_bundle_dir), CPU, torch.bfloat16)
    assert half.vae.dtype == torch.bfloat16
    assert half.upscale(torch.ones(1, 16, 4, 4), 2).dtype == torch.float32, "latents stay float32 between the stages"
    (found,), (expected,) = images_of(half, 2, ITEM), images_of(route, 2, ITEM)
    assert (found.int() - expected.int()).abs().float().mean() < 4


def test_warming_runs_every_scale_at_the_requested_size(route: Route) -> None:
    stages_s = warm(route, 64, 64, steps=1)
    assert set(stages_s) == {("lua", 1), ("lua", 2), ("lua", 4), ("swinir", 2), ("swinir", 4)}
    assert set(stages_s["lua", 1]) == {"generate", "decode"}
    assert all(set(stages_s["lua", scale]) == {"generate", "upscale", "decode"} for scale in (2, 4))
    assert all(duration_s > 0 for stages in stages_s.values() for duration_s in stages.values())


def test_one_run_is_one_decode(route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    decode = route.vae.decode

    def record(latents: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(latents.shape))
        return decode(latents, **options)

    monkeypatch.setattr(route.vae, "decode", record)
    run_once(route, ITEM, 4)
    assert shapes == [(1, 16, 24, 32)], "at the enlarged size, and only there"


def test_a_clock_adds_up_repeated_stages_also_when_they_raise() -> None:
    clock = StageClock(CPU)
    with pytest.raises(RuntimeError), clock.measure("generate"):
        raise RuntimeError
    first_s = clock.stages_s["generate"]
    with clock.measure("generate"):
        pass
    assert clock.stages_s["generate"] > first_s > 0


def test_peak_memory_on_a_cpu_is_named_as_that_of_the_process(route: Route) -> None:
    peak = route.peak_memory()
    assert peak.source == "process_rss"
    assert 50e6 < peak.size_bytes < 1e12, "bytes, not kibibytes"


def test_a_bundle_whose_weights_were_changed_is_refused(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "changed"
    shutil.copytree(tiny_bundle_dir, directory)
    weights = directory / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="sha256"):
        Route.open(read_bundle(directory), CPU, torch.float32)


def test_a_real_failed_allocation_is_known_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46, dtype=torch.float32)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_a_gpu_that_is_not_there_is_refused_and_auto_takes_the_cpu() -> None:
    assert choose_device("auto") == CPU == choose_device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match="CUDA devices"):
            choose_device(name)


@pytest.mark.parametrize("has_units", [True, False])
def test_bfloat16_that_a_processor_only_emulates_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, has_units: bool
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_units)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16
    assert ("no arithmetic for bfloat16" in caplog.text) is not has_units
    caplog.clear()
    choose_dtype("float32", CPU)
    choose_dtype("bfloat16", torch.device("cuda:0"))
    assert caplog.text == ""


def test_dtypes_follow_the_device() -> None:
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("auto", torch.device("cuda:0")) == torch.bfloat16
    assert choose_dtype("float16", torch.device("cuda:0")) == torch.float16
    assert choose_dtype("auto", torch.device("cuda:0"), "float16") == torch.float16, "the bundle's, on a GPU"
    assert choose_dtype("auto", CPU, "float16") == torch.float32
    assert choose_dtype("bfloat16", torch.device("cuda:0"), "float16") == torch.bfloat16, "a setting comes first"
    with pytest.raises(ValueError, match="float16 on a CPU"):
        choose_dtype("float16", CPU)
