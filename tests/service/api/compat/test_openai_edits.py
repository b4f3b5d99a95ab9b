"""OpenAI's image edits as its own client sends them: files, masks, fields, events, and what is refused."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from giantleap.service.jobs.edits.inputs import read_input
from giantleap.service.jobs.job import GenerateParams
from tests.service.compat_fakes import FileProducer, build_app
from tests.service.live_server import live_server
from tests.service.paper_bundle import write_paper_bundle

PROMPT = "a red sphere on a green floor"
PIXELS = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
HOLE = np.full((96, 128), 255, np.uint8)
HOLE[:, 64:] = 0  # the right half is transparent


def to_png(*channels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.dstack(channels)).save(buffer, format="PNG")
    return buffer.getvalue()


IMAGE, MASK = to_png(PIXELS), to_png(PIXELS, HOLE)
CLASSES = {"sd": "StableDiffusion3Pipeline", "klein": "Flux2KleinPipeline", "prx": "PRXPipeline"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FileProducer, str]]:
    root, producer = tmp_path_factory.mktemp("bundles"), FileProducer()
    dirs = tuple(write_paper_bundle(root / name, name, pipeline_class=kind) for name, kind in CLASSES.items())
    with live_server(build_app(producer, dirs, max_image_px=512 * 512)) as url:
        yield producer, url


@pytest.fixture
def producer(server: tuple[FileProducer, str]) -> FileProducer:
    return server[0].reset()


@pytest.fixture
def client(server: tuple[FileProducer, str], producer: FileProducer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def params_of(producer: FileProducer) -> GenerateParams:
    (job,) = producer.jobs
    assert isinstance(job.params, GenerateParams)
    return job.params


def test_the_transparent_part_of_the_mask_is_drawn_anew(client: openai.OpenAI, producer: FileProducer) -> None:
    response = client.images.edit(image=IMAGE, mask=MASK, prompt=PROMPT, n=2, response_format="b64_json")
    files = [base64.b64decode(image.b64_json or "") for image in response.data or []]
    (job,) = producer.jobs
    assert files == producer.files[job.id] and len(files) == 2
    params = params_of(producer)
    assert (params.mask, params.strength, params.images, params.prompt) == (True, 1.0, 0, PROMPT)
    images = read_input(producer.blobs[job.id], params)
    assert images.mask is not None and images.mask.shape == params.base_size_px[::-1]
    assert images.mask[:, images.mask.shape[1] // 2 :].all() and not images.mask[:, : images.mask.shape[1] // 2].any()


def test_the_result_has_the_shape_of_the_image_unless_a_size_is_named(
    client: openai.OpenAI, producer: FileProducer
) -> None:
    assert str(client.images.edit(image=IMAGE, prompt=PROMPT).size) == "160x96"  # 4 : 3 of 128 x 128 px, on the grid
    assert str(client.images.edit(image=IMAGE, prompt=PROMPT, size="auto", model="klein").size) == "160x96"
    assert str(client.images.edit(image=IMAGE, prompt=PROMPT, size="256x256").size) == "256x256"


def test_several_images_become_references_where_the_bundle_takes_them(
    client: openai.OpenAI, producer: FileProducer
) -> None:
    client.images.edit(model="klein", image=[("a.png", IMAGE), ("b.png", MASK)], prompt=PROMPT)
    params = params_of(producer)
    assert (params.images, params.mask, params.strength) == (2, False, None)
    first, second = read_input(producer.blobs[producer.jobs[0].id], params).references
    np.testing.assert_array_equal(first, PIXELS)
    assert (second[:, 64:] == 255).all(), "transparency is on white"


def test_one_image_without_a_mask_is_where_another_bundle_starts(client: openai.OpenAI, producer: FileProducer) -> None:
    client.images.edit(image=IMAGE, prompt=PROMPT, extra_body={"strength": 0.5, "seed": 7, "scale": 4, "method": "lua"})
    params = params_of(producer)
    assert (params.images, params.mask, params.strength, params.seed, params.scale) == (0, False, 0.5, 7, 4)


def test_the_fields_of_a_generation_are_those_of_an_edit(client: openai.OpenAI, producer: FileProducer) -> None:
    ours = {"num_inference_steps": 3, "guidance_scale": 2.5, "negative_prompt": "floor", "refine": '{"strength": 0.2}'}
    response = client.images.edit(
        image=IMAGE, prompt=PROMPT, size="256x128", output_format="webp", quality="auto", user="me",
        background="opaque", input_fidelity="low", response_format="url", extra_body=ours,
    )  # fmt: skip
    params = params_of(producer)
    assert (params.steps, params.guidance_scale, params.negative_prompt) == (3, 2.5, "floor")
    assert params.refine is not None and params.refine.strength == 0.2 and params.output_format == "webp"
    (image,) = response.data or []
    assert image.b64_json is None and image.url is not None
    assert httpx.get(image.url, timeout=60).content == producer.files[producer.jobs[0].id][0]


def test_a_stream_completes_with_each_image(client: openai.OpenAI, producer: FileProducer) -> None:
    with client.images.edit(image=IMAGE, mask=MASK, prompt=PROMPT, n=2, stream=True) as stream:
        events = list(stream)
    assert [event.type for event in events] == ["image_edit.completed"] * 2
    assert [base64.b64decode(event.b64_json) for event in events] == producer.files[producer.jobs[0].id]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"mask": IMAGE}, "mask", "no transparent area"),
        ({"mask": to_png(PIXELS[:64], HOLE[:64])}, "mask", "send both of one size"),
        ({"image": IMAGE[:60]}, "image", "damaged"),
        ({"image": IMAGE[:60], "size": "128x128"}, "image", "damaged"),
        ({"image": to_png(np.zeros((600, 600, 3), np.uint8))}, "image", "600x600 pixels"),
        ({"image": [IMAGE, IMAGE], "mask": MASK}, "mask", "goes with one image, not 2"),
        ({"image": [IMAGE, IMAGE]}, "image", "bundles that can: klein"),
        ({"image": [IMAGE] * 9, "model": "klein"}, "image", "at most 8"),
        ({"image": IMAGE, "model": "prx"}, "image", "bundles that can: sd"),
        ({"image": IMAGE, "model": "prx", "mask": MASK}, "mask", "bundles that can: sd, klein"),
        ({"image": IMAGE, "model": "klein", "extra_body": {"strength": 0.5}}, "strength", "needs an init_image"),
        ({"model": "dall-e-9"}, "model", "available are sd"),
        ({"prompt": " "}, "prompt", ""),
        ({"n": 5}, "n", ""),
        ({"size": "100x100"}, "size", ""),
        ({"input_fidelity": "high"}, "input_fidelity", ""),
        ({"background": "transparent"}, "background", ""),
        ({"extra_body": {"scale": "four"}}, "scale", ""),
        ({"extra_body": {"refine": "[" * 100_000}}, "refine", ""),
        ({"extra_body": {"shade": "red"}}, "shade", ""),
    ],
    ids=lambda value: None,
)
def test_what_cannot_be_edited_is_refused_with_its_field(
    client: openai.OpenAI, producer: FileProducer, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refusal:
        client.images.edit(**{"image": IMAGE, "prompt": PROMPT} | fields)
    assert refusal.value.param == param and words in str(refusal.value), str(refusal.value)
    assert producer.jobs == []


@pytest.mark.parametrize(
    ("parts", "status", "param"),
    [
        ([("image", (None, "https://example.com/a.png"))], 422, "image"),
        ([("image[]", ("a.png", IMAGE)), ("picture", ("b.png", IMAGE))], 422, "picture"),
        ([("image", ("a.png", IMAGE)), ("mask", ("b.png", MASK)), ("mask", ("c.png", MASK))], 422, "mask"),
        ([("image", ("a.png", IMAGE)), ("n", (None, "1")), ("n", (None, "2"))], 422, "n"),
        ([("n", (None, "1"))], 422, "image"),
        ([("image", ("a.png", IMAGE))] * 18, 400, None),
    ],
    ids=["url", "other file", "two masks", "twice", "no image", "too many"],
)
def test_a_form_of_another_shape_is_refused(
    server: tuple[FileProducer, str], producer: FileProducer, parts: list[Any], status: int, param: str | None
) -> None:
    form = [("prompt", (None, PROMPT)), *parts]
    response = httpx.post(f"{server[1]}/v1/images/edits", files=form, timeout=60)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert producer.jobs == []


def test_a_body_that_is_no_form_is_refused(server: tuple[FileProducer, str], producer: FileProducer) -> None:
    assert httpx.post(f"{server[1]}/v1/images/edits", json={"prompt": PROMPT}, timeout=60).status_code == 415
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    broken = httpx.post(f"{server[1]}/v1/images/edits", content=b"--y", headers=headers, timeout=60)
    assert broken.status_code in (400, 422) and producer.jobs == []


def test_an_edit_is_stored_under_its_key_once(client: openai.OpenAI, producer: FileProducer) -> None:
    key: dict[str, Any] = {"extra_headers": {"Idempotency-Key": "e-1"}, "prompt": PROMPT, "image": IMAGE}
    assert client.images.edit(mask=MASK, **key) == client.images.edit(mask=MASK, **key)
    assert len(producer.records) == 1


def test_the_paths_of_files_stay_out_of_the_job(client: openai.OpenAI, producer: FileProducer, tmp_path: Path) -> None:
    file = tmp_path / "secret-name.png"
    file.write_bytes(IMAGE)
    client.images.edit(image=file, mask=MASK, prompt=PROMPT)
    (job,) = producer.jobs
    assert "secret-name" not in job.to_json() and b"secret-name" not in producer.blobs[job.id]
