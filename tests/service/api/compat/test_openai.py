"""OpenAI's images as its own client asks for them, and what that client does not send."""

import asyncio
import base64
import http.client
import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request

from giantleap.models.bundle.bundle import BundleError
from giantleap.models.pixels.image_formats import FileOptions
from giantleap.service.api.compat.openai import ImagesRequest, stream_generation
from giantleap.service.api.submission import SubmitOptions
from giantleap.service.errors import NotReady, QueueFull
from giantleap.service.jobs.job import GenerateParams, Job, JobEvent, JobState
from giantleap.service.settings import read_settings, to_environment
from tests.service.compat_fakes import STAGES, FileProducer, build_app, read_pixels
from tests.service.fake_producer import expire, fail, stay_queued
from tests.service.live_server import live_server
from tests.waiting import wait_until

PROMPT = "a red sphere on a green floor"
NO_KEY = SubmitOptions(cancel_on_disconnect=True, cancel_on_timeout=True)


@pytest.fixture
def producer(live: tuple[FileProducer, str]) -> FileProducer:
    return live[0].reset()


@pytest.fixture
def url(live: tuple[FileProducer, str], producer: FileProducer) -> str:
    return live[1]


@pytest.fixture(scope="module")
def client(live: tuple[FileProducer, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live[1]}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def params_of(producer: FileProducer) -> GenerateParams:
    params = producer.jobs[-1].params
    assert isinstance(params, GenerateParams)
    return params


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/images/generations", json={"prompt": PROMPT} | body, timeout=60, verify=False)


def assert_error(response: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert (error["code"], error["param"]) == (code, param)
    assert PROMPT not in response.text


def test_images_come_as_base64_with_their_size(client: openai.OpenAI, producer: FileProducer) -> None:
    response = client.images.generate(model="flux", prompt=PROMPT, n=2, size="256x128", output_format="webp", user="me")
    files = [base64.b64decode(image.b64_json or "") for image in response.data or []]
    (job,) = producer.jobs
    assert files == producer.files[job.id] and len(files) == 2 and read_pixels(files[1]).shape == (128, 256, 3)
    assert (response.size, response.output_format, response.background) == ("256x128", "webp", "opaque")
    assert abs(response.created - job.created_at_s) < 60
    assert job.bundle == "flux" and (params_of(producer).prompt, params_of(producer).output_format) == (PROMPT, "webp")


def test_what_is_left_out_takes_the_bundles_defaults(client: openai.OpenAI, producer: FileProducer) -> None:
    response = client.images.generate(prompt=PROMPT, size="auto", quality="standard", background="auto")
    assert str(response.size) == "128x128" and producer.jobs[0].bundle == "paper"
    params = params_of(producer)
    assert (params.scale, params.steps, params.guidance_scale, params.num_images) == (2, 8, 3.0, 1)
    assert (params.output_format, params.method, params.negative_prompt) == ("png", "lua", "")


def test_our_own_fields_reach_the_job(client: openai.OpenAI, producer: FileProducer) -> None:
    ours = {"negative_prompt": "floor", "num_inference_steps": 3, "guidance_scale": 2, "seed": 7, "scale": 4}
    response = client.images.generate(prompt=PROMPT, n=2, extra_body=ours | {"method": "bicubic"})
    params = params_of(producer)
    assert (params.negative_prompt, params.steps, params.guidance_scale) == ("floor", 3, 2.0)
    assert (params.seed, params.scale, params.method, params.width_px) == (7, 4, "bicubic", 256)
    assert [image.seed for image in response.data or []] == [7, 8]  # type: ignore[attr-defined]


def test_an_image_by_url_is_read_from_the_server(client: openai.OpenAI, producer: FileProducer) -> None:
    response = client.images.generate(prompt=PROMPT, n=2, response_format="url", output_format="jpeg")
    for image, file in zip(response.data or [], producer.files[producer.jobs[0].id], strict=True):
        assert image.b64_json is None and image.url is not None
        content = httpx.get(image.url, verify=False)
        assert (content.content, content.headers["content-type"]) == (file, "image/jpeg")
        assert content.headers["x-job-id"] == producer.jobs[0].id


def test_the_models_are_the_bundles(client: openai.OpenAI, producer: FileProducer) -> None:
    assert [(model.id, model.object) for model in client.models.list()] == [("paper", "model"), ("flux", "model")]
    assert client.models.retrieve("flux").id == "flux"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("unknown")


def test_the_answer_has_the_headers_of_a_job(client: openai.OpenAI, producer: FileProducer) -> None:
    raw = client.images.with_raw_response.generate(prompt="a red zeppelin", extra_headers={"X-Request-Id": "r-1"})
    assert raw.headers["x-job-id"] == producer.jobs[0].id and raw.headers["server-timing"] == STAGES
    assert raw.headers["x-request-id"] == "r-1" and "zeppelin" in raw.headers["x-warnings"]


def test_a_repeat_under_the_same_key_is_the_same_job(client: openai.OpenAI, producer: FileProducer) -> None:
    key = {"Idempotency-Key": "k-1"}
    first, second = (client.images.generate(prompt=PROMPT, extra_headers=key) for _ in range(2))
    assert first == second and len(producer.records) == 1


def test_a_deadline_comes_by_header(client: openai.OpenAI, producer: FileProducer) -> None:
    client.images.generate(prompt=PROMPT, extra_headers={"Cancel-After": "9"})
    assert [job.cancel_after_s for job in producer.jobs] == [9.0]
    with pytest.raises(openai.BadRequestError, match="Cancel-After"):
        client.images.generate(prompt=PROMPT, extra_headers={"Cancel-After": "0"})
    producer.end = expire
    with pytest.raises(openai.InternalServerError, match="did not end in time") as raised:
        client.with_options(max_retries=0).images.generate(prompt=PROMPT, extra_headers={"Cancel-After": "1"})
    assert raised.value.status_code == 504 and raised.value.code == "deadline_passed"
    late = {"Cancel-After": "1"}
    with (
        client.images.generate(prompt=PROMPT, stream=True, extra_headers=late) as stream,
        pytest.raises(openai.APIError, match="in time"),
    ):
        list(stream)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": " "}, "prompt"),
        ({"prompt": "x" * 201}, "prompt"),
        ({"model": "dall-e-3"}, "model"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": "2"}, "n"),
        ({"size": "100x100"}, "size"),
        ({"size": "2048x2048"}, "size"),
        ({"size": "large"}, "size"),
        ({"size": "0x64"}, "size"),
        ({"response_format": "file"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_compression": 101, "output_format": "webp"}, "output_compression"),
        ({"quality": "hd"}, "quality"),
        ({"background": "transparent"}, "background"),
        ({"style": "natural"}, "style"),
        ({"moderation": "strict"}, "moderation"),
        ({"partial_images": 1}, "partial_images"),
        ({"stream": True, "partial_images": 4}, "partial_images"),
        ({"stream": True, "response_format": "url"}, "response_format"),
        ({"num_inference_steps": 51}, "num_inference_steps"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"scale": 3}, "scale"),
        ({"method": "swinir"}, "method"),
    ],
)
def test_bad_values_are_named_as_openai_names_them(
    url: str, producer: FileProducer, body: dict[str, Any], param: str
) -> None:
    assert_error(post(url, **body), 422, "invalid_request", param)
    assert not producer.records


def test_limits_hold(url: str, client: openai.OpenAI, producer: FileProducer) -> None:
    with pytest.raises(openai.APIStatusError) as too_large:
        client.images.generate(prompt="x" * (1 << 20))
    assert too_large.value.status_code == 413 and too_large.value.code == "payload_too_large"
    producer.refusal = QueueFull("32 jobs wait", retry_after_s=17)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError, match="32 jobs wait") as full:
            client.images.generate(prompt=PROMPT, stream=stream)
        assert (full.value.type, full.value.code) == ("rate_limit_error", "queue_full")
        assert full.value.response.headers["retry-after"] == "17"
    assert not producer.records


def test_pixels_over_the_limit_are_refused(bundle_dirs: tuple[Path, ...]) -> None:
    producer = FileProducer()
    with live_server(build_app(producer, bundle_dirs, max_image_px=128 * 128)) as url:
        assert_error(post(url, scale=4), 422, "invalid_request", "size")
        assert not producer.records


def test_other_faults_have_the_same_shape(url: str, producer: FileProducer) -> None:
    assert_error(httpx.get(f"{url}/v1/unknown"), 404, "not_found")
    assert_error(httpx.get(f"{url}/v1/images/{uuid.uuid4()}/content"), 404, "not_found")
    assert_error(httpx.get(f"{url}/v1/images/generations"), 405, "method_not_allowed")
    for content, content_type, status, code in (
        (b"{", "application/json", 400, "malformed_request"),
        (b"{}", "text/plain", 415, "unsupported_media_type"),
    ):
        headers = {"Content-Type": content_type}
        response = httpx.post(f"{url}/v1/images/generations", content=content, headers=headers, verify=False)
        assert_error(response, status, code)
    producer.outage = NotReady("Redis cannot be reached")
    assert_error(post(url), 503, "not_ready")
    assert post(url).json()["error"]["type"] == "server_error"


def test_a_failed_job_is_the_clients_exception(client: openai.OpenAI, producer: FileProducer) -> None:
    producer.end = fail
    with pytest.raises(openai.InternalServerError, match="out of memory") as failed:
        client.images.generate(prompt=PROMPT)
    assert failed.value.code == "engine_fault" and failed.value.response.headers["x-job-id"] == producer.jobs[0].id


def test_a_stream_completes_with_each_image(client: openai.OpenAI, producer: FileProducer) -> None:
    with client.images.generate(prompt=PROMPT, n=2, stream=True, size="256x128") as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        events = list(stream)
    assert stream.response.headers["x-job-id"] == producer.jobs[0].id
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert [base64.b64decode(event.b64_json) for event in events] == producer.files[producer.jobs[0].id]
    assert {(event.size, event.output_format, event.background) for event in events} == {("256x128", "png", "opaque")}


def test_a_bundle_without_previews_refuses_partial_images(url: str, producer: FileProducer) -> None:
    answer = post(url, stream=True, partial_images=2)
    assert_error(answer, 422, "invalid_request", "partial_images")
    assert "no [tiny_vae] and no [preview]" in answer.text and not producer.jobs
    assert post(url, stream=True, partial_images=0).status_code == 200


async def test_previews_come_as_partial_images_before_the_image(bundle_dirs: tuple[Path, ...]) -> None:
    previews = [{"index": index, "step": step, "image": f"{index}{step}"} for step in (1, 2) for index in (0, 1)]
    producer = FileProducer(event_list=[JobEvent(f"{n}-0", "preview", data) for n, data in enumerate(previews, 1)])
    app = build_app(producer, bundle_dirs)
    job = await enqueue(app, producer)
    assert isinstance(job.params, GenerateParams)
    with_previews = replace(job, params=replace(job.params, previews=2, num_images=2))
    blocks = stream_generation(request_of(), app.state.giantleap, with_previews, NO_KEY, heartbeat_s=60.0)
    partials = [json.loads((await anext(blocks)).partition("data: ")[2]) for _ in previews]
    assert {each["type"] for each in partials} == {"image_generation.partial_image"}
    assert [each["b64_json"] for each in partials] == ["01", "11", "02", "12"]
    assert [(each["image_index"], each["partial_image_index"]) for each in partials] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    producer.records[job.id] = producer.work(job)
    rest = [block async for block in blocks if not block.startswith(":")]
    assert [block.splitlines()[0] for block in rest] == ["event: image_generation.completed"]
    assert producer.open_events == 0 and producer.waits == 0


def test_a_stream_waits_until_the_job_ends(client: openai.OpenAI, producer: FileProducer) -> None:
    producer.end = stay_queued
    with client.images.generate(prompt=PROMPT, stream=True) as stream:
        (job,) = producer.jobs
        producer.records[job.id] = producer.work(job)
        (event,) = stream
    assert base64.b64decode(event.b64_json) == producer.files[job.id][0]


def test_a_stream_of_a_failed_job_raises_in_the_client(client: openai.OpenAI, producer: FileProducer) -> None:
    producer.end = fail
    with client.images.generate(prompt=PROMPT, stream=True) as stream, pytest.raises(openai.APIError, match="memory"):
        list(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_job(url: str, producer: FileProducer, stream: bool) -> None:
    producer.end = stay_queued
    leaving = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    body = json.dumps({"prompt": PROMPT, "stream": stream})
    leaving.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    wait_until(lambda: producer.waits == 1)
    leaving.close()
    wait_until(lambda: producer.records[producer.jobs[0].id].state is JobState.CANCELED, "its job is canceled")
    wait_until(lambda: producer.waits == 0, "nobody waits any more")
    assert [record.state for record in producer.records.values()] == [JobState.CANCELED]


def test_a_client_with_a_key_may_leave_and_come_back(url: str, producer: FileProducer) -> None:
    producer.end = stay_queued
    with (
        httpx.Client(timeout=60, verify=False, headers={"Idempotency-Key": "k-2"}) as client,
        client.stream("POST", f"{url}/v1/images/generations", json={"prompt": PROMPT, "stream": True}),
    ):
        wait_until(lambda: producer.waits == 1)
    wait_until(lambda: producer.waits == 0)
    assert [record.state for record in producer.records.values()] == [JobState.QUEUED]


async def test_a_silent_stream_sends_comments_until_the_image(bundle_dirs: tuple[Path, ...]) -> None:
    producer = FileProducer()
    app = build_app(producer, bundle_dirs)
    job = await enqueue(app, producer)
    blocks = stream_generation(request_of(), app.state.giantleap, job, NO_KEY, heartbeat_s=0.01)
    assert [await anext(blocks) for _ in range(2)] == [": waiting\n\n"] * 2
    producer.records[job.id] = producer.work(job)
    rest = [block async for block in blocks if not block.startswith(":")]
    assert len(rest) == 1 and rest[0].startswith("event: image_generation.completed\ndata: {")


async def test_a_stream_ends_with_the_deadline(bundle_dirs: tuple[Path, ...]) -> None:
    producer = FileProducer()
    app = build_app(producer, bundle_dirs, wait_timeout_s=0.05)
    job = await enqueue(app, producer)
    *_, last = [block async for block in stream_generation(request_of(), app.state.giantleap, job, NO_KEY)]
    name, data, *_ = last.splitlines()
    assert name == "event: error" and json.loads(data.removeprefix("data: "))["error"]["code"] == "deadline_passed"
    assert producer.records[job.id].state is JobState.CANCELED


def request_of() -> Request:
    """A request of a client that stays."""

    async def nothing_comes() -> Any:
        await asyncio.Event().wait()

    request = Request({"type": "http", "path": "/v1/images/generations", "headers": []}, nothing_comes)
    request.state.request_id = "r"
    return request


async def enqueue(app: FastAPI, producer: FileProducer) -> Job:
    """A job that nobody runs."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        await client.post("/generate", json={"prompt": PROMPT}, headers={"Prefer": "respond-async"})
    (job,) = producer.jobs
    producer.records[job.id] = stay_queued(job)
    return job


OPTIONAL = tuple(name for name, field in ImagesRequest.model_fields.items() if not field.is_required())
DEFAULTS = {
    "model": "paper", "n": 1, "size": "auto", "quality": "auto", "background": "auto", "moderation": "auto",
    "output_compression": 100, "output_format": "png", "style": "vivid", "stream": False, "user": "u",
    "safety_identifier": "s", "response_format": "b64_json",
}  # fmt: skip


@pytest.mark.parametrize(
    ("body", "quality"),
    [
        ({"output_format": "jpeg"}, None),
        ({"output_format": "jpeg", "output_compression": 100}, 100),
        ({"output_format": "webp", "output_compression": 50}, 50),
        ({"output_format": "webp", "output_compression": 0}, 1),
        ({"output_compression": 100}, None),
    ],
)
def test_output_compression_is_the_quality(
    url: str, producer: FileProducer, body: dict[str, Any], quality: int | None
) -> None:
    assert post(url, **body, compression="small").status_code == 200
    assert params_of(producer).file == FileOptions("small", quality)


def test_every_optional_field_may_be_null(url: str, producer: FileProducer) -> None:
    assert len(OPTIONAL) >= 18
    assert post(url, **dict.fromkeys(OPTIONAL)).status_code == 200
    for name in OPTIONAL:
        assert post(url, **{name: None}).status_code == 200, name


def test_defaults_that_change_nothing_are_taken(url: str, producer: FileProducer) -> None:
    for name, value in DEFAULTS.items():
        assert post(url, **{name: value}).status_code == 200, name
    assert post(url, **DEFAULTS).status_code == 200
    assert not {"s", "u"} & {value for job in producer.jobs for value in job.to_json().split('"')}, "not stored"


def test_where_no_form_is_requested_both_come(url: str, producer: FileProducer) -> None:
    (image,) = post(url).json()["data"]
    assert httpx.get(image["url"], timeout=60).content == base64.b64decode(image["b64_json"])
    assert set(post(url, response_format="b64_json").json()["data"][0]) == {"b64_json", "seed"}
    assert set(post(url, response_format="url").json()["data"][0]) == {"url", "seed"}


def test_an_alias_is_a_bundle_in_every_protocol(bundle_dirs: tuple[Path, ...]) -> None:
    producer = FileProducer()
    app = build_app(producer, bundle_dirs, model_aliases="dall-e-3=paper, gpt-image-1 = flux")
    with live_server(app) as url:
        models = {each["id"] for each in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]}
        assert models == {"paper", "flux", "dall-e-3", "gpt-image-1"}
        assert httpx.get(f"{url}/v1/models/gpt-image-1", timeout=60).json()["id"] == "gpt-image-1"
        for path, body in (("/v1/images/generations", {"model": "gpt-image-1"}), ("/generate", {"bundle": "dall-e-3"})):
            assert httpx.post(f"{url}{path}", json={"prompt": "a"} | body, timeout=60).status_code == 200
        assert httpx.get(f"{url}/v2/models/dall-e-3/ready", timeout=60).status_code == 200
    assert [job.bundle for job in producer.jobs] == ["flux", "paper"]
    for wrong in ("dall-e-3=none", "paper=flux"):
        with pytest.raises(BundleError, match="model_aliases"):
            build_app(producer, bundle_dirs, model_aliases=wrong)


def test_aliases_reach_child_processes_and_are_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    given = read_settings(model_aliases="dall-e-3=pocket,gpt-image-1=pocket")
    for name, value in to_environment(given).items():
        monkeypatch.setenv(name, value)
    assert read_settings().model_aliases == {"dall-e-3": "pocket", "gpt-image-1": "pocket"}
    monkeypatch.setenv("GIANTLEAP_MODEL_ALIASES", "dall-e-3")
    with pytest.raises(ValueError, match="pairs as dall-e-3=pocket"):
        read_settings()
