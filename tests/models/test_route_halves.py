"""A route in two halves, one that draws and one that finishes: together they are the whole one, to the bit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.bundle.descriptor import NEEDS_DECODER, REDIFFUSION, Method
from giantleap.models.generation.generator import Generator
from giantleap.models.generation.items import GenerationItem
from giantleap.models.route import Route
from giantleap.models.runs import warm
from giantleap.models.vae.autoencoder import VaeError, read_vae_model
from giantleap.models.worker_role import WorkerRole

CPU = torch.device("cpu")
ITEM = GenerationItem(
    "a red sphere on a green floor", "", seed=1, width_px=64, height_px=48, steps=4, guidance_scale=3.0
)


@pytest.fixture(scope="module")
def route(tiny_bundle_dir: Path) -> Route:
    return Route.open(read_bundle(tiny_bundle_dir), CPU, torch.float32)


@pytest.fixture(scope="module")
def halves(tiny_bundle_dir: Path) -> tuple[Route, Route]:
    bundle = read_bundle(tiny_bundle_dir)
    drawing, finishing = (
        Route.open(bundle, CPU, torch.float32, role=role) for role in (WorkerRole.GENERATE, WorkerRole.DECODE)
    )
    return drawing, finishing


def test_every_stage_is_in_one_half() -> None:
    assert [
        (role.loads_pipeline, role.loads_decoder) for role in (WorkerRole.ALL, WorkerRole.GENERATE, WorkerRole.DECODE)
    ] == [
        (True, True),
        (True, False),
        (False, True),
    ]


def finish(route: Route, latents: list[Tensor], scale: float, method: Method) -> tuple[list[Tensor], Tensor]:
    upscaled, images = route.upscale_and_decode(latents, scale, method, "exact", route.clock())
    assert images[0] is not None
    return upscaled, images[0]


@pytest.mark.parametrize(("method", "scale"), [("lua", 2), ("lua", 1), ("bicubic", 4), ("swinir", 2), ("direct", 2)])
def test_two_halves_make_the_image_of_the_whole(
    route: Route, halves: tuple[Route, Route], method: Method, scale: float
) -> None:
    drawing, finishing = halves
    item = replace(ITEM, init_image=torch.zeros(3, 48, 64), strength=0.5) if method == "lua" else ITEM
    whole, drawn = (each.generate_latents(item, each.clock()) for each in (route, drawing))
    assert torch.equal(whole[0], drawn[0])
    expected, found = finish(route, whole, scale, method), finish(finishing, drawn, scale, method)
    assert torch.equal(expected[0][0], found[0][0]) and torch.equal(expected[1], found[1])


@pytest.mark.parametrize("method", REDIFFUSION)
def test_a_half_that_draws_has_no_decoder_for_the_methods_that_need_one(
    route: Route, halves: tuple[Route, Route], method: Method
) -> None:
    drawing, finishing = halves
    item = replace(ITEM, steps=2)
    if method in NEEDS_DECODER:
        with pytest.raises(ValueError, match="has no decoder"):
            drawing.generate([item], method, 2)
    else:
        whole, drawn = (each.generate([item], method, 2)[0] for each in (route, drawing))
        assert whole is not None and drawn is not None and torch.equal(whole, drawn)
    (stand_in,) = finishing.generate_latents(item, finishing.clock(), method, 2)
    assert tuple(stand_in.shape) == (16, 12, 16)


def test_each_half_holds_only_what_its_role_needs(route: Route, halves: tuple[Route, Route]) -> None:
    drawing, finishing = halves
    assert drawing.lua is None and drawing.pixel is None and drawing.vae.model.decoder is None
    assert drawing.vae.model.encoder is not None, "a drawing may start from an image"
    with pytest.raises(VaeError, match="only generates latents"):
        drawing.decode(torch.zeros(1, 16, 8, 8))
    with pytest.raises(ValueError, match="generates no latents"):
        finishing.generate([ITEM])
    assert set(warm(drawing, 64, 64, 1)) == {("direct", 1)}
    warmed = warm(finishing, 64, 64, 1)
    assert set(warmed) == set(warm(route, 64, 64, 1)), "every network at every scale"
    assert all("generate" not in stages_s for stages_s in warmed.values())


@pytest.mark.parametrize("marked", [True, False])
def test_the_weights_of_the_variant_are_read_where_the_vae_has_them(
    tiny_bundle_dir: Path, tmp_path: Path, marked: bool
) -> None:
    bundle = read_bundle(tiny_bundle_dir)
    shutil.copytree(tiny_bundle_dir / "pipeline", tmp_path / "pipeline")
    if marked:
        plain = tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors"
        plain.rename(plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    pipeline = bundle.descriptor.pipeline.model_copy(update={"variant": "fp16"})
    described = bundle.descriptor.model_copy(update={"pipeline": pipeline})
    model = read_vae_model(replace(bundle, directory=tmp_path, descriptor=described), CPU, torch.float32)
    whole = Generator.open(bundle, CPU, torch.float32).pipeline.vae
    for name, weight in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
