"""The client against a running service: every kind of source, jobs, events through cuts, a Redis that restarts."""

import asyncio
import contextlib
import io
import json
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save

from giantleap_client import (
    AsyncClient,
    AsyncJob,
    Client,
    GiantleapError,
    InvalidRequest,
    Job,
    JobFailed,
    Result,
    Timeout,
    generate_request,
    upscale_request,
)
from giantleap_client.payloads import Source
from tests.clients.conftest import Service
from tests.clients.relay import running_relay
from tests.tiny_bundle import BASE_PX, LATENT_CHANNELS

LATENT = np.random.default_rng(0).standard_normal((LATENT_CHANNELS, 8, 8)).astype(np.float32)
PIXELS = np.random.default_rng(1).integers(0, 255, (BASE_PX, BASE_PX, 3), np.uint8)
PROMPT = "a red sphere"


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[Client]:
    with Client(service.url, timeout_s=120) as client:
        yield client


def to_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@contextlib.contextmanager
def busy(client: Client) -> Iterator[None]:
    """Seconds of work in the queue, so that a job made after it waits, however fast the machine is."""
    jobs = [client.submit(generate_request(PROMPT, steps=50, num_images=4, scale=4)) for _ in range(40)]
    yield
    for job in jobs:
        with contextlib.suppress(GiantleapError):  # it has ended
            job.cancel()


def starts(client: Client, job_id: str) -> Counter[str]:
    """How often each of the job's events that happen once has happened."""
    names = Counter(event.name for event in client.job(job_id).events())
    return Counter({name: names[name] for name in ("queued", "started", "done")})


def test_a_prompt_becomes_images_in_every_form(client: Client, tmp_path: Path) -> None:
    result = client.generate(PROMPT, scale=2, seed=7, num_images=2, init_image=PIXELS)
    assert len(result) == 2 and (result.seed(0), result.seed(1)) == (7, 8)
    assert result.image(1).size == (2 * BASE_PX, 2 * BASE_PX)
    assert np.array_equal(result.array(), np.asarray(result.image()))
    assert np.array_equal(result.tensor().permute(1, 2, 0).mul(255).round().numpy(), result.array())
    assert result.save(tmp_path / "a.png", 1).read_bytes() == result.files[1]
    assert {"queue", "generate", "upscale", "decode"} <= result.job["stages"].keys()


@pytest.mark.parametrize("kind", ["path", "bytes", "array", "tensor", "float16"])
def test_every_form_of_a_latent_gives_the_same_image(client: Client, tmp_path: Path, kind: str) -> None:
    (tmp_path / "latent.safetensors").write_bytes(save({"latent": LATENT}))
    half = LATENT.astype(np.float16)
    sources: dict[str, Source] = {
        "path": tmp_path / "latent.safetensors",
        "bytes": save({"latent": LATENT}),
        "array": LATENT,
        "tensor": torch.from_numpy(LATENT),
        "float16": half,
    }
    result = client.upscale(sources[kind], scale=2)
    same = client.upscale(half.astype(np.float32) if kind == "float16" else LATENT, scale=2)
    assert result.array().shape == (2 * BASE_PX, 2 * BASE_PX, 3)
    assert np.array_equal(result.array(), same.array())


@pytest.mark.parametrize("kind", ["path", "bytes", "array", "tensor", "image"])
def test_every_form_of_an_image_gives_the_same_image(client: Client, tmp_path: Path, kind: str) -> None:
    (tmp_path / "photo.png").write_bytes(to_png(PIXELS))
    sources: dict[str, Source] = {
        "path": str(tmp_path / "photo.png"),
        "bytes": to_png(PIXELS),
        "array": PIXELS,
        "tensor": torch.from_numpy(PIXELS).permute(2, 0, 1),
        "image": Image.fromarray(PIXELS),
    }
    result = client.upscale(sources[kind], scale=2, method="swinir")
    assert np.array_equal(result.array(), client.upscale(to_png(PIXELS), scale=2, method="swinir").array())


def test_latents_come_back_as_arrays_and_tensors(client: Client) -> None:
    result = client.upscale(np.stack([LATENT, LATENT]), scale=2, output="latent")
    assert len(result) == 2 and result.tensor(1).shape == (LATENT_CHANNELS, 16, 16)
    assert np.array_equal(result.tensor(1).numpy(), result.array(0))
    with pytest.raises(TypeError, match="is a latent"):
        result.image()


def test_a_refine_pass_takes_its_prompt_from_a_form(client: Client) -> None:
    assert client.upscale(LATENT, scale=2, refine_steps=1, prompt=PROMPT, seed=3).seed() == 3


def test_a_refused_value_names_its_field_and_the_request(client: Client) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.generate(PROMPT, scale=3)
    assert refused.value.code == "invalid_request" and refused.value.request_id
    assert [name for name, _ in refused.value.fields] == ["scale"]


def test_a_job_is_followed_and_found_again(client: Client) -> None:
    job_id = str(uuid.uuid4())
    request = generate_request(PROMPT, seed=1)
    events = list(client.submit(request, job_id=job_id).events())
    assert events[0].name == "queued" and (events[-1].name, events[-1].data["state"]) == ("done", "succeeded")
    assert client.submit(request, job_id=job_id).result().files == client.job(job_id).result().files
    assert starts(client, job_id) == {"queued": 1, "started": 1, "done": 1}
    with pytest.raises(InvalidRequest):
        client.submit(generate_request("a cube"), job_id=job_id)
    with pytest.raises(GiantleapError) as ended:
        client.job(job_id).cancel()
    assert (ended.value.code, ended.value.job_id) == ("conflict", job_id)


def test_a_wait_ends_before_its_job_and_a_canceled_job_has_no_result(client: Client) -> None:
    with busy(client):
        job = client.submit(generate_request(PROMPT))
        with pytest.raises(Timeout) as missed:
            job.result(timeout_s=0.05)
        assert missed.value.job_id == job.id
        assert job.cancel()["id"] == job.id
    with pytest.raises(JobFailed) as canceled:
        job.result()
    assert (canceled.value.code, canceled.value.job_id) == ("canceled", job.id)


def test_a_deadline_that_passed_is_a_timeout(client: Client) -> None:
    with busy(client):
        late = client.submit(generate_request(PROMPT), cancel_after_s=1)
        with pytest.raises(Timeout) as missed:
            late.result()
    assert (missed.value.code, missed.value.job_id) == ("deadline_passed", late.id)


def test_map_yields_results_and_errors_in_order(client: Client) -> None:
    requests = [generate_request(PROMPT, seed=seed, scale=3 if seed == 2 else 2) for seed in range(5)]
    results = list(client.map(iter(requests), concurrency=3))
    assert [each.seed() if isinstance(each, Result) else each.code for each in results] == [
        0, 1, "invalid_request", 3, 4,
    ]  # fmt: skip


async def test_the_asynchronous_client_does_the_same(service: Service) -> None:
    async with AsyncClient(service.url, timeout_s=120) as client:
        drawn, larger = await asyncio.gather(
            client.generate(PROMPT, seed=5), client.upscale(LATENT, scale=2, output="latent")
        )
        assert drawn.seed() == 5 and larger.array().shape == (LATENT_CHANNELS, 16, 16)
        job = await client.submit(generate_request(PROMPT, seed=5))
        names = [event.name async for event in job.events()]
        assert names[0] == "queued" and names[-1] == "done"
        assert (await job.result()).files == drawn.files and (await job.show())["status"] == "succeeded"
        with pytest.raises(GiantleapError, match="conflict"):
            await job.cancel()
        requests = [upscale_request(LATENT, scale=scale) for scale in (2, 3)]
        kinds = [type(each) async for each in client.map(requests, concurrency=2)]
        assert kinds == [Result, InvalidRequest]


def test_events_resume_where_a_cut_connection_left_them(service: Service, client: Client) -> None:
    job = client.submit(generate_request(PROMPT, steps=40))
    with running_relay(service.url) as relay, Client(relay.url, timeout_s=120) as through:
        relay.cut_after = [500 + 150 * number for number in range(6)]
        events = list(through.job(job.id).events())
        assert relay.cuts >= 4
    assert events == list(client.job(job.id).events())
    assert len({event.id for event in events}) == len(events)


def test_a_relay_that_cuts_connections_loses_no_job_and_repeats_none(service: Service, client: Client) -> None:
    ids = [str(uuid.uuid4()) for _ in range(12)]
    with running_relay(service.url) as relay, Client(relay.url, timeout_s=120) as through:
        for number, job_id in enumerate(ids):  # before the answer, within its head, within its body; with each second
            relay.cut_after = [0, 40, 700][: 1 + number % 3]
            job = through.submit(generate_request(PROMPT, seed=number), job_id=job_id)
            relay.cut_after = [0, 300, 2000]
            assert job.result().seed() == number
        assert relay.cuts >= len(ids), "each first connection is cut at once"
        relay.cut_after = [0, 0, 100, 0, 500] * 3
        drawn = list(through.map([generate_request(PROMPT, seed=seed) for seed in range(6)]))
    assert [each.seed() if isinstance(each, Result) else each.code for each in drawn] == list(range(6))
    assert all(starts(client, job_id) == {"queued": 1, "started": 1, "done": 1} for job_id in ids)


def test_a_redis_that_restarts_behind_a_relay_that_cuts_loses_no_job_and_ends_none_twice(
    service: Service, client: Client
) -> None:
    ids = [str(uuid.uuid4()) for _ in range(8)]
    with running_relay(service.url) as relay:
        for seed, job_id in enumerate(ids):
            if seed == 4:
                service.store.harm()
            relay.cut_after = [0, 40, 700][: 1 + seed % 3]
            with Client(relay.url, timeout_s=120) as through:  # with connections of its own
                through.submit(generate_request(PROMPT, seed=seed), job_id=job_id)
        for seed, job_id in enumerate(ids):
            relay.cut_after = [0, 300, 2000]
            with Client(relay.url, timeout_s=120) as through:
                assert through.job(job_id).result().seed() == seed
        assert relay.cuts >= 2 * len(ids), "each first connection is cut at once"
    listed = json.loads(client.send("GET", "jobs", limit=len(ids)))["jobs"]
    assert {job["id"] for job in listed} == set(ids), "no repeat made a job of its own"
    for job_id in ids:  # a claim whose answer died with Redis starts again, and only one start can end the job
        counts = starts(client, job_id)
        assert (counts["queued"], counts["done"]) == (1, 1)


def test_the_readme_runs(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "clients" / "python" / "README.md"
    block = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[0]
    Image.fromarray(PIXELS).save(tmp_path / "photo.jpg")
    (tmp_path / "latent.safetensors").write_bytes(save({"latent": LATENT}))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block.replace("http://127.0.0.1:8000", service.url), str(page), "exec"), names)
    assert len(names["files"]) == 2 and names["image"].size == (4 * BASE_PX, 4 * BASE_PX)
    assert names["larger"].shape == (LATENT_CHANNELS, 16, 16) and (tmp_path / "sphere.png").exists()


@pytest.mark.parametrize(("one", "other"), [(Client, AsyncClient), (Job, AsyncJob)])
def test_both_clients_have_the_same_methods_and_arguments(one: type, other: type) -> None:
    public = [{name: each for name, each in vars(kind).items() if not name.startswith("_")} for kind in (one, other)]
    assert public[0].keys() == public[1].keys()
    for name, method in public[0].items():
        assert [*signature(method).parameters] == [*signature(public[1][name]).parameters]
    assert [*signature(one).parameters] == [*signature(other).parameters]
