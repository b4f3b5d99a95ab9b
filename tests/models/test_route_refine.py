"""The refine pass on a route: its place among the stages of every method, in batches, and what is left without it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.bundle.descriptor import METHODS, Method
from giantleap.models.bundle.stages import stages_of
from giantleap.models.device import StageName
from giantleap.models.generation.generator import Generator
from giantleap.models.generation.refine import refine_latent
from giantleap.models.generation.refinement import Refinement
from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.route import Route
from giantleap.models.runs import run_once
from giantleap.models.vae.autoencoder import Vae
from giantleap.models.worker_role import WorkerRole
from tests.models.generation.test_generator_families import saved
from tests.models.test_route_methods import CPU, ITEM, PIXELS, Recorder, draw
from tests.tiny_pipelines import tiny_sana

REFINED = replace(ITEM, refine=Refinement(0.3, 2))
OTHER = replace(REFINED, prompt="a blue cube", seed=5)
ORDER: dict[Method, list[StageName]] = {
    "lua": ["upscale", "refine", "decode"],
    "bicubic": ["upscale", "refine", "decode"],
    "swinir": ["decode", "upscale", "vae_encode", "refine", "decode"],
}  # the others have no "upscale"


@pytest.fixture(scope="module")
def route(tiny_bundle_dir: Path) -> Route:
    return Route.open(read_bundle(tiny_bundle_dir), CPU, torch.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1, 2])
def test_every_method_refines_between_upscale_and_decode(route: Route, method: Method, scale: int) -> None:
    item = replace(REFINED, width_px=64 * scale, height_px=48 * scale) if method == "direct" else REFINED
    latent, recorder = draw(route, item, method, scale), Recorder()
    _, (plain,) = route.upscale_and_decode([latent], scale, method)
    (refined,), (image,) = route.upscale_and_decode([latent], scale, method, "exact", recorder, [item])
    assert recorder.stages == (ORDER.get(method, ["refine", "decode"]) if scale > 1 else ["refine", "decode"])
    assert tuple(recorder.stages) == stages_of(method, scale, refines=True)
    assert image is not None and plain is not None and image.shape == plain.shape and not torch.equal(image, plain)
    assert refined.shape == (16, 6 * scale, 8 * scale)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_pass_the_image_is_as_before(route: Route, method: Method) -> None:
    latent = draw(route, ITEM, method, 2)
    before = route.upscale_and_decode([latent], 2, method)[1][0]
    route.upscale_and_decode([latent], 2, method, refine=[REFINED])
    after = route.upscale_and_decode([draw(route, ITEM, method, 2)], 2, method)[1][0]
    assert before is not None and after is not None and torch.equal(before, after)


def test_a_batch_refines_as_single_images_do(route: Route) -> None:
    latents = [draw(route), 0.5 * draw(route)]
    singles = [route.refine_items([latent], [item])[0] for latent, item in zip(latents, (REFINED, OTHER), strict=True)]
    batch = route.refine_items(latents, [REFINED, OTHER])
    assert all(torch.equal(single, batched) for single, batched in zip(singles, batch, strict=True))
    assert not torch.equal(route.refine_items(latents[:1], [OTHER])[0], singles[0])


def test_parts_of_a_pass_grow_to_the_whole_of_the_batch(route: Route) -> None:
    fractions: list[float | None] = []
    route.refine_items([draw(route)] * 2, [REFINED, OTHER], fractions.append)
    assert fractions == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("method", ["lua", "swinir"])
def test_images_are_refined_at_exactly_their_enlarged_size(route: Route, method: Method) -> None:
    recorder = Recorder()
    latents, (image, other) = route.upscale_images(
        [PIXELS, 255 - PIXELS], 2, method, "exact", recorder, [REFINED, OTHER]
    )
    before: list[StageName] = ["vae_encode", "upscale"] if method == "lua" else ["upscale", "vae_encode"]
    assert recorder.stages == [*before, "refine", "decode"]
    assert image is not None and other is not None and image.shape == other.shape == (90, 140, 3)
    assert [latent.shape for latent in latents] == [(16, 12, 18)] * 2
    _, (plain, _) = route.upscale_images([PIXELS, 255 - PIXELS], 2, method)
    assert plain is not None and not torch.equal(image, plain)


def test_a_refined_latent_is_what_the_pass_makes_of_the_upscaled_one(route: Route) -> None:
    latent = draw(route)
    (upscaled,), _ = route.upscale_and_decode([latent], 2, "lua", None)
    (refined,), images = route.upscale_and_decode([latent], 2, "lua", None, refine=[REFINED])
    assert images == [] and torch.equal(refined, refine_latent(route.generator, upscaled, REFINED))


def test_an_image_that_is_not_finite_fails_alone_after_pixels_were_enlarged(route: Route) -> None:
    broken = torch.full_like(draw(route), torch.nan)
    _, (bad, good) = route.upscale_and_decode([broken, draw(route)], 2, "swinir", refine=[REFINED, OTHER])
    assert bad is None and good is not None


def test_a_run_of_the_timing_protocol_has_the_stage(route: Route) -> None:
    assert list(run_once(route, REFINED, 2)[0].stages_s) == ["generate", "upscale", "refine", "decode"]
    assert list(run_once(route, ITEM, 2)[0].stages_s) == ["generate", "upscale", "decode"]


def test_half_a_route_does_not_refine(tiny_bundle_dir: Path) -> None:
    half = Route.open(read_bundle(tiny_bundle_dir), CPU, torch.float32, role=WorkerRole.DECODE)
    with pytest.raises(ValueError, match="role decode generates no latents"):
        half.upscale_and_decode([torch.zeros(16, 4, 4)], 2, refine=[REFINED])


@pytest.mark.parametrize("size_px", [(64, 64), (64, 128)])
def test_a_bundle_of_sana_refines_in_windows(size_px: tuple[int, int], tmp_path: Path) -> None:
    """Latents of stride 32 and a linear attention: the other kind of pipeline that a bundle may hold."""
    bundle = saved(tmp_path, tiny_sana(), LATENT_SPACES["sana"])
    assert bundle.max_side_px == 256 and not bundle.refine_unavailable
    generator = Generator.open(bundle, CPU, torch.float32)
    vae = Vae(generator.pipeline.vae, generator.latent_space, dtype=torch.float32)
    sana = Route(bundle.name, generator, None, None, vae, CPU, torch.float32)
    item = replace(REFINED, width_px=size_px[0], height_px=size_px[1])
    latent: Tensor = draw(sana, item)
    for scale in (2, 4):  # 4: up to 512 px, in windows of 256
        _, (image,) = sana.upscale_and_decode([latent], scale, "bicubic", refine=[item])
        assert image is not None and tuple(image.shape) == (scale * size_px[1], scale * size_px[0], 3)
        _, (plain,) = sana.upscale_and_decode([latent], scale, "bicubic")
        assert plain is not None and not torch.equal(image, plain)
