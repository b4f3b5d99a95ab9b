"""The refine pass over HTTP: in the job of every route, in /models, refused with the field, and on a live service."""

import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load, save

from giantleap.models.generation.refinement import Refinement
from giantleap.service.api.app import create_app
from giantleap.service.jobs.job import GenerateParams, UpscaleParams
from giantleap.service.settings import Settings, read_settings
from tests.service.api.test_api_events import parse
from tests.service.api.test_api_methods import PNG, assert_refused
from tests.service.fake_producer import FakeProducer
from tests.service.live_server import live_server
from tests.service.paper_bundle import write_paper_bundle
from tests.service.worker.test_loop_redis import TIMEOUT_S, running_worker

PROMPT = "a red sphere"
LATENT_TYPE = {"Content-Type": "application/x-safetensors"}


def latent_body(items: int = 1, side: int = 8) -> bytes:
    values = np.random.default_rng(0).standard_normal((items, 16, side, side)).astype(np.float32)
    return save({"latent": values})


@pytest.fixture
def producer() -> FakeProducer:
    return FakeProducer()


@pytest.fixture(scope="module")
def bundle_dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    root = tmp_path_factory.mktemp("bundles")
    klein = write_paper_bundle(root / "klein", "klein", pipeline_class="Flux2KleinPipeline")
    return write_paper_bundle(root / "paper"), klein


@pytest.fixture
async def client(bundle_dirs: tuple[Path, ...], producer: FakeProducer) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(read_settings(bundle=bundle_dirs), producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        yield client


async def test_the_field_reaches_the_job(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    body = {"prompt": PROMPT, "refine": {"strength": 0.2, "steps": 6}}
    assert (await client.post("/generate", json=body)).status_code == 200
    openai = {"prompt": PROMPT, "refine": {"steps": 5}}
    assert (await client.post("/v1/images/generations", json=openai)).status_code == 200
    first, second = (job.params for job in producer.jobs)
    assert isinstance(first, GenerateParams) and isinstance(second, GenerateParams)
    assert (first.refine, second.refine) == (Refinement(0.2, 6), Refinement(0.15, 5))


async def test_an_upscale_takes_it_in_the_query_and_in_a_form(
    client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    query = {"refine_strength": "0.2", "prompt": PROMPT, "seed": "7"}
    sent = await client.post("/upscale", params=query, content=latent_body(2), headers=LATENT_TYPE)
    fields = {"refine_steps": "6", "prompt": f"{PROMPT} zebra"}
    form = await client.post("/upscale", files={"image": ("a.png", PNG, "image/png")}, data=fields)
    assert (sent.status_code, form.status_code) == (200, 200), (sent.text, form.text)
    first, second = (job.params for job in producer.jobs)
    assert isinstance(first, UpscaleParams) and isinstance(second, UpscaleParams)
    assert (first.refine, first.prompt, first.seed) == (Refinement(0.2, 4), PROMPT, 7)
    assert sent.json()["seed"] == 7 and sent.headers["x-seed"] == "7" and PROMPT not in sent.text
    assert second.refine == Refinement(0.15, 6) and second.seed is not None
    assert form.json()["warnings"] == ["bundle paper does not know the word 'zebra'"]
    plain = await client.post("/upscale", content=latent_body(), headers=LATENT_TYPE)
    assert plain.json()["seed"] is None and "x-seed" not in plain.headers


async def test_a_repeat_under_a_key_has_the_same_seed(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    query = {"refine_steps": "4", "prompt": PROMPT}
    for _ in range(2):
        headers = LATENT_TYPE | {"Idempotency-Key": "again"}
        await client.post("/upscale", params=query, content=latent_body(), headers=headers)
    seeds = {job.params.seed for job in producer.jobs}
    assert len(seeds) == 1 and None not in seeds


async def test_what_cannot_be_is_refused_before_the_queue(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    async def generate(refine: Any, **fields: Any) -> httpx.Response:
        return await client.post("/generate", json={"prompt": PROMPT, "refine": refine, **fields})

    async def upscale(**query: Any) -> httpx.Response:
        return await client.post("/upscale", params=query, content=latent_body(), headers=LATENT_TYPE)

    assert_refused(await generate({"strength": 0.6}), "refine.strength", "at most 0.5")
    assert_refused(await generate({"strength": 0.001}), "refine.strength", "at least 0.004")
    assert_refused(await generate({"steps": 0}), "refine.steps")
    assert_refused(await generate(0.15), "refine", "object")
    assert_refused(await generate({}, bundle="klein"), "refine", "Flux2KleinPipeline", "leave it out")
    assert_refused(await upscale(refine_strength=0.6, prompt=PROMPT), "refine_strength", "at most 0.5")
    assert_refused(await upscale(refine_strength=0.2), "prompt", "required")
    assert_refused(await upscale(refine_strength=0.2, prompt=" "), "prompt", "empty")
    assert_refused(await upscale(prompt=PROMPT), "prompt", "refine_strength")
    assert_refused(await upscale(refine_steps=4, prompt=PROMPT, bundle="klein"), "refine_strength", "Flux2Klein")
    assert producer.jobs == []


async def test_the_bundles_say_whether_they_refine(client: httpx.AsyncClient) -> None:
    paper, klein = (await client.get("/models")).json()
    assert (paper["refine"], paper["refine_unavailable"]) == (True, None)
    assert klein["refine"] is False and "Flux2KleinPipeline" in klein["refine_unavailable"]


def pixels_of(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content)))


def test_a_live_service_refines_what_it_generates_and_upscales(settings: Settings, tiny_bundle_dir: Path) -> None:
    running = settings.model_copy(update={"bundle": (tiny_bundle_dir,), "torch_threads": 1, "device": "cpu"})
    accept = {"Accept": "image/png"}
    with (
        running_worker(running),
        live_server(create_app(running)) as url,
        httpx.Client(base_url=url, timeout=TIMEOUT_S) as client,
    ):
        fields: dict[str, Any] = {"prompt": PROMPT, "seed": 1, "width": 128, "height": 96}
        refine = {"strength": 0.3, "steps": 3}
        plain = client.post("/generate", json=fields, headers=accept)
        off = client.post("/generate", json=fields | {"refine": {"strength": 0}}, headers=accept)
        refined = client.post("/generate", json=fields | {"refine": refine}, headers=accept)
        again = client.post("/generate", json=fields | {"refine": refine}, headers=accept)
        assert np.array_equal(pixels_of(plain), pixels_of(off))
        assert np.array_equal(pixels_of(refined), pixels_of(again)) and pixels_of(refined).shape == (96, 128, 3)
        assert not np.array_equal(pixels_of(plain), pixels_of(refined))
        assert "refine;dur=" in refined.headers["server-timing"] and "refine" not in plain.headers["server-timing"]
        job = client.get(f"/jobs/{refined.headers['x-job-id']}").json()
        assert list(job["stages"]) == ["queue", "generate", "upscale", "refine", "decode", "encode"]
        events = parse(client.get(f"{job['events_url']}", headers={"Accept": "text/event-stream"}).text)
        stages = [event.data["stage"] for event in events if event.name == "stage"]
        assert stages == ["generate", "upscale", "refine", "decode", "encode"]

        query: dict[str, Any] = {"refine_strength": 0.3, "prompt": PROMPT, "seed": 5, "output": "latent"}
        to_latent = LATENT_TYPE | {"Accept": "application/x-safetensors"}
        large = client.post("/upscale", params=query, content=latent_body(), headers=to_latent)
        small = client.post("/upscale", params={"output": "latent"}, content=latent_body(), headers=to_latent)
        assert large.status_code == small.status_code == 200, large.text
        (first,), (second,) = load(large.content).values(), load(small.content).values()
        assert first.shape == second.shape == (16, 16, 16) and not np.array_equal(first, second)
        both = client.post("/upscale", params=query, content=latent_body(2), headers=LATENT_TYPE).json()
        assert [each["seed"] for each in both["results"]] == [5, 6]
        image = {"refine_steps": "2", "prompt": PROMPT, "method": "swinir"}
        enlarged = client.post("/upscale", files={"image": ("a.png", PNG, "image/png")}, data=image, headers=accept)
        assert pixels_of(enlarged).shape == (90, 140, 3) and "refine;dur=" in enlarged.headers["server-timing"]
