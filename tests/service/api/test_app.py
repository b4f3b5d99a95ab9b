"""The HTTP contract, over a producer in memory: a request becomes a job, the job a response, a fault a problem."""

import asyncio
import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from safetensors.numpy import load, save

from giantleap.models.bundle.bundle import BundleError
from giantleap.models.latent_space import LATENT_SPACES
from giantleap.models.worker_role import WorkerRole
from giantleap.service.api.app import _add_middlewares, create_app
from giantleap.service.errors import NotReady, QueueFull, StorageFull
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.job import Job, JobState, Priority
from giantleap.service.settings import Settings, read_settings
from tests.service.fake_producer import IMAGE, FakeProducer, fail, stay_queued, succeed
from tests.service.paper_bundle import BASE_PX, CHANNELS

PROMPT = "a red sphere on a green floor"
FRONTS = ("/v1/", "/v2", "/remote_vae/")  # tests/service/api/compat/
ASYNC = {"Prefer": "respond-async"}
SAFETENSORS = {"Content-Type": "application/x-safetensors"}
LATENT = np.random.default_rng(0).standard_normal((CHANNELS, 4, 6)).astype(np.float32)


@pytest.fixture
def settings(bundle_dirs: tuple[Path, ...]) -> Settings:
    return read_settings(bundle=bundle_dirs, max_body_bytes=1 << 21, max_prompt_chars=200, max_image_px=512 * 512)


@pytest.fixture
def producer() -> FakeProducer:
    return FakeProducer()


@pytest.fixture
def app(settings: Settings, producer: FakeProducer) -> FastAPI:
    return create_app(settings, producer)  # type: ignore[arg-type]


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        yield client


async def generate(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return await client.post("/generate", json={"prompt": PROMPT, **fields}, headers=headers)


async def upscale(
    client: httpx.AsyncClient, latent: np.ndarray = LATENT, headers: dict[str, str] | None = None, **query: Any
) -> httpx.Response:
    sent = SAFETENSORS | (headers or {})
    return await client.post("/upscale", params=query, content=save({"latent": latent}), headers=sent)


def assert_problem(response: httpx.Response, status: int, code: str, field: str | None = None) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert (body["status"], body["code"], body["instance"]) == (status, code, response.headers["x-request-id"])
    assert PROMPT not in response.text
    if field is not None:
        assert field in [error["field"] for error in body["errors"]], body


# --- generate: what runs


async def test_what_is_left_out_takes_the_bundles_defaults(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    response = await generate(client)
    assert response.status_code == 200
    (job,) = producer.jobs
    assert job.bundle == "paper" and job.priority is Priority.HIGH and uuid.UUID(job.id).version == 4
    params = dataclasses.asdict(job.params)
    seed = params.pop("seed")
    assert 0 <= seed < 2**53 and response.headers["x-seed"] == str(seed) == str(response.json()["seed"])
    assert params == {
        "prompt": PROMPT,
        "negative_prompt": "",
        "scale": 2,
        "width_px": 2 * BASE_PX,
        "height_px": 2 * BASE_PX,
        "steps": 8,
        "guidance_scale": 3.0,
        "num_images": 1,
        "output_format": "png",
        "method": "lua",
        "decode": "exact",
        "strength": None,
        "refine": None,
        "embed_parameters": False,
        "loras": (),
        "mask": False,
        "images": 0,
        "previews": 0,
        "file": {"compression": "fast", "quality": None},
        "kind": "generate",
    }


async def test_every_field_reaches_the_job(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    fields: dict[str, Any] = {
        "negative_prompt": "floor",
        "scale": 4,
        "width": 256,
        "height": 128,
        "steps": 3,
        "guidance_scale": 0.5,
        "seed": 2**63 - 1,
        "num_images": 2,
        "output_format": "webp",
        "compression": "small",
        "quality": 80,
    }
    assert (await generate(client, **fields, bundle="flux", priority="low")).status_code == 200
    (job,) = producer.jobs
    params = dataclasses.asdict(job.params)
    params |= params["file"] | {"width": params["width_px"], "height": params["height_px"]}
    assert {name: params[name] for name in fields} == fields
    assert job.bundle == "flux" and job.priority is Priority.LOW


async def test_seeds_are_drawn_anew_for_each_job(client: httpx.AsyncClient) -> None:
    seeds = {(await generate(client)).headers["x-seed"] for _ in range(8)}
    assert len(seeds) == 8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", "  \n"),
        ("prompt", 3),
        ("prompt", None),
        ("prompt", "x" * 201),
        ("negative_prompt", "x" * 201),
        ("scale", 3),
        ("scale", 0),
        ("scale", "2"),
        ("scale", 2.5),
        ("width", 100),
        ("width", 0),
        ("width", 2048),
        ("height", 31),
        ("height", -64),
        ("steps", 0),
        ("steps", 51),
        ("steps", True),
        ("guidance_scale", -0.1),
        ("guidance_scale", 1e9),
        ("guidance_scale", "3"),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
        ("num_images", 0),
        ("num_images", 5),
        ("bundle", "unknown"),
        ("output_format", "gif"),
        ("compression", "best"),
        ("quality", 0),
        ("quality", 101),
        ("quality", 80),
        ("priority", "urgent"),
        ("stepss", 3),
    ],
)
async def test_bad_values_are_named_and_enqueue_nothing(
    client: httpx.AsyncClient, producer: FakeProducer, field: str, value: Any
) -> None:
    response = await generate(client, **{field: value})
    assert_problem(response, 422, "invalid_request", field)
    assert not producer.records


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
async def test_guidance_must_be_finite(client: httpx.AsyncClient, producer: FakeProducer, number: str) -> None:
    body = f'{{"prompt": "a", "guidance_scale": {number}}}'
    response = await client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert_problem(response, 422, "invalid_request", "guidance_scale")
    assert not producer.records


async def test_several_bad_values_are_named_at_once(client: httpx.AsyncClient) -> None:
    response = await generate(client, steps=51, num_images=5, width=100)
    assert {error["field"] for error in response.json()["errors"]} == {"steps", "num_images", "width"}


async def test_a_size_out_of_reach_names_the_nearest(client: httpx.AsyncClient) -> None:
    assert "128x128" in (await generate(client, width=130, height=130)).json()["detail"]


async def test_images_over_the_pixel_limit_are_refused(settings: Settings, producer: FakeProducer) -> None:
    app = create_app(settings.model_copy(update={"max_image_px": 128 * 128}), producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        assert (await generate(client, scale=2)).status_code == 200
        assert_problem(await generate(client, scale=4), 422, "invalid_request", "width")


@pytest.mark.parametrize("content", [b"{", b"not json", b'{"prompt": "a"', b"\xff"])
async def test_bodies_that_are_no_json_are_malformed(client: httpx.AsyncClient, content: bytes) -> None:
    response = await client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert_problem(response, 400, "malformed_request")


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_another_content_type_is_unsupported(client: httpx.AsyncClient, content_type: str) -> None:
    body = json.dumps({"prompt": PROMPT}).encode()
    response = await client.post("/generate", content=body, headers={"Content-Type": content_type})
    assert_problem(response, 415, "unsupported_media_type")


async def test_a_body_over_the_limit_is_refused(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    response = await generate(client, prompt="x" * (1 << 21))
    assert_problem(response, 413, "payload_too_large")
    assert not producer.records


async def test_unknown_words_are_warnings_and_not_errors(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    response = await generate(client, prompt="a red zeppelin, naïve", negative_prompt="gloom")
    warnings = response.json()["warnings"]
    assert all(any(word in warning for warning in warnings) for word in ("zeppelin", "naïve", "gloom"))
    assert not any("'red'" in warning for warning in warnings)
    image = await generate(client, prompt="a red naïve", headers={"Accept": "image/png"})
    assert any("naïve" in warning for warning in json.loads(image.headers["x-warnings"]))
    assert "x-warnings" not in (await generate(client, headers={"Accept": "image/png"})).headers


async def test_warnings_of_a_long_prompt_fit_a_header(client: httpx.AsyncClient) -> None:
    words = " ".join(chr(0x4E00 + index) * 5 for index in range(33))
    response = await generate(client, prompt=words, headers={"Accept": "image/png"})
    assert len(response.headers["x-warnings"]) <= 2048 and json.loads(response.headers["x-warnings"])
    assert len((await generate(client, prompt=words)).json()["warnings"]) == 33


# --- generate: how it is answered


async def test_the_job_is_answered_by_default(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    response = await generate(client, seed=7, num_images=2)
    body, (job,) = response.json(), producer.jobs
    url = f"/jobs/{job.id}"
    assert response.headers["x-job-id"] == body["id"] == job.id
    assert body["status"] == "succeeded" and body["kind"] == "generate" and body["error"] is None
    assert body["stages"] == {"queue": 0.25, "generate": 1.0, "upscale": 0.25, "decode": 0.125, "encode": 0.125}
    assert [result["seed"] for result in body["results"]] == [7, 8]
    assert [result["url"] for result in body["results"]] == [f"{url}/result?index=0", f"{url}/result?index=1"]
    assert (body["status_url"], body["events_url"], body["cancel_url"]) == (url, f"{url}/events", f"{url}/cancel")
    assert body["created_at"].endswith("Z") and body["created_at"] < body["started_at"] < body["finished_at"]
    assert PROMPT not in response.text


async def test_stage_times_are_sent_in_milliseconds(client: httpx.AsyncClient) -> None:
    timing = (await generate(client)).headers["server-timing"]
    assert timing == "queue;dur=250.0, generate;dur=1000.0, upscale;dur=250.0, decode;dur=125.0, encode;dur=125.0"


@pytest.mark.parametrize(
    ("accept", "output_format", "sent"),
    [
        ("image/*", None, "image/png"),
        ("image/webp", None, "image/webp"),
        ("image/*", "jpeg", "image/jpeg"),
        ("image/jpeg", "jpeg", "image/jpeg"),
    ],
)
async def test_an_image_is_answered_where_accept_asks(
    client: httpx.AsyncClient, producer: FakeProducer, accept: str, output_format: str | None, sent: str
) -> None:
    response = await generate(client, {"Accept": accept}, output_format=output_format, seed=9)
    assert (response.status_code, response.headers["content-type"], response.content) == (200, sent, IMAGE)
    assert response.headers["x-seed"] == "9" and response.headers["x-job-id"] == producer.jobs[0].id
    assert response.headers["server-timing"].startswith("queue;dur=") and "Accept" in response.headers["vary"]


@pytest.mark.parametrize(
    ("accept", "fields", "status", "code"),
    [
        ("text/html", {}, 406, "not_acceptable"),
        ("image/png", {"output_format": "webp"}, 406, "not_acceptable"),
        ("image/gif", {}, 406, "not_acceptable"),
        ("image/*", {"num_images": 2}, 422, "invalid_request"),
    ],
)
async def test_an_answer_that_cannot_be_given_enqueues_nothing(
    client: httpx.AsyncClient, producer: FakeProducer, accept: str, fields: dict[str, Any], status: int, code: str
) -> None:
    assert_problem(await generate(client, {"Accept": accept}, **fields), status, code)
    assert not producer.records


async def test_respond_async_answers_at_once(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    producer.end = stay_queued
    response = await generate(client, ASYNC)
    (job,) = producer.jobs
    assert response.status_code == 202
    assert response.headers["location"] == f"/jobs/{job.id}" == response.json()["status_url"]
    assert response.headers["preference-applied"] == "respond-async"
    assert response.json()["status"] == "queued" and response.json()["queue_position"] == 0


async def test_wait_answers_the_job_after_so_many_seconds(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    producer.end = stay_queued
    response = await generate(client, {"Prefer": "wait=1", "Accept": "image/png"})
    assert response.status_code == 202 and response.headers["preference-applied"] == "wait=1"
    assert response.json()["queue_position"] == 3 and "location" in response.headers
    producer.end = succeed
    finished = await generate(client, {"Prefer": "wait=1", "Accept": "image/png"})
    assert finished.status_code == 200 and finished.headers["preference-applied"] == "wait=1"


async def test_a_wait_that_is_too_long_ends_in_504_and_the_job_goes_on(
    settings: Settings, producer: FakeProducer
) -> None:
    producer.end = stay_queued
    app = create_app(settings.model_copy(update={"wait_timeout_s": 0.05}), producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        response = await generate(client)
        assert_problem(response, 504, "deadline_passed")
        (job,) = producer.jobs
        assert response.json()["job_id"] == job.id == response.headers["x-job-id"]
        assert (await client.get(response.json()["status_url"])).json()["status"] == "queued"


async def test_a_failed_job_is_a_problem_that_names_it(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    producer.end = fail
    for accept in ("image/png", "application/json"):
        response = await generate(client, {"Accept": accept})
        assert_problem(response, 500, "engine_fault")
        assert response.json()["job_id"] == producer.jobs[-1].id and response.json()["retryable"] is True
    body = (await client.get(response.json()["status_url"])).json()
    assert body["status"] == "failed" and body["error"]["code"] == "engine_fault"
    assert_problem(await client.get(f"{body['status_url']}/result"), 500, "engine_fault")


# --- idempotency, refusals, outages


async def test_a_repeat_under_the_same_key_is_the_same_job(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    key = {"Idempotency-Key": "abc-1"}
    first, second = await generate(client, key), await generate(client, key)
    assert first.json() == second.json() and len(producer.records) == 1
    assert (await generate(client, key | ASYNC)).json()["id"] == first.json()["id"]
    assert_problem(await generate(client, key, steps=3), 422, "invalid_request")
    assert (await generate(client, {"Idempotency-Key": "abc-2"})).json()["seed"] != first.json()["seed"]


@pytest.mark.parametrize("key", ["", "x" * 256, "a b"])
async def test_a_key_that_cannot_be_kept_is_malformed(client: httpx.AsyncClient, key: str) -> None:
    assert_problem(await generate(client, {"Idempotency-Key": key}), 400, "malformed_request")


async def test_a_full_queue_says_when_to_come_back(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    producer.refusal = QueueFull("32 jobs wait", retry_after_s=12)
    for response in (await generate(client), await generate(client, ASYNC), await upscale(client)):
        assert_problem(response, 429, "queue_full")
        assert response.headers["retry-after"] == "12"
    producer.refusal = StorageFull("1 GiB is used")
    response = await upscale(client)
    assert_problem(response, 503, "storage_full")
    assert int(response.headers["retry-after"]) >= 1


async def test_everything_but_livez_and_metrics_says_that_redis_is_away(
    client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    job_id = (await generate(client)).json()["id"]
    producer.outage = NotReady("Redis does not answer")
    responses = [
        await generate(client),
        await upscale(client),
        await client.get(f"/jobs/{job_id}"),
        await client.get(f"/jobs/{job_id}/result"),
        await client.get(f"/jobs/{job_id}/events"),
        await client.delete(f"/jobs/{job_id}"),
        await client.get("/readyz"),
        await client.get("/workers"),
    ]
    for response in responses:
        assert_problem(response, 503, "not_ready")
        assert int(response.headers["retry-after"]) >= 1
    assert (await client.get("/livez")).status_code == 200
    assert "giantleap_queue_reachable 0" in (await client.get("/metrics")).text


async def test_a_client_that_leaves_leaves_no_task_behind(app: FastAPI, producer: FakeProducer) -> None:
    producer.end = stay_queued
    for path, state in (("/generate", JobState.QUEUED), ("/generate?cancel_on_disconnect=true", JobState.CANCELED)):
        before = asyncio.all_tasks()
        leave = asyncio.Event()
        call = asyncio.create_task(post_and_leave(app, path, leave))
        while not producer.waits:
            await asyncio.sleep(0.005)
        leave.set()
        status = await asyncio.wait_for(call, 60)
        assert status == 499 and producer.waits == 0
        assert asyncio.all_tasks() == before
        assert producer.records[producer.jobs[-1].id].state is state


async def test_a_client_that_leaves_is_let_go_though_a_cancel_was_swallowed(settings: Settings) -> None:
    """As redis-py does where it is just connecting: the request would hold on until its longest wait was over."""

    class Stubborn(FakeProducer):
        async def wait(self, job_id: str, timeout_s: float, created: Job | None = None) -> Any:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(600)
            return await super().wait(job_id, 600, created)

    stubborn = Stubborn(end=stay_queued)
    app, leave, before = create_app(settings, stubborn), asyncio.Event(), asyncio.all_tasks()  # type: ignore[arg-type]
    leave.set()
    call = asyncio.create_task(post_and_leave(app, "/generate", leave))
    ended, _ = await asyncio.wait([call], timeout=30)  # `wait_for` would cancel it again, and so hide the fault
    assert ended and call.result() == 499
    assert asyncio.all_tasks() == before and stubborn.waits == 0


async def post_and_leave(app: FastAPI, path: str, leave: asyncio.Event) -> int:
    """Post a prompt as a server would pass it on, and disconnect on an event; returns the status."""
    path, _, query = path.partition("?")
    parts = [{"type": "http.request", "body": json.dumps({"prompt": PROMPT}).encode(), "more_body": False}]
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status", 0))

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": query.encode(), "headers": headers}
    await app(scope, receive, send)  # type: ignore[arg-type]
    return statuses[0]


async def test_a_stopping_process_lets_go_of_waiting_requests(
    app: FastAPI, client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    producer.end = stay_queued
    call = asyncio.create_task(generate(client))
    while not producer.waits:
        await asyncio.sleep(0.005)
    app.state.giantleap.stopping.set()
    response = await asyncio.wait_for(call, 60)
    assert_problem(response, 503, "not_ready")
    assert response.json()["job_id"] == producer.jobs[0].id and producer.waits == 0
    assert_problem(await generate(client), 503, "not_ready")
    assert len(producer.records) == 1
    assert (await client.get("/readyz")).json()["reasons"] == ["this process is stopping"]


# --- upscale


async def test_a_raw_latent_becomes_a_job(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    response = await upscale(client, scale=4, output_format="webp", priority="low")
    assert response.status_code == 200 and response.json()["seed"] is None and response.json()["kind"] == "upscale"
    (job,) = producer.jobs
    assert job.priority is Priority.LOW
    assert dataclasses.asdict(job.params) == {
        "scale": 4,
        "latent_space": "paper",
        "batch_items": 1,
        "channels": CHANNELS,
        "latent_height": 4,
        "latent_width": 6,
        "output": "image",
        "output_format": "webp",
        "method": "lua",
        "decode": "exact",
        "image_width_px": None,
        "image_height_px": None,
        "one_frame": False,
        "refine": None,
        "prompt": "",
        "negative_prompt": "",
        "guidance_scale": 0.0,
        "seed": None,
        "file": {"compression": "fast", "quality": None},
        "kind": "upscale",
    }
    np.testing.assert_array_equal(load(producer.blobs[job.id])["latent"], LATENT[None])


async def test_a_large_latent_is_read_like_a_small_one(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    latent = np.random.default_rng(1).standard_normal((4, CHANNELS, 64, 64)).astype(np.float32)
    assert latent.nbytes >= 1 << 20
    assert (await upscale(client, latent, scale=1)).status_code == 200
    np.testing.assert_array_equal(load(producer.blobs[producer.jobs[0].id])["latent"], latent)
    latent[3, 0, 0, 0] = np.inf
    assert_problem(await upscale(client, latent, scale=1), 422, "invalid_request")


async def test_a_scaled_latent_is_made_raw(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    assert (await upscale(client, LATENT[None], scaled="true", latent_space="paper")).status_code == 200
    np.testing.assert_allclose(
        load(producer.blobs[producer.jobs[0].id])["latent"], LATENT[None] / 0.5 + 0.25, rtol=1e-6
    )


async def test_a_packed_latent_is_unpacked(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    packed = LATENT_SPACES["flux1"].from_raw(LATENT[None])
    query: dict[str, Any] = {"bundle": "flux", "scaled": "true", "width": 48, "height": 32}
    for latent in (packed, packed[0]):
        assert (await upscale(client, latent, **query)).status_code == 200
        np.testing.assert_allclose(load(producer.blobs[producer.jobs[-1].id])["latent"], LATENT[None], atol=1e-5)
    assert_problem(await upscale(client, packed, bundle="flux", scaled="true"), 422, "invalid_request", "body")
    assert_problem(await upscale(client, packed, **query | {"width": 64}), 422, "invalid_request", "body")


async def test_npy_and_unnamed_bodies_are_read_too(
    client: httpx.AsyncClient, producer: FakeProducer, tmp_path: Path
) -> None:
    np.save(tmp_path / "latent.npy", LATENT)
    content = (tmp_path / "latent.npy").read_bytes()
    for content_type in ("application/x-npy", "application/octet-stream"):
        response = await client.post("/upscale", content=content, headers={"Content-Type": content_type})
        assert response.status_code == 200
        np.testing.assert_array_equal(load(producer.blobs[response.json()["id"]])["latent"], LATENT[None])


async def test_the_latent_itself_is_returned_on_request(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    response = await upscale(client, headers={"Accept": "application/x-safetensors"}, output="latent")
    assert response.status_code == 200 and response.headers["content-type"] == "application/x-safetensors"
    assert response.content == IMAGE and "x-seed" not in response.headers
    assert (await upscale(client, headers={"Accept": "image/*"})).headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    ("query", "latent", "field"),
    [
        ({"scale": 3}, LATENT, "scale"),
        ({"scale": "x"}, LATENT, "scale"),
        ({"latent_space": "sdxl"}, LATENT, "latent_space"),
        ({"bundle": "unknown"}, LATENT, "bundle"),
        ({"output": "video"}, LATENT, "output"),
        ({"output": "latent", "output_format": "png"}, LATENT, "output_format"),
        ({"output": "latent", "quality": 80}, LATENT, "quality"),
        ({"compression": "best"}, LATENT, "compression"),
        ({"scaled": "perhaps"}, LATENT, "scaled"),
        ({"priority": "urgent"}, LATENT, "priority"),
        ({"nonsense": 1}, LATENT, "nonsense"),
        ({"width": 64, "height": 64}, LATENT, "width"),
        ({}, LATENT[:4], "body"),
        ({}, LATENT[0], "body"),
        ({}, np.stack([LATENT] * 5), "body"),
        ({"scale": 4}, np.zeros((CHANNELS, 20, 20), np.float32), "body"),
    ],
)
async def test_bad_latents_are_named_and_enqueue_nothing(
    client: httpx.AsyncClient, producer: FakeProducer, query: dict[str, Any], latent: np.ndarray, field: str
) -> None:
    assert_problem(await upscale(client, latent, **query), 422, "invalid_request", field)
    assert not producer.records


async def test_values_that_overflow_when_made_raw_are_refused(
    client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    latent = LATENT.copy()
    latent[0, 0, 0] = 3e38
    assert_problem(await upscale(client, latent, scaled="true"), 422, "invalid_request")
    latent[0, 0, 0] = np.nan
    assert_problem(await upscale(client, latent), 422, "invalid_request")
    assert not producer.records


async def test_bodies_that_are_no_latent_are_refused(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    for content, content_type, status, code in (
        (b"{}", "application/json", 415, "unsupported_media_type"),
        (b"", "application/x-safetensors", 400, "malformed_request"),
        (b"\x80\x04nonsense", "application/octet-stream", 415, "unsupported_media_type"),
        (save({"latent": LATENT})[:-1], "application/x-safetensors", 400, "malformed_request"),
        (save({"latent": LATENT.astype(np.float64)}), "application/x-safetensors", 415, "unsupported_media_type"),
        (bytes((1 << 21) + 1), "application/x-safetensors", 413, "payload_too_large"),
    ):
        response = await client.post("/upscale", content=content, headers={"Content-Type": content_type})
        assert_problem(response, status, code)
    assert not producer.records


async def test_several_latents_do_not_fit_one_file(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    batch = np.stack([LATENT, LATENT])
    assert_problem(await upscale(client, batch, headers={"Accept": "image/png"}), 422, "invalid_request", "body")
    assert not producer.records
    assert len((await upscale(client, batch)).json()["results"]) == 2


# --- jobs


async def test_each_result_has_its_bytes_and_seed(client: httpx.AsyncClient) -> None:
    body = (await generate(client, seed=5, num_images=2, output_format="jpeg")).json()
    for index, result in enumerate(body["results"]):
        response = await client.get(result["url"])
        assert (response.content, response.headers["content-type"]) == (IMAGE, "image/jpeg")
        assert response.headers["x-seed"] == str(5 + index)
    assert_problem(await client.get(f"{body['status_url']}/result?index=2"), 404, "not_found")
    assert_problem(await client.get(f"{body['status_url']}/result?index=-1"), 422, "invalid_request", "index")


@pytest.mark.parametrize("job_id", ["77c6447e-e006-40ab-8f6f-81028933c9d5", "nonsense", "1", "*", "A" * 36])
async def test_unknown_jobs_are_not_found(client: httpx.AsyncClient, job_id: str) -> None:
    for method, suffix in (("GET", ""), ("GET", "/result"), ("GET", "/events"), ("DELETE", ""), ("POST", "/cancel")):
        assert_problem(await client.request(method, f"/jobs/{job_id}{suffix}"), 404, "not_found")


async def test_results_before_the_end_are_a_conflict(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    producer.end = stay_queued
    url = (await generate(client, ASYNC)).json()["status_url"]
    assert_problem(await client.get(f"{url}/result"), 409, "conflict")


async def test_cancel_ends_a_job_and_may_be_repeated(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    producer.end = stay_queued
    url = (await generate(client, ASYNC)).json()["status_url"]
    for _ in range(2):
        response = await client.post(f"{url}/cancel")
        assert response.status_code == 200 and response.json()["status"] == "canceled"
    assert_problem(await client.get(f"{url}/result"), 409, "conflict")
    producer.end = succeed
    finished = (await generate(client)).json()["status_url"]
    assert_problem(await client.post(f"{finished}/cancel"), 409, "conflict")


async def test_delete_cancels_a_job_that_waits_and_deletes_one_that_has_ended(
    client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    producer.end = stay_queued
    url = (await generate(client, ASYNC)).json()["status_url"]
    for status in (200, 204, 404):
        assert (await client.delete(url)).status_code == status


# --- the service itself


async def test_models_list_what_a_request_may_use(client: httpx.AsyncClient) -> None:
    first, second = (await client.get("/models")).json()
    assert (first["name"], second["name"]) == ("paper", "flux")
    assert first["scales"] == [1, 2, 4] and first["license"] == "Apache-2.0" and first["engine"] == "torch"
    assert first["latent_space"] == {
        "name": "paper", "channels": 16, "stride": 8, "scale": 0.5, "shift": 0.25,
        "packing": "none", "mean": None, "std": None,
    }  # fmt: skip
    assert second["latent_space"]["packing"] == "flux"
    assert (first["base_width"], first["max_steps"], first["max_image_pixels"]) == (64, 50, 512 * 512)


async def test_models_say_whether_a_worker_has_them_in_memory(
    client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    found = []
    for loaded in ((), ("flux",), ("flux", "paper")):
        one, other = (Device("cpu", 1, 0, {"paper": {}, "flux": {}}, loaded=each) for each in (loaded, ()))
        producer.devices = (one, other)
        found.append([model["loaded"] for model in (await client.get("/models")).json()])
    assert found == [[False, False], [False, True], [True, True]]


async def test_ready_means_that_a_worker_lives(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    assert (await client.get("/readyz")).json() == {"ready": True, "reasons": [], "warnings": []}
    producer.warnings = ("Redis has no append-only file",)
    assert (await client.get("/readyz")).json()["warnings"] == ["Redis has no append-only file"]
    producer.live_workers = 0
    response = await client.get("/readyz")
    assert_problem(response, 503, "not_ready")
    assert response.json()["reasons"] == ["no worker is ready"]


async def test_metrics_hold_the_queue_and_the_requests(client: httpx.AsyncClient) -> None:
    await generate(client)
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'route="/generate"' in response.text and "giantleap_queue_limit 32" in response.text


async def test_workers_are_listed_with_what_they_serve(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    producer.devices = (Device("cuda", 24 << 30, 6 << 30, {"b": {}, "a": {}}, WorkerRole.DECODE, ("b",)),)
    assert (await client.get("/workers")).json() == [
        {"device": "cuda", "role": "decode", "memory_bytes": 24 << 30, "loaded_bytes": 6 << 30}
        | {"bundles": ["a", "b"], "loaded": ["b"]}
    ]


async def test_the_app_opens_and_closes_the_queue(app: FastAPI, producer: FakeProducer) -> None:
    async with app.router.lifespan_context(app):
        assert producer.is_open
    assert not producer.is_open


async def test_openapi_documents_every_route_and_its_problems(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    assert {"/generate", "/upscale", "/jobs", "/jobs/{job_id}", "/jobs/{job_id}/result", "/jobs/{job_id}/events",
            "/jobs/{job_id}/cancel", "/jobs/{job_id}/results", "/dead-letters", "/dead-letters/{job_id}", "/verify",
            "/dead-letters/{job_id}/retry", "/models", "/livez", "/readyz", "/health", "/version", "/metrics",
            "/workers"} == {
                path for path in document["paths"] if not path.startswith(FRONTS)}  # fmt: skip
    schemas = document["components"]["schemas"]
    assert {"Problem", "FieldProblem", "JobBody", "GenerateRequest", "ModelBody"} <= set(schemas)
    assert "HTTPValidationError" not in schemas
    for path in ("/generate", "/upscale"):
        responses = document["paths"][path]["post"]["responses"]
        assert {"200", "202", "400", "406", "413", "415", "422", "429", "503", "504"} <= set(responses)
        for status, response in responses.items():
            if int(status) >= 400:
                reference = response["content"]["application/problem+json"]["schema"]["$ref"]
                assert reference == "#/components/schemas/Problem"
        assert "Retry-After" in responses["429"]["headers"] and "image/png" in responses["200"]["content"]
    assert "application/x-safetensors" in document["paths"]["/upscale"]["post"]["requestBody"]["content"]
    for name, described in schemas["GenerateRequest"]["properties"].items():
        assert "description" in described, name
    refs = [part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]]
    assert set(refs) <= set(schemas)


def test_bundles_must_be_readable_and_have_names_of_their_own(tmp_path: Path, bundle_dirs: tuple[Path, ...]) -> None:
    with pytest.raises(BundleError, match="named paper"):
        create_app(read_settings(bundle=(bundle_dirs[0], bundle_dirs[0])), FakeProducer())  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="no bundle"):
        create_app(read_settings(bundle=(tmp_path,)), FakeProducer())  # type: ignore[arg-type]


def test_the_api_needs_a_redis(settings: Settings) -> None:
    with pytest.raises(ValueError, match="redis_url"):
        create_app(settings)


def test_the_api_process_imports_no_torch() -> None:
    code = "import sys, giantleap.service.api.app; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "set()"


def test_a_request_meets_the_middlewares_in_the_documented_order(settings: Settings) -> None:
    changes = {"cors_origins": ("https://app.example.org",)}
    app = create_app(settings.model_copy(update=changes), FakeProducer())  # type: ignore[arg-type]
    documented = re.findall(r"^ +\d\. `(\w+)`", _add_middlewares.__doc__ or "", re.MULTILINE)
    assert [middleware.cls.__name__ for middleware in app.user_middleware] == documented  # type: ignore[attr-defined]
