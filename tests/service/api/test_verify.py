"""POST /verify: what an image carries, as JSON; bad files are problems."""

from collections.abc import AsyncIterator

import httpx
import numpy as np
import pytest
import torch

from giantleap.models.pixels.images import to_image_bytes
from giantleap.models.provenance.marker import ImageMarker
from giantleap.models.provenance.watermark import add_watermark
from giantleap.models.provenance.xmp import GENERATED, Origin
from giantleap.service.api.app import create_app
from giantleap.service.settings import read_settings
from tests.service.fake_producer import FakeProducer

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
IMAGE = ImageMarker().to_file(PIXELS, "webp", Origin())


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(read_settings(max_image_px=512 * 512), FakeProducer())  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        yield client


async def test_a_body_and_a_form_are_read_alike(client: httpx.AsyncClient) -> None:
    by_body = await client.post("/verify", content=IMAGE, headers={"Content-Type": "image/webp"})
    by_form = await client.post("/verify", files={"image": ("a.webp", IMAGE, "image/webp")})
    assert by_body.status_code == by_form.status_code == 200 and by_body.json() == by_form.json()
    body = by_body.json()
    assert body["generated"] is True and body["manifest"]["state"] == "none"
    assert body["xmp"]["digital_source_type"] == GENERATED and body["xmp"]["creator_tool"].startswith("Giantleap ")


async def test_a_mark_in_the_pixels_alone_is_reported(client: httpx.AsyncClient) -> None:
    marked = torch.from_numpy(add_watermark(np.full((256, 256, 3), 90, np.uint8), 4711))
    answer = await client.post(
        "/verify", content=to_image_bytes(marked, "jpeg"), headers={"Content-Type": "image/jpeg"}
    )
    body = answer.json()
    assert body["generated"] is True and body["watermark"]["number"] == 4711 and body["watermark"]["score"] > 10
    assert body["xmp"]["digital_source_type"] is None
    plain = await client.post("/verify", content=IMAGE, headers={"Content-Type": "image/webp"})
    assert plain.json()["watermark"] is None


@pytest.mark.parametrize(
    ("content", "code", "status"),
    [
        (b"", "malformed_request", 400),
        (IMAGE[:500], "malformed_request", 400),
        (b"GIF89a", "unsupported_media_type", 415),
    ],
)
async def test_what_is_no_whole_image_is_a_problem(
    client: httpx.AsyncClient, content: bytes, code: str, status: int
) -> None:
    answer = await client.post("/verify", content=content, headers={"Content-Type": "application/octet-stream"})
    assert answer.status_code == status and answer.json()["code"] == code


async def test_fields_beside_the_image_are_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/verify", files={"image": IMAGE}, data={"strict": "1"})
    assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == "strict"
