"""Images to edit over /generate: what a bundle takes becomes a job with its input, the rest is refused and named."""

import base64
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from giantleap.service.api.app import create_app
from giantleap.service.jobs.edits.inputs import read_input
from giantleap.service.jobs.job import GenerateParams
from giantleap.service.settings import read_settings
from tests.service.fake_producer import FakeProducer
from tests.service.paper_bundle import write_paper_bundle

# The UNet of the last one takes 16 channels, its inpaint pipeline only 4.
CLASSES = {
    "sd": "StableDiffusion3Pipeline",
    "klein": "Flux2KleinPipeline",
    "sana": "SanaPipeline",
    "unet": "StableDiffusionPipeline",
}


def to_text(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
WHITE = np.zeros((64, 64), np.uint8)
WHITE[:, 32:] = 255
IMAGE, MASK = to_text(PIXELS), to_text(WHITE)


@pytest.fixture(scope="module")
def bundle_dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    root = tmp_path_factory.mktemp("bundles")
    return tuple(write_paper_bundle(root / name, name, pipeline_class=kind) for name, kind in CLASSES.items())


@pytest.fixture
def producer() -> FakeProducer:
    return FakeProducer()


@pytest.fixture
async def client(bundle_dirs: tuple[Path, ...], producer: FakeProducer) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(read_settings(bundle=bundle_dirs, max_image_px=512 * 512), producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        yield client


async def generate(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/generate", json={"prompt": "a red sphere", **fields})


async def test_a_mask_makes_a_job_that_holds_image_and_mask(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    response = await generate(client, init_image=IMAGE, mask=f"data:image/png;base64,{MASK}")
    (job,) = producer.jobs
    assert response.status_code == 200 and isinstance(job.params, GenerateParams)
    assert (job.params.mask, job.params.images, job.params.strength) == (True, 0, 1.0)
    images = read_input(producer.blobs[job.id], job.params)
    np.testing.assert_array_equal(images.init_image, PIXELS)
    np.testing.assert_array_equal(images.mask, WHITE > 0)
    await generate(client, init_image=IMAGE, mask=MASK, strength=0.5)
    assert producer.jobs[1].params.strength == 0.5  # type: ignore[union-attr]


async def test_reference_images_make_a_job_that_holds_them(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    response = await generate(client, bundle="klein", images=[IMAGE, MASK])
    (job,) = producer.jobs
    assert response.status_code == 200 and isinstance(job.params, GenerateParams)
    assert (job.params.mask, job.params.images, job.params.strength) == (False, 2, None)
    first, second = read_input(producer.blobs[job.id], job.params).references
    np.testing.assert_array_equal(first, PIXELS)
    np.testing.assert_array_equal(second[..., 0], WHITE)


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"mask": MASK}, "mask", "needs the init_image"),
        ({"bundle": "sana", "init_image": IMAGE, "mask": MASK}, "mask", "bundles that can: sd, klein"),
        ({"bundle": "unet", "init_image": IMAGE, "mask": MASK}, "mask", "bundles that can: sd, klein"),
        ({"bundle": "sana", "images": [IMAGE]}, "images", "bundles that can: klein; or start from one as init_image"),
        ({"bundle": "klein", "images": [IMAGE] * 9}, "images", "are 9; bundle klein takes at most 8"),
        ({"bundle": "klein", "init_image": IMAGE, "mask": MASK, "images": [IMAGE]}, "images", "exclude an init_image"),
        ({"init_image": IMAGE, "mask": MASK, "refine": {}}, "refine", "without its mask"),
        ({"bundle": "klein", "images": [IMAGE], "method": "rectifiedhr"}, "method", ""),
        ({"init_image": IMAGE, "mask": MASK, "strength": 0.1, "steps": 8}, "strength", "no step"),
        ({"init_image": IMAGE, "mask": to_text(WHITE[:32])}, "mask", "send both of one size"),
        ({"init_image": IMAGE, "mask": "no base64!"}, "mask", "base64"),
        ({"images": ["https://example.com/a.png"], "bundle": "klein"}, "images.0", "does not fetch"),
        ({"images": [], "mask": ""}, "mask", ""),
        ({"images": [IMAGE] * 17, "bundle": "klein"}, "images", "16"),
    ],
)
async def test_what_cannot_be_edited_is_refused_before_anything_is_queued(
    client: httpx.AsyncClient, producer: FakeProducer, fields: dict[str, Any], field: str, words: str
) -> None:
    response = await generate(client, **fields)
    assert response.status_code == 422, response.text
    assert field in [error["field"] for error in response.json()["errors"]]
    assert words in response.json()["detail"], response.json()["detail"]
    assert producer.jobs == []


async def test_a_mask_alone_is_refused_where_the_base_image_is_too_large(tmp_path: Path) -> None:
    directory = write_paper_bundle(tmp_path, "klein", pipeline_class="Flux2KleinPipeline")
    text = (directory / "bundle.toml").read_text().replace("max_direct_px = 256", "max_direct_px = 2048")
    (directory / "bundle.toml").write_text(text)
    producer = FakeProducer()
    app = create_app(read_settings(bundle=(directory,)), producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        large = {"method": "direct", "width": 1280, "height": 1024, "init_image": IMAGE, "mask": MASK}
        response = await generate(client, **large)
        assert response.status_code == 422 and "at most 1048576 pixels" in response.json()["detail"]
        assert (await generate(client, **large | {"width": 1024})).status_code == 200


async def test_models_say_what_each_bundle_takes(client: httpx.AsyncClient) -> None:
    listed = {model["name"]: model for model in (await client.get("/models")).json()}
    taken = {name: (each["from_image"], each["mask"], each["max_images_in"]) for name, each in listed.items()}
    assert taken == {
        "sd": (True, True, 0),
        "klein": (False, True, 8),
        "sana": (False, False, 0),
        "unet": (True, False, 0),
    }
