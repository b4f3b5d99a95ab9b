"""Previews on the running service: as events of a job, and as partial images of an unmodified OpenAI client."""

import base64
import io
import json
from collections.abc import Iterator

import httpx
import openai
import pytest
from PIL import Image

from giantleap.cli.demo import PROMPT, running_service


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running_service() as url, httpx.Client(base_url=url, timeout=300) as client:
        yield client


def events_of(client: httpx.Client, url: str, last_event_id: str = "") -> list[tuple[str, str, dict[str, object]]]:
    """Id, name and data of each event until the end."""
    with client.stream("GET", url, headers={"Last-Event-ID": last_event_id}) as stream:
        blocks = "".join(stream.iter_text()).split("\n\n")
    fields = [dict(line.split(": ", 1) for line in block.splitlines() if ": " in line) for block in blocks]
    return [(each["id"], each["event"], json.loads(each["data"])) for each in fields if "event" in each]


def size_of(image: object) -> tuple[int, int]:
    opened = Image.open(io.BytesIO(base64.b64decode(str(image))))
    assert opened.format == "JPEG"
    return opened.size


def test_a_job_has_its_previews_and_the_image_of_a_job_without(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "seed": 7, "scale": 2, "num_images": 2}
    plain = client.post("/generate", json=body).json()
    job = client.post("/generate", json=body | {"previews": 3}, headers={"Prefer": "respond-async"}).json()
    events = events_of(client, job["events_url"])
    previews = [(data["index"], data["step"], size_of(data["image"])) for _, name, data in events if name == "preview"]
    assert previews == [(index, step, (128, 128)) for step in (2, 4, 6) for index in (0, 1)]
    assert [name for _, name, _ in events][-1] == "done"
    results = [client.get(f"{each['status_url']}/results").content for each in (job, plain)]
    assert results[0] == results[1], "the same to the bit"
    third = [event_id for event_id, name, _ in events if name == "preview"][2]
    resumed = events_of(client, job["events_url"], third)
    assert resumed == events[[event_id for event_id, _, _ in events].index(third) + 1 :]
    assert client.get("/models").json()[0]["previews"] is True


def test_a_method_that_samples_again_has_previews(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "scale": 2, "method": "demofusion", "steps": 4, "previews": 3}
    job = client.post("/generate", json=body, headers={"Prefer": "respond-async"}).json()
    previews = [data for _, name, data in events_of(client, job["events_url"]) if name == "preview"]
    assert [(each["step"], size_of(each["image"])) for each in previews] == [
        (2, (128, 128)),
        (4, (128, 128)),
        (6, (256, 256)),
    ]


def test_an_unmodified_openai_client_gets_partial_images(client: httpx.Client) -> None:
    url = f"{str(client.base_url).rstrip('/')}/v1"
    with openai.OpenAI(base_url=url, api_key="none", timeout=300) as images:
        plain = images.images.generate(prompt=PROMPT, size="256x256", extra_body={"seed": 7})
        stream = images.images.generate(
            prompt=PROMPT, size="256x256", stream=True, partial_images=2, extra_body={"seed": 7}
        )
        *partials, last = list(stream)
    assert [each.type for each in partials] == ["image_generation.partial_image"] * 2
    assert [each.partial_image_index for each in partials if each.type == "image_generation.partial_image"] == [0, 1]
    assert [size_of(each.b64_json) for each in partials] == [(128, 128)] * 2
    assert plain.data is not None and last.type == "image_generation.completed"
    assert last.b64_json == plain.data[0].b64_json
