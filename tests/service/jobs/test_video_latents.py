"""A latent of a video VAE (Wan 2.1, Qwen-Image) may have the side of its one frame, and then it comes back with it."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load, save

from giantleap.models.latent_space import LATENT_SPACES
from tests.service.compat_fakes import LATENT, FileProducer, build_app, write_wan_bundle
from tests.service.fakes import UPSCALE, FakeConsumer, FakeRoute, make_claim
from tests.service.paper_bundle import write_paper_bundle
from tests.service.worker.test_loop import run_all

WAN = LATENT_SPACES["wan21"]
FRAME = LATENT[0][:, None]  # [C, 1, h, w]
ASKED = {"Content-Type": "application/x-safetensors", "Accept": "application/x-safetensors"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def producer() -> FileProducer:
    return FileProducer()


@pytest.fixture
async def client(producer: FileProducer, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(producer, (write_wan_bundle(tmp_path),))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        yield client


async def enlarge(client: httpx.AsyncClient, latent: np.ndarray, scaled: bool = False) -> httpx.Response:
    query: dict[str, str | int] = {"output": "latent", "scale": 2, "scaled": str(scaled).lower()}
    content = save({"latent": np.ascontiguousarray(latent)})
    return await client.post("/upscale", params=query, content=content, headers=ASKED)


@pytest.mark.parametrize("latent", [FRAME, FRAME[None]], ids=["frame", "batch"])
@pytest.mark.parametrize("scaled", [False, True])
async def test_one_frame_is_taken_and_answered_in_kind(
    client: httpx.AsyncClient, producer: FileProducer, latent: np.ndarray, scaled: bool
) -> None:
    response = await enlarge(client, latent, scaled)
    assert response.status_code == 200, response.text
    raw = WAN.to_raw(LATENT[:, :, None]) if scaled else LATENT
    np.testing.assert_allclose(producer.latent_of(), raw, rtol=1e-5)
    larger = load(response.content)["latent"]
    assert larger.shape == (16, 1, 8, 12)
    again = await enlarge(client, larger)
    assert load(again.content)["latent"].shape == (16, 1, 16, 24), "an answer may be sent again"


async def test_a_raw_latent_without_a_frame_is_answered_without_one(client: httpx.AsyncClient) -> None:
    for latent in (LATENT, LATENT[0]):
        assert load((await enlarge(client, latent)).content)["latent"].shape == (16, 8, 12)


@pytest.mark.parametrize("shape", [(1, 16, 2, 4, 6), (1, 8, 1, 4, 6), (8, 1, 4, 6), (1, 1, 16, 4, 6)])
async def test_another_video_is_refused_with_the_form_that_is_taken(
    client: httpx.AsyncClient, producer: FileProducer, shape: tuple[int, ...]
) -> None:
    response = await enlarge(client, np.zeros(shape, np.float32))
    assert response.status_code == 422
    (problem,) = response.json()["errors"]
    assert problem["field"] == "body" and str(list(shape)) in problem["reason"]
    assert (
        "[batch, 16, latent_height, latent_width]" in problem["reason"] and "[batch, 16, 1, h, w]" in problem["reason"]
    )
    assert not producer.records


def test_only_spaces_of_videos_have_frames() -> None:
    for space in (WAN, LATENT_SPACES["qwen-image"]):
        assert space.is_one_frame((1, 16, 1, 4, 6)) and space.is_one_frame((16, 1, 4, 6))
        assert not space.is_one_frame((1, 16, 4, 6)) and not space.is_one_frame((16, 4, 6))
    assert not LATENT_SPACES["sd3"].is_one_frame((1, 16, 1, 4, 6))


def test_the_workers_result_has_the_frame_where_the_input_had_it() -> None:
    body = safetensors.torch.save({"latent": torch.full((1, 4, 4, 4), 5.0)})
    params = replace(UPSCALE, output="latent")
    consumer = FakeConsumer(
        [make_claim("video", replace(params, one_frame=True), body), make_claim("image", params, body)]
    )
    run_all(FakeRoute(), consumer)
    shapes = {
        name: tuple(safetensors.torch.load(files[0][1])["latent"].shape) for name, files in consumer.finished.items()
    }
    assert shapes == {"video": (4, 1, 8, 8), "image": (4, 8, 8)}


@pytest.mark.parametrize("latent", [FRAME, FRAME[None]], ids=["frame", "batch"])
@pytest.mark.parametrize("scaled", [False, True])
async def test_a_frame_of_qwen_image_is_taken_and_answered_in_kind(
    latent: np.ndarray, scaled: bool, producer: FileProducer, tmp_path: Path
) -> None:
    """Its pipeline packs latents, and its VAE decodes videos of one frame."""
    bundle = write_paper_bundle(tmp_path / "qwen", "qwen", 'name = "qwen-image"')
    app = build_app(producer, (bundle,))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        response = await enlarge(client, latent, scaled)
    assert response.status_code == 200, response.text
    space = LATENT_SPACES["qwen-image"]
    np.testing.assert_allclose(producer.latent_of(), space.unscale(LATENT) if scaled else LATENT, rtol=1e-5)
    assert load(response.content)["latent"].shape == (16, 1, 8, 12)
