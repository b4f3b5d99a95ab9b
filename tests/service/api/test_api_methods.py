"""Methods, decodes and images over HTTP: what a bundle has becomes a job, what it lacks is refused and named."""

import base64
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from giantleap.models.bundle.descriptor import METHODS
from giantleap.service.api.app import create_app
from giantleap.service.jobs.job import GenerateParams, UpscaleParams
from giantleap.service.settings import read_settings
from tests.service.fake_producer import FakeProducer
from tests.service.paper_bundle import write_paper_bundle

PIXELS = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)


def to_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


PNG = to_png(PIXELS)
TEXT = base64.b64encode(PNG).decode()


@pytest.fixture(scope="module")
def bundle_dirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    root = tmp_path_factory.mktemp("bundles")
    plain = write_paper_bundle(root / "plain", "plain", pipeline_class="Flux2KleinPipeline")
    toml = (plain / "bundle.toml").read_text()
    start, end = toml.index("[lua]"), toml.index("[defaults]")
    (plain / "bundle.toml").write_text(
        (toml[:start] + toml[end:])
        .replace("max_direct_px = 256\n", "")
        .replace("[limits]", 'method = "bicubic"\n[limits]')
    )
    return write_paper_bundle(root / "paper"), plain


@pytest.fixture
def producer() -> FakeProducer:
    return FakeProducer()


@pytest.fixture
async def client(bundle_dirs: tuple[Path, ...], producer: FakeProducer) -> AsyncIterator[httpx.AsyncClient]:
    settings = read_settings(bundle=bundle_dirs, max_body_bytes=1 << 20, max_image_px=512 * 512)
    app = create_app(settings, producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        yield client


async def generate(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/generate", json={"prompt": "a red sphere", **fields})


async def upscale(
    client: httpx.AsyncClient, body: bytes = PNG, kind: str = "image/png", **query: Any
) -> httpx.Response:
    return await client.post("/upscale", params=query, content=body, headers={"Content-Type": kind})


def assert_refused(response: httpx.Response, field: str, *words: str) -> None:
    assert response.status_code == 422, response.text
    assert [error["field"] for error in response.json()["errors"]] == [field]
    assert all(word in response.json()["detail"] for word in words), response.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "base_px", "final_px"),
    [
        ({"method": "lua", "scale": 2}, (64, 64), (128, 128)),
        ({"method": "bicubic", "scale": 4}, (64, 64), (256, 256)),
        ({"method": "direct", "scale": 4}, (256, 256), (256, 256)),
        ({"method": "demofusion", "scale": 4}, (64, 64), (256, 256)),
        ({"method": "lsrna", "width": 256, "height": 128}, (128, 64), (256, 128)),
        ({"method": "direct", "width": 208, "height": 48}, (208, 48), (208, 48)),
        ({}, (64, 64), (128, 128)),
    ],
)
async def test_a_method_reaches_the_job_and_is_named_in_the_answer(
    client: httpx.AsyncClient,
    producer: FakeProducer,
    fields: dict[str, Any],
    base_px: tuple[int, int],
    final_px: tuple[int, int],
) -> None:
    response = await generate(client, **fields)
    (job,) = producer.jobs
    assert isinstance(job.params, GenerateParams)
    assert job.params.base_size_px == base_px and (job.params.width_px, job.params.height_px) == final_px
    assert job.params.method == response.headers["x-method"] == response.json()["method"] == fields.get("method", "lua")


async def test_a_method_that_is_not_there_is_refused_with_the_reason(
    client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    assert_refused(await generate(client, method="swinir"), "method", "no SwinIR weights", "lua, direct, bicubic")
    assert_refused(await generate(client, bundle="plain", method="lua"), "method", "no LUA weights")
    assert_refused(await generate(client, bundle="plain", method="direct"), "method", "max_direct_px")
    assert_refused(await generate(client, method="magic"), "method")
    assert_refused(await upscale(client, method="direct"), "method")
    assert producer.jobs == []
    assert (await generate(client, bundle="plain")).json()["method"] == "bicubic", "the descriptor's own default"


async def test_the_bundles_say_what_they_have(client: httpx.AsyncClient) -> None:
    paper, plain = (await client.get("/models")).json()
    assert paper["methods"] == {method: [1, 2, 4] for method in METHODS if method != "swinir"}
    assert list(paper["unavailable"]) == ["swinir"] and (paper["method"], plain["method"]) == ("lua", "bicubic")
    assert set(plain["unavailable"]) == set(METHODS) - {"bicubic"} and plain["methods"] == {"bicubic": [1, 2, 4]}
    assert "this is a Flux2KleinPipeline" in plain["unavailable"]["demofusion"]
    assert paper["decodes"] == ["exact", "tiled"] and (paper["from_image"], plain["from_image"]) == (True, False)


async def test_a_unet_that_a_method_cannot_serve_is_refused_before_the_queue(
    tmp_path: Path, producer: FakeProducer
) -> None:
    directory = write_paper_bundle(tmp_path / "flat")
    (directory / "pipeline" / "unet").mkdir()
    config = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "sample_size": None}
    (directory / "pipeline" / "unet" / "config.json").write_text(json.dumps(config))
    app = create_app(read_settings(bundle=(directory,)), producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        assert_refused(await generate(client, method="hidiffusion"), "method", "last level", "lua", "scalecrafter")
        assert_refused(await generate(client, method="demofusion"), "method", "sample_size")
        (models,) = (await client.get("/models")).json()
        assert {"hidiffusion", "demofusion", "lsrna"} <= models["unavailable"].keys()
        assert (await generate(client, method="scalecrafter")).status_code == 200
    assert [job.params.method for job in producer.jobs] == ["scalecrafter"]


async def test_what_a_method_that_draws_again_cannot_do_is_refused(
    client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    assert_refused(await generate(client, method="hidiffusion", bundle="plain"), "method", "inside a UNet", "bicubic")
    assert_refused(await generate(client, method="rectifiedhr", steps=2, scale=4), "steps", "needs 3")
    assert_refused(await generate(client, method="lsrna", steps=1), "steps", "needs 2")
    assert_refused(await generate(client, method="demofusion", init_image=TEXT), "init_image", "starts from noise")
    assert_refused(await generate(client, method="scalecrafter", width=1024), "width", "nearest")
    assert producer.jobs == []


async def test_a_negative_prompt_is_refused_where_the_pipeline_takes_none(
    client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    assert_refused(await generate(client, bundle="plain", negative_prompt="red"), "negative_prompt", "leave it out")
    assert producer.jobs == []
    for fields in ({"negative_prompt": "red"}, {"bundle": "plain", "negative_prompt": ""}):
        assert (await generate(client, **fields)).status_code == 200


async def test_sizes_of_a_method_are_its_own(client: httpx.AsyncClient) -> None:
    assert_refused(await generate(client, method="direct", width=100, height=64), "width", "96x64 and 112x64")
    assert_refused(await generate(client, method="direct", width=512, height=64), "width", "256")
    assert_refused(await generate(client, method="lua", width=130, height=128), "width", "128x128 and 160x128")


async def test_a_decode_that_changes_the_image_is_labeled(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    response = await generate(client, decode="tiled")
    assert response.headers["x-decode"] == response.json()["decode"] == producer.jobs[0].params.decode == "tiled"
    assert_refused(await generate(client, decode="tiny"), "decode", "exact, tiled")
    assert_refused(await upscale(client, decode="tiny"), "decode")


@pytest.mark.parametrize(("kind", "body"), [("image/png", PNG), ("application/octet-stream", PNG)])
async def test_an_image_becomes_a_job_of_whole_latents(
    client: httpx.AsyncClient, producer: FakeProducer, kind: str, body: bytes
) -> None:
    response = await upscale(client, body, kind, scale=4, output_format="jpeg")
    (job,) = producer.jobs
    assert response.status_code == 200 and isinstance(job.params, UpscaleParams)
    assert (job.params.image_width_px, job.params.image_height_px) == (70, 45)
    assert (job.params.latent_width, job.params.latent_height, job.params.method) == (9, 6, "lua")
    assert producer.blobs[job.id] == PNG


async def test_an_image_may_come_as_the_one_file_of_a_form(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    good = await client.post("/upscale", files={"image": ("a.png", PNG, "image/png")})
    assert good.status_code == 200 and producer.blobs[producer.jobs[0].id] == PNG
    two = [("image", ("a.png", PNG, "image/png")), ("image", ("b.png", PNG, "image/png"))]
    for bad in (
        await client.post("/upscale", files=two),
        await client.post("/upscale", content=b"--x", headers={"Content-Type": "multipart/form-data; boundary=x"}),
        await client.post("/upscale", content=b"x", headers={"Content-Type": "multipart/form-data"}),
    ):
        assert bad.status_code == 400 and bad.json()["code"] == "malformed_request"
    large = await client.post("/upscale", files={"image": ("a.png", bytes(1 << 20), "image/png")})
    assert large.status_code == 413 and len(producer.jobs) == 1


async def test_options_may_be_fields_of_the_form(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    async def send(target: str, **fields: str) -> httpx.Response:
        return await client.post(target, files={"image": ("a.png", PNG, "image/png")}, data=fields)

    for target in ("/upscale", "/upscale?output_format=jpeg"):
        assert (await send(target, scale="4", method="bicubic")).status_code == 200
    params = [job.params for job in producer.jobs]
    assert [(each.scale, each.method, each.output_format) for each in params] == [
        (4, "bicubic", "png"), (4, "bicubic", "jpeg"),
    ]  # fmt: skip
    assert_refused(await send("/upscale", shade="red"), "shade", "is not a known field")
    assert_refused(await send("/upscale?scale=2", scale="4"), "scale", "is in the query too")
    assert_refused(await send("/upscale", scale="four"), "scale", "must be a number")
    assert len(producer.jobs) == 2


async def test_images_are_refused_before_anything_is_queued(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    assert_refused(await upscale(client, scaled=True), "scaled", "image")
    assert_refused(await upscale(client, latent_space="paper"), "latent_space")
    assert_refused(await upscale(client, width=64, height=64), "width")
    assert_refused(await upscale(client, to_png(np.zeros((300, 300, 3), np.uint8))), "body", "pixels")
    assert (await upscale(client, to_png(np.zeros((600, 600, 3), np.uint8)), scale=1)).status_code == 413
    assert (await upscale(client, PNG[:50])).status_code == 400
    assert (await upscale(client, PNG, "image/gif")).status_code == 415
    assert producer.jobs == []


async def test_a_drawing_starts_from_an_image_at_the_base_size(
    client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    response = await generate(client, init_image=TEXT, strength=0.5, width=192, height=128)
    (job,) = producer.jobs
    assert response.status_code == 200 and isinstance(job.params, GenerateParams) and job.params.strength == 0.5
    with Image.open(io.BytesIO(producer.blobs[job.id])) as kept:
        assert kept.format == "PNG" and kept.size == job.params.base_size_px == (96, 64)
        expected = Image.fromarray(PIXELS).resize((96, 64), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(np.asarray(kept), np.asarray(expected))
    await generate(client, init_image=f"data:image/png;base64,{TEXT}")
    assert producer.jobs[1].params.strength == 0.6  # type: ignore[union-attr]


async def test_a_start_that_cannot_be_used_is_refused(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    assert_refused(await generate(client, strength=0.5), "strength", "init_image")
    assert_refused(await generate(client, init_image=TEXT, strength=0.1, steps=8), "strength", "no step")
    assert_refused(await generate(client, init_image="no base64!"), "init_image", "base64")
    assert_refused(await generate(client, init_image=base64.b64encode(PNG[:40]).decode()), "init_image", "damaged")
    assert_refused(await generate(client, init_image=TEXT, bundle="plain"), "init_image", "starts from noise")
    assert_refused(await generate(client, init_image=TEXT, strength=0), "strength")
    assert producer.jobs == []
