"""Split pools end to end: two workers with real networks beside a whole one, processes that are killed, readiness."""

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import safetensors.torch
import torch
from PIL import Image

from giantleap.models.worker_role import WorkerRole
from giantleap.service.api.app import create_app
from giantleap.service.errors import BadConfiguration
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.devices import Device, missing_roles
from giantleap.service.jobs.job import Job, JobRecord, JobState, UpscaleParams
from giantleap.service.settings import Settings, read_settings
from giantleap.service.supervisor.supervisor import serve
from giantleap.service.worker.process import run_worker
from tests.service.fake_producer import FakeProducer
from tests.service.paper_bundle import write_paper_bundle
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[3]
FAKE_WORKER = Path(__file__).parents[1] / "fake_worker.py"
TIMEOUT_S = 120.0
MIB = 1 << 20
HALVES: tuple[WorkerRole, ...] = (WorkerRole.GENERATE, WorkerRole.DECODE)


@contextmanager
def running(settings: Settings, *pools: WorkerRole) -> Iterator[None]:
    """A ready worker in a thread for each of the pools; fails the test when one raised or did not stop."""
    stop, ready, threads = threading.Event(), threading.Semaphore(0), []
    errors: list[BaseException] = []

    def run(role: WorkerRole) -> None:
        try:
            run_worker(settings.model_copy(update={"role": role}), stop, on_ready=ready.release)
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            errors.append(error)
            ready.release()

    try:
        for role in pools:  # one after the other: the libraries that load models are not made for threads
            threads.append(threading.Thread(target=run, args=(role,)))
            threads[-1].start()
            assert ready.acquire(timeout=TIMEOUT_S) and not errors, errors
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT_S)
    assert not errors and not any(thread.is_alive() for thread in threads), errors


@pytest.fixture
def tiny(settings: Settings, tiny_bundle_dir: Path) -> Settings:
    """Images one by one, so that the order in which jobs come changes no bit of them."""
    changes: dict[str, object] = {"bundle": (tiny_bundle_dir,), "torch_threads": 1, "device": "cpu", "batch_items": 1}
    return settings.model_copy(update=changes | {"visibility_timeout_s": 20.0})


def asked_jobs(make_job: Any) -> list[tuple[Job, bytes | None]]:
    """Drawn and given, to images and latents, one and several, by each method."""
    drawn = {"bundle": "tiny", "width_px": 128, "height_px": 128, "steps": 2}
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(picture, "PNG")
    latent = safetensors.torch.save({"latent": torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))})
    given = UpscaleParams(2, "tiny", 1, 16, 8, 8, "image", "png")
    jobs: list[tuple[Job, bytes | None]] = [
        (make_job(**drawn, num_images=2, output_format="webp"), None),
        (make_job(**drawn, strength=0.5, prompt="zeppelin " * 90), picture.getvalue()),
        (make_job(**drawn | {"scale": 1, "width_px": 64, "height_px": 64}), None),
        (make_job(**drawn, method="swinir"), None),
        (make_job(**drawn, method="direct"), None),
    ]
    given_jobs = [given, replace(given, output="latent"), replace(given, image_width_px=64, image_height_px=64)]
    bodies = [latent, latent, picture.getvalue()]
    for params, body in zip(given_jobs, bodies, strict=True):
        jobs.append((replace(make_job(bundle="tiny"), params=params), body))
    return jobs


async def run_jobs(producer: JobProducer, jobs: list[tuple[Job, bytes | None]]) -> list[tuple[JobRecord, list[bytes]]]:
    """Each record once it is final, and its results."""
    for job, body in jobs:
        await producer.enqueue(job, body)
    ended = []
    for job, _ in jobs:
        record = await producer.wait(job.id, TIMEOUT_S)
        found = [await producer.read_result(job.id, index) for index in range(len(record.results))]
        ended.append((record, [content for content in found if content is not None]))
    return ended


async def test_two_pools_give_the_answers_of_one_to_the_bit(tiny: Settings, open_producer: Any, make_job: Any) -> None:
    async with open_producer(visibility_timeout_s=20.0) as producer:
        with running(tiny, WorkerRole.ALL):
            expected = await run_jobs(producer, asked_jobs(make_job))
        jobs = asked_jobs(make_job)
        with running(tiny, *HALVES):
            found = await run_jobs(producer, jobs)
            await producer.read_devices()
            assert sorted(device.role for device in producer.devices) == sorted(HALVES)
            assert missing_roles(producer.devices) == []
        for (whole, files), (split, split_files) in zip(expected, found, strict=True):
            assert whole.state is split.state is JobState.SUCCEEDED, split.error
            assert split_files == files and len(files) == len(whole.results) and split.results == whole.results
            assert set(split.stages) == set(whole.stages) and split.warnings == whole.warnings
        assert found[1][0].warnings, "what the drawing worker had to say came through"
        names = [event.name async for event in producer.events(jobs[0][0].id)]
        assert names[0] == "queued" and names[-1] == "done" and names.count("done") == 1
        assert names.count("started") == names.count("queued") == 2
        stages = [event.data["stage"] async for event in producer.events(jobs[0][0].id) if event.name == "stage"]
        assert stages[0] == "generate" and stages[-1] == "encode" and stages.count("generate") == 2
        assert (await producer.stats()).live_workers == 0


class Pool:
    """Fake worker processes of one deployment, what they noted, and the word on which they go on."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._client, self._prefix = client, settings.key_prefix
        self._url = str(settings.redis_url)
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, role: WorkerRole) -> "subprocess.Popen[bytes]":
        command = [sys.executable, str(FAKE_WORKER), self._url, self._prefix, "2.0", role]
        self.started.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT))
        return self.started[-1]

    def notes(self, what: str) -> list[int]:
        """Process ids, in order."""
        notes: list[Any] = self._client.lrange(f"{self._prefix}-log", 0, -1)
        lines = [line.decode().split() for line in notes]
        return [int(pid) for name, _, pid in lines if name == what]

    def await_note(self, what: str, worker: "subprocess.Popen[bytes]") -> None:
        wait_until(lambda: worker.pid in self.notes(what), f"{what} by process {worker.pid}")

    def go(self, on: bool) -> None:
        if on:
            self._client.set(f"{self._prefix}-go", 1, ex=600)
        else:
            self._client.delete(f"{self._prefix}-go")


@pytest.fixture
def pool(redis_client: redis.Redis, settings: Settings) -> Iterator[Pool]:
    made = Pool(redis_client, settings)
    yield made
    for worker in made.started:
        worker.kill()
        worker.wait()


async def test_a_killed_drawer_is_drawn_again_and_a_killed_finisher_only_finished_again(
    pool: Pool, open_producer: Any, make_job: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    async with open_producer(visibility_timeout_s=2.0) as producer:
        job = make_job(negative_prompt="hold")
        await producer.enqueue(job, b"a picture to start from")
        victim = pool.start(WorkerRole.GENERATE)
        pool.await_note("start", victim)
        victim.kill()
        drawer = pool.start(WorkerRole.GENERATE)
        pool.await_note("start", drawer)
        pool.go(True)
        pool.await_note("handed", drawer)
        pool.go(False)
        second_victim = pool.start(WorkerRole.DECODE)
        pool.await_note("start", second_victim)
        second_victim.kill()
        finisher = pool.start(WorkerRole.DECODE)
        pool.await_note("start", finisher)
        pool.go(True)
        record = await producer.wait(job.id, 60.0)
        assert record.state is JobState.SUCCEEDED and record.stages["generate"] == 1.0
        assert await producer.read_result(job.id, 0) == f"{job.id} by {finisher.pid}".encode()
        assert pool.notes("start") == [victim.pid, drawer.pid, second_victim.pid, finisher.pid]
        assert pool.notes("handed") == [drawer.pid]
        names = [event.name async for event in producer.events(job.id)]
        assert names.count("done") == 1 and names.count("started") == 4
    tag = Keys(settings.key_prefix).tag
    streams = list(redis_client.scan_iter(f"{tag}:stream:*"))
    assert len(streams) == 4 and not any(redis_client.xlen(stream) for stream in streams)
    assert not list(redis_client.scan_iter(f"{tag}:input:*")) and not redis_client.exists(f"{tag}:running")


def loaded(role: WorkerRole, *names: str) -> Device:
    return Device("cpu", 1 << 30, 0, {name: {} for name in names}, role)


def test_a_half_without_a_worker_is_named() -> None:
    assert missing_roles([]) == missing_roles([loaded(WorkerRole.ALL, "a", "b")]) == []
    assert (
        missing_roles([loaded(WorkerRole.GENERATE, "a"), loaded(WorkerRole.DECODE, "a"), loaded(WorkerRole.ALL, "b")])
        == []
    )
    assert missing_roles([loaded(WorkerRole.GENERATE, "a", "b"), loaded(WorkerRole.DECODE, "b", "c")]) == [
        "no worker of role decode serves bundle a",
        "no worker of role generate serves bundle c",
    ]


async def test_the_service_is_ready_when_both_halves_are(tmp_path: Path) -> None:
    producer = FakeProducer(devices=(loaded(WorkerRole.GENERATE, "paper"),))
    app = create_app(read_settings(bundle=(write_paper_bundle(tmp_path / "paper"),)), producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json()["reasons"] == ["no worker of role decode serves bundle paper"]
        producer.devices = (loaded(WorkerRole.GENERATE, "paper"), loaded(WorkerRole.DECODE, "paper"))
        assert (await client.get("/readyz")).status_code == 200


def test_a_device_of_an_unknown_role_is_refused() -> None:
    text = loaded(WorkerRole.DECODE, "a").to_json()
    assert Device.from_json(text).role is WorkerRole.DECODE
    with pytest.raises(ValueError, match="draw"):
        Device.from_json(text.replace('"decode"', '"draw"'))


@pytest.mark.parametrize("wrong", ["upscale", "generate,decode", "ALL", ""])
def test_other_roles_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"role\n.*'all', 'generate' or 'decode'"):
        read_settings(role=wrong)


def test_what_needs_role_all_says_so() -> None:
    with pytest.raises(ValueError, match="measure_protocol"):
        read_settings(role=WorkerRole.GENERATE, measure_protocol=True)
    with pytest.raises(BadConfiguration, match="worker --role"):
        serve(read_settings(role=WorkerRole.DECODE), read_settings)
