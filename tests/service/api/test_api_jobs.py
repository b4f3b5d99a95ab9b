"""Jobs over HTTP: client ids, deadlines, webhooks and the list, over a producer in memory and a real queue."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from safetensors.numpy import save

from giantleap.service.api.app import create_app
from giantleap.service.auth import new_key
from giantleap.service.jobs.job import FinalState, JobState, Webhook
from giantleap.service.settings import Settings, read_settings, to_environment
from giantleap.service.webhooks import sender as webhooks
from tests.service.fake_producer import FakeProducer, stay_queued
from tests.service.live_server import live_server
from tests.service.paper_bundle import BASE_PX, CHANNELS, write_paper_bundle
from tests.service.webhook_receiver import webhook_receiver

ASYNC = {"Prefer": "respond-async"}
SAFETENSORS = {"Content-Type": "application/x-safetensors"}
LATENT = save({"latent": np.ones((CHANNELS, 4, 6), np.float32)})
SECRET = SecretStr("a secret of the operator")


@pytest.fixture(scope="module")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_paper_bundle(tmp_path_factory.mktemp("bundles") / "paper")


@pytest.fixture
def producer() -> FakeProducer:
    return FakeProducer()


@pytest.fixture
def app(bundle_dir: Path, producer: FakeProducer) -> FastAPI:
    settings = read_settings(bundle=(bundle_dir,), webhook_secret=SECRET)
    return create_app(settings, producer)  # type: ignore[arg-type]


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        yield client


def assert_problem(response: httpx.Response, status: int, code: str, field: str | None = None) -> None:
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    if field is not None:
        assert field in [error["field"] for error in response.json()["errors"]]


# --- PUT


async def test_put_makes_a_job_of_either_kind_under_the_clients_id(
    client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    drawn, enlarged = str(uuid.uuid4()), str(uuid.uuid4())
    response = await client.put(f"/jobs/{drawn}", json={"prompt": "a"})
    assert response.status_code == 200 and response.json()["id"] == drawn
    response = await client.put(f"/jobs/{enlarged}?scale=2", content=LATENT, headers=SAFETENSORS | ASYNC)
    assert response.status_code == 202 and response.headers["location"] == f"/jobs/{enlarged}"
    assert [(job.id, job.params.kind) for job in producer.jobs] == [(drawn, "generate"), (enlarged, "upscale")]
    assert (await client.get(f"/jobs/{drawn}")).json()["status"] == "succeeded"
    image = await client.put(f"/jobs/{uuid.uuid4()}", json={"prompt": "a"}, headers={"Accept": "image/png"})
    assert image.status_code == 200 and image.headers["content-type"] == "image/png"


async def test_put_refuses_what_it_cannot_mean(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    path, body = f"/jobs/{uuid.uuid4()}", {"prompt": "a"}
    for bad in ("7", str(uuid.uuid4()).upper(), "x" * 36):
        assert_problem(await client.put(f"/jobs/{bad}", json=body), 422, "invalid_request", "job_id")
    keyed = await client.put(path, json=body, headers={"Idempotency-Key": "k"})
    assert_problem(keyed, 400, "malformed_request")
    assert_problem(await client.put(f"{path}?scale=2", json=body), 422, "invalid_request", "scale")
    assert_problem(await client.put(path, json={"prompt": ""}), 422, "invalid_request", "prompt")
    assert_problem(await client.put(path, json={"prompt": "a", "hat": 1}), 422, "invalid_request", "hat")
    sent = {"Content-Type": "application/json"}
    for text in (b"{", b"\xff", b'"\xed\xa0\x80"'):
        assert_problem(await client.put(path, content=text, headers=sent), 400, "malformed_request")
    assert_problem(
        await client.put(path, content=b"a", headers={"Content-Type": "text/html"}), 415, "unsupported_media_type"
    )
    assert producer.jobs == []


# --- Cancel-After


@pytest.mark.parametrize("path", ["/generate", "/upscale", "put"])
async def test_cancel_after_becomes_the_jobs_deadline(
    client: httpx.AsyncClient, producer: FakeProducer, path: str
) -> None:
    headers = {"Cancel-After": "30"}
    if path == "/upscale":
        response = await client.post(path, content=LATENT, headers=headers | SAFETENSORS)
    elif path == "/generate":
        response = await client.post(path, json={"prompt": "a"}, headers=headers)
    else:
        response = await client.put(f"/jobs/{uuid.uuid4()}", json={"prompt": "a"}, headers=headers)
    assert response.status_code == 200
    assert [job.cancel_after_s for job in producer.jobs] == [30.0]


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "soon", "", "1e3", "604801", "9" * 40, "٣"])
async def test_a_cancel_after_that_is_no_time_is_refused(client: httpx.AsyncClient, value: str) -> None:
    response = await client.post("/generate", json={"prompt": "a"}, headers={b"Cancel-After": value.encode()})
    assert_problem(response, 400, "malformed_request")


async def test_a_job_counts_its_latent_pixels(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    await client.post("/generate", json={"prompt": "a", "scale": 2, "num_images": 3})
    await client.post("/upscale?scale=2", content=LATENT, headers=SAFETENSORS)
    drawn, enlarged = producer.jobs
    assert drawn.latent_px == 3 * (2 * BASE_PX // 8) ** 2
    assert enlarged.latent_px == 4 * 4 * 6


# --- webhooks


async def test_a_webhook_reaches_the_job(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    url = "https://8.8.8.8/hook"
    response = await client.post("/generate", json={"prompt": "a", "webhook": {"url": url, "events": ["failed"]}})
    assert response.status_code == 200 and url not in response.text
    await client.post("/generate", json={"prompt": "a", "webhook": {"url": url}})
    query = {"webhook_url": url, "webhook_events": "failed,canceled"}
    await client.post("/upscale", params=query, content=LATENT, headers=SAFETENSORS)
    events: list[tuple[FinalState, ...]] = [("failed",), ("succeeded", "failed", "canceled"), ("failed", "canceled")]
    assert [job.webhook for job in producer.jobs] == [Webhook(url, each) for each in events]


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/hook",
        "http://localhost:8000/hook",
        "http://[::1]/hook",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:10.0.0.1]/",
        "https://user:pass@8.8.8.8/",
        "ftp://8.8.8.8/",
        "http://no-such-name.invalid/",
    ],
)
async def test_a_webhook_into_the_own_network_is_refused(
    client: httpx.AsyncClient, producer: FakeProducer, url: str
) -> None:
    response = await client.post("/generate", json={"prompt": "a", "webhook": {"url": url}})
    assert_problem(response, 422, "invalid_request", "webhook")
    assert url not in response.text
    response = await client.post("/upscale", params={"webhook_url": url}, content=LATENT, headers=SAFETENSORS)
    assert_problem(response, 422, "invalid_request", "webhook")
    response = await client.put(f"/jobs/{uuid.uuid4()}", json={"prompt": "a", "webhook": {"url": url}})
    assert_problem(response, 422, "invalid_request", "webhook")
    assert producer.jobs == []


async def test_a_webhook_to_a_host_that_is_not_listed_is_refused(bundle_dir: Path, producer: FakeProducer) -> None:
    settings = read_settings(bundle=(bundle_dir,), webhook_secret=SECRET, webhook_hosts="8.8.8.8,.example.org")
    app = create_app(settings, producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        for url, status in (("https://8.8.4.4/", 422), ("https://8.8.8.8.evil.net/", 422), ("https://8.8.8.8/", 200)):
            response = await client.post("/generate", json={"prompt": "a", "webhook": {"url": url}})
            assert response.status_code == status, url
            if status == 422:
                assert_problem(response, 422, "invalid_request", "webhook")
                assert "not on the list" in response.text and url not in response.text
    assert len(producer.jobs) == 1


@pytest.mark.parametrize("hosts", ["https://example.org", "example.org:443", "*.example.org", "a/b", ".", "::1"])
def test_a_host_of_the_list_is_a_plain_name(hosts: str) -> None:
    with pytest.raises(ValueError, match="a host must be a name"):
        read_settings(webhook_hosts=hosts)


async def test_a_webhook_without_a_secret_or_of_unknown_events_is_refused(
    bundle_dir: Path, client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    for webhook in ({"url": "https://8.8.8.8/", "events": ["started"]}, {"url": "https://8.8.8.8/", "events": []}, {}):
        response = await client.post("/generate", json={"prompt": "a", "webhook": webhook})
        assert_problem(response, 422, "invalid_request")
    app = create_app(read_settings(bundle=(bundle_dir,)), producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as plain:
        response = await plain.post("/generate", json={"prompt": "a", "webhook": {"url": "https://8.8.8.8/"}})
        assert_problem(response, 422, "invalid_request", "webhook")
        assert "GIANTLEAP_WEBHOOK_SECRET" in response.text
    assert producer.jobs == []


def test_the_secret_is_hidden_but_reaches_child_processes(bundle_dir: Path) -> None:
    settings = read_settings(bundle=(bundle_dir,), webhook_secret=SECRET)
    assert SECRET.get_secret_value() not in repr(settings)
    assert to_environment(settings)["GIANTLEAP_WEBHOOK_SECRET"] == SECRET.get_secret_value()


# --- the list


async def test_jobs_are_listed_newest_first_by_state(client: httpx.AsyncClient, producer: FakeProducer) -> None:
    ids = [(await client.post("/generate", json={"prompt": "a"})).json()["id"] for _ in range(3)]
    producer.end = stay_queued
    waiting = (await client.post("/generate", json={"prompt": "a"}, headers=ASYNC)).json()["id"]
    body = (await client.get("/jobs")).json()
    assert [job["id"] for job in body["jobs"]] == [waiting, *reversed(ids)] and body["next_cursor"] is None
    assert "prompt" not in json.dumps(body)
    queued = (await client.get("/jobs?status=queued")).json()["jobs"]
    assert [job["id"] for job in queued] == [waiting]
    assert len((await client.get("/jobs?limit=2")).json()["jobs"]) == 2


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "cursor=x", "cursor=-1", "cursor=\u0663", "status=lost"])
async def test_a_bad_page_is_refused(client: httpx.AsyncClient, query: str) -> None:
    assert_problem(await client.get(f"/jobs?{query}"), 422, "invalid_request", query.split("=")[0])


async def test_an_unsupported_method_gets_the_list_of_allowed_ones(client: httpx.AsyncClient) -> None:
    response = await client.patch(f"/jobs/{uuid.uuid4()}")
    assert response.status_code == 405 and response.headers["allow"] == "DELETE, GET, HEAD, PUT"


# --- over a real queue and a socket


async def test_over_a_real_queue_deadline_repeat_list_and_webhook_work_together(
    bundle_dir: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "_POLL_S", 0.05)
    changes = {"bundle": (bundle_dir,), "webhook_secret": SECRET, "webhook_allow_private": True}
    app = create_app(settings.model_copy(update=changes))
    with webhook_receiver() as receiver, live_server(app) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            path, body = f"/jobs/{uuid.uuid4()}", {"prompt": "a", "webhook": {"url": receiver.url}}
            first = await client.put(path, json=body, headers={"Cancel-After": "1"})
            assert_problem(first, 504, "deadline_passed")
            assert first.json()["status_url"] == path
            again = await client.put(path, json=body)
            assert_problem(again, 504, "deadline_passed")
            assert_problem(await client.put(path, json={"prompt": "b"}), 422, "invalid_request")
            (job,) = (await client.get("/jobs?status=failed")).json()["jobs"]
            assert job["status_url"] == path and job["error"]["code"] == "deadline_passed"
            assert (await client.get("/jobs")).json()["jobs"] == [job]
            await asyncio.to_thread(receiver.wait_for, 1)
            assert json.loads(receiver.got[0][2])["type"] == "job.failed"
            kept: Any = await client.put(f"/jobs/{uuid.uuid4()}", json={"prompt": "a"}, headers=ASYNC)
            assert kept.status_code == 202 and kept.json()["status"] == JobState.QUEUED
            assert (await client.delete(kept.json()["status_url"])).json()["status"] == JobState.CANCELED


async def test_a_second_key_neither_lists_nor_takes_over_the_first_keys_job(
    bundle_dir: Path, settings: Settings, tmp_path: Path
) -> None:
    made = {name: new_key() for name in ("ann", "bob", "drawer")}
    scopes = {"ann": ["generate", "upscale"], "bob": ["generate", "upscale"], "drawer": ["generate"]}
    entries = [f'[[key]]\nname = "{n}"\nsha256 = "{made[n][1]}"\nscopes = {json.dumps(scopes[n])}' for n in made]
    path = tmp_path / "keys.toml"
    path.write_text("\n".join(entries))
    path.chmod(0o600)
    app = create_app(settings.model_copy(update={"bundle": (bundle_dir,), "api_keys_file": path}))
    with live_server(app) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            ann, bob, drawer = ({"Authorization": f"Bearer {made[name][0]}"} | ASYNC for name in made)
            path_of_job, body = f"/jobs/{uuid.uuid4()}", {"prompt": "a", "seed": 1}
            assert (await client.put(path_of_job, json=body, headers=ann)).status_code == 202
            assert (await client.put(path_of_job, json=body, headers=ann)).status_code == 202
            stolen = await client.put(path_of_job, json=body, headers=bob)
            assert_problem(stolen, 422, "invalid_request")
            assert_problem(await client.get(path_of_job, headers=bob), 404, "not_found")
            assert (await client.get("/jobs", headers=bob)).json() == {"jobs": [], "next_cursor": None}
            (job,) = (await client.get("/jobs", headers=ann)).json()["jobs"]
            assert job["status_url"] == path_of_job
            enlarged = await client.put(f"/jobs/{uuid.uuid4()}", content=LATENT, headers=drawer | SAFETENSORS)
            assert_problem(enlarged, 403, "forbidden")
            assert_problem(await client.put(path_of_job, json=body), 401, "unauthorized")
