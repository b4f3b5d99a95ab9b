"""Jobs with a mask in the worker, on random weights: alone and in a batch, enlarged, canceled, and marked as edited."""

import io
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.generation.generator import Generator
from giantleap.models.generation.items import GenerationItem
from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.pixels.images import to_signed
from giantleap.models.route import Route
from giantleap.models.vae.autoencoder import Vae
from giantleap.models.vae.pixels import decode_pixels, encode_pixels
from giantleap.models.worker_role import WorkerRole
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobs.edits.inputs import to_input
from giantleap.service.jobs.job import GenerateParams
from giantleap.service.jobs.requests import GenerateRequest
from giantleap.service.settings import read_settings
from tests.models.generation.test_generator_families import saved
from tests.service.fakes import GENERATE, FakeConsumer, make_claim, open_worker
from tests.service.jobs.test_edit_inputs import to_file, to_text
from tests.tiny_pipelines import tiny_sd15

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
WHITE = np.zeros((64, 64), np.uint8)
WHITE[:, 32:] = 255
PLAIN = replace(GENERATE, method="bicubic", scale=1)
EDIT = replace(PLAIN, strength=1.0, mask=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return saved(tmp_path_factory.mktemp("sd15"), tiny_sd15(), LATENT_SPACES["sd15"])


@pytest.fixture(scope="module")
def route() -> Route:
    return open_route(WorkerRole.ALL)


def open_route(role: WorkerRole) -> Route:
    space = LATENT_SPACES["sd15"]
    pipeline: Any = tiny_sd15()
    pipeline.set_progress_bar_config(disable=True)
    generator, vae = Generator(pipeline, space), Vae(pipeline.vae, space)
    return Route("tiny", generator, None, None, vae, torch.device("cpu"), torch.float32, role=role)


def edit(name: str, params: GenerateParams = EDIT, pixels: np.ndarray = PIXELS, mask: np.ndarray = WHITE) -> Claim:
    fields = {"init_image": to_text(to_file(pixels)), "mask": to_text(to_file(mask))}
    request = GenerateRequest.model_validate({"prompt": params.prompt, **fields})
    return make_claim(name, params, to_input(request, params, 64 * 64))


def run(route: Route, bundle: Bundle, *claims: Claim, **consumer_fields: dict[str, int]) -> FakeConsumer:
    stop = threading.Event()
    consumer = FakeConsumer(list(claims), on_empty=stop.set, **consumer_fields)  # type: ignore[arg-type]
    worker, _ = open_worker(route, consumer, read_settings(), stop=stop, bundle=bundle)
    worker.run()
    return consumer


def pixels_of(consumer: FakeConsumer, name: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(content))).astype(int) for _, content in consumer.finished[name]]


@pytest.mark.parametrize("scale", [1, 2])
def test_the_file_is_the_decode_of_a_latent_that_keeps_the_image_outside_its_mask(
    route: Route, bundle: Bundle, scale: int
) -> None:
    params = replace(EDIT, scale=scale, width_px=64 * scale, height_px=64 * scale)
    (image,) = pixels_of(run(route, bundle, edit("edited", params)), "edited")
    item = GenerationItem(
        params.prompt,
        "",
        params.seed,
        *(64, 64),
        steps=params.steps,
        guidance_scale=params.guidance_scale,
        init_image=to_signed(torch.from_numpy(PIXELS)),
        mask=torch.from_numpy(WHITE > 0)[None].float(),
    )
    (latent,) = route.generate([item])
    assert latent is not None
    torch.testing.assert_close(latent[..., :4], encode_pixels(route.vae, PIXELS)[..., :4], rtol=0, atol=1e-5)
    (expected,) = decode_pixels(route.vae, route.upscale(latent[None], scale, "bicubic"))
    assert expected is not None and image.shape == (64 * scale, 64 * scale, 3)
    assert np.abs(image - expected.numpy().astype(int)).max() <= 1


def test_jobs_with_and_without_masks_run_apart_and_a_batch_is_its_jobs(route: Route, bundle: Bundle) -> None:
    other = {"pixels": 255 - PIXELS, "mask": WHITE.T.copy()}
    claims = [edit("two", replace(EDIT, num_images=2)), edit("other", replace(EDIT, seed=2), **other)]
    start = replace(EDIT, mask=False)
    whole = make_claim("whole", start, to_file(PIXELS))
    done = run(route, bundle, *claims, whole, make_claim("plain", replace(EDIT, strength=None, mask=False)))
    assert done.batch_jobs == {"two": 2, "other": 2, "whole": 1, "plain": 1} and not done.failed
    alone = run(route, bundle, edit("first"), edit("second", replace(EDIT, seed=2)))
    for batched, single in zip(
        pixels_of(done, "two"), pixels_of(alone, "first") + pixels_of(alone, "second"), strict=True
    ):
        assert np.abs(batched - single).max() <= 1
    again = run(route, bundle, edit("other", replace(EDIT, seed=2), **other))
    assert np.abs(pixels_of(again, "other")[0] - pixels_of(done, "other")[0]).max() <= 1


def test_an_edit_reports_its_steps_and_is_canceled_between_them(route: Route, bundle: Bundle) -> None:
    done = run(route, bundle, edit("half", replace(EDIT, strength=0.7)))
    steps = [event[2] for event in done.events if event[1] == "step"]
    assert steps == [{"step": 1, "steps": 2}, {"step": 2, "steps": 2}]
    gone = run(route, bundle, edit("gone"), cancel_after_polls={"gone": 2})
    assert gone.canceled_ids == ["gone"] and not gone.finished


@pytest.mark.parametrize(("params", "kind"), [(EDIT, b"compositeWithTrained"), (PLAIN, b"/trainedAlgorithmicMedia")])
def test_an_edited_image_is_marked_as_a_composite(
    route: Route, bundle: Bundle, params: GenerateParams, kind: bytes
) -> None:
    claim = edit("one", params) if params.mask else make_claim("one", params)
    ((_, content),) = run(route, bundle, claim).finished["one"]
    assert kind in content


def test_split_workers_draw_the_edit_of_one_worker(route: Route, bundle: Bundle) -> None:
    params = replace(EDIT, scale=2, width_px=128, height_px=128)
    drawing, finishing = map(open_route, (WorkerRole.GENERATE, WorkerRole.DECODE))
    passed = run(drawing, bundle, edit("one", params)).transferred["one"]
    (image,), (whole,) = (
        pixels_of(run(each, bundle, claim), "one")
        for each, claim in ((finishing, passed), (route, edit("one", params)))
    )
    assert np.abs(image - whole).max() <= 1
