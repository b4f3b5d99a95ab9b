"""The ways to a large image, and images that come in: real, tiny networks."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.bundle.descriptor import METHODS, REDIFFUSION, Method
from giantleap.models.bundle.stages import stages_of
from giantleap.models.device import PartCallback, StageName
from giantleap.models.generation.items import GenerationItem
from giantleap.models.route import Route
from giantleap.models.runs import run_once, warm

CPU = torch.device("cpu")
ITEM = GenerationItem(
    "a red sphere on a green floor", "", seed=1, width_px=64, height_px=48, steps=2, guidance_scale=3.0
)
PIXELS = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def route(tiny_bundle_dir: Path) -> Route:
    return Route.open(read_bundle(tiny_bundle_dir), CPU, torch.float32)


def draw(route: Route, item: GenerationItem = ITEM, method: Method = "lua", scale: float = 1) -> Tensor:
    (latent,) = route.generate([item], method, scale)
    assert latent is not None
    return latent


@dataclass
class Recorder:
    stages: list[StageName] = field(default_factory=list)

    def measure(self, stage: StageName) -> AbstractContextManager[None]:
        self.stages.append(stage)
        return nullcontext()

    def report_part(self, stage: StageName, fraction: float | None) -> None:
        assert stage == self.stages[-1] and (fraction is None or 0 < fraction <= 1 + 1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_every_method_gives_the_final_size_by_its_own_stages(route: Route, method: Method, scale: int) -> None:
    item = replace(ITEM, width_px=64 * scale, height_px=48 * scale) if method == "direct" else replace(ITEM, steps=3)
    latent, recorder = draw(route, item, method, scale), Recorder()
    _, (image,) = route.upscale_and_decode([latent], scale, method, "exact", recorder)
    assert image is not None and image.dtype == torch.uint8 and tuple(image.shape) == (48 * scale, 64 * scale, 3)
    expected = {
        "lua": ["upscale", "decode"],
        "bicubic": ["upscale", "decode"],
        "swinir": ["decode", "upscale"],
    }
    stages = expected.get(method, ["decode"]) if scale > 1 else ["decode"]
    assert recorder.stages == stages == list(stages_of(method, scale))


def test_the_methods_start_from_one_latent_and_end_in_four_images(route: Route) -> None:
    latent = draw(route)
    images = [route.upscale_and_decode([latent], 2, method, "exact")[1][0] for method in ("lua", "bicubic", "swinir")]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        a, b = images[first], images[second]
        assert a is not None and b is not None and (a.int() - b.int()).abs().float().mean() > 0.5
    assert torch.equal(draw(route), latent), "nothing wrote into it"


def test_bicubic_is_the_interpolation_of_the_latent(route: Route) -> None:
    latent = draw(route)
    (upscaled,), _ = route.upscale_and_decode([latent], 4, "bicubic", None)
    assert torch.equal(upscaled, F.interpolate(latent[None], scale_factor=4.0, mode="bicubic")[0])


def test_swinir_sees_the_decoded_base_image(route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    assert route.pixel is not None
    seen: list[Tensor] = []
    upscale = route.pixel.upscale

    def record(images: Tensor, scale: int, on_part: PartCallback | None) -> Tensor:
        seen.append(images)
        return upscale(images, scale, on_part)

    monkeypatch.setattr(route.pixel, "upscale", record)
    latent = draw(route)
    route.upscale_and_decode([latent], 2, "swinir", "exact")
    (base,) = route.decode(latent[None])
    assert base is not None
    torch.testing.assert_close(seen[0], base.permute(2, 0, 1)[None] / 255)


@pytest.mark.parametrize("method", ["swinir", "direct"])
def test_latents_are_not_enlarged_by_a_method_of_pixels(route: Route, method: Method) -> None:
    with pytest.raises(ValueError, match=method):
        route.upscale(torch.zeros(1, 16, 8, 8), 2, method)


def test_a_route_without_weights_refuses_their_methods(route: Route) -> None:
    bare = Route(route.name, route.generator, None, None, route.vae, CPU, torch.float32)
    assert {method for method in METHODS if bare.scales_of(method) == (1,)} == {"lua", "swinir", "lsrna"}
    assert {bare.scales_of(method) for method in METHODS} == {(1,), (1, 2, 4)}
    with pytest.raises(ValueError, match="lua"):
        bare.upscale(torch.zeros(1, 16, 8, 8), 2)
    with pytest.raises(ValueError, match="pixels"):
        bare.upscale_pixels([torch.zeros(8, 8, 3, dtype=torch.uint8)], 2)
    assert set(warm(bare, 32, 32, 1)) == {("bicubic", 1), ("bicubic", 2), ("bicubic", 4)}


def test_one_run_of_direct_draws_at_the_final_size(route: Route, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[GenerationItem] = []
    generate = route.generate

    def record(items: Sequence[GenerationItem], method: Method, scale: float) -> list[Tensor | None]:
        drawn.extend(items)
        return generate(items, method, scale)

    monkeypatch.setattr(route, "generate", record)
    assert set(run_once(route, ITEM, 2, "direct")[0].stages_s) == {"generate", "decode"}
    assert (drawn[0].width_px, drawn[0].height_px) == (128, 96)


@pytest.mark.parametrize("method", REDIFFUSION)
def test_a_method_that_draws_again_is_plain_at_the_base_size_and_timed_as_generation(
    route: Route, method: Method
) -> None:
    assert torch.equal(draw(route, ITEM, method, 1), draw(route))
    assert set(run_once(route, replace(ITEM, steps=3), 2, method)[0].stages_s) == {"generate", "decode"}


@pytest.mark.parametrize("method", ["lua", "bicubic", "swinir"])
def test_an_image_comes_back_enlarged_at_exactly_its_size(route: Route, method: Method) -> None:
    recorder = Recorder()
    latents, (image, other) = route.upscale_images([PIXELS, 255 - PIXELS], 2, method, "exact", recorder)
    assert image is not None and other is not None and tuple(image.shape) == (90, 140, 3)
    assert (image.int() - other.int()).abs().float().mean() > 1
    if method == "swinir":
        assert recorder.stages == ["upscale"] and latents == []
    else:
        assert recorder.stages == ["vae_encode", "upscale", "decode"] and tuple(latents[0].shape) == (16, 12, 18)


def test_an_image_is_encoded_to_the_posterior_mean_of_whole_latents(route: Route) -> None:
    latent = route.encode_image(PIXELS)
    padded = np.pad(PIXELS, ((0, 3), (0, 2), (0, 0)), mode="edge")
    image = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        mean = route.generator.pipeline.vae.encode(image).latent_dist.mean[0]
    torch.testing.assert_close(latent, mean)


def test_an_image_may_stay_a_latent(route: Route) -> None:
    (latent,), images = route.upscale_images([PIXELS], 2, "lua", None)
    assert images == [] and tuple(latent.shape) == (16, 12, 18)
