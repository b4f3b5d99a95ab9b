"""A whole worker on a real Redis and a real, tiny pipeline: jobs in, images out, cancel, drain, progress."""

import asyncio
import dataclasses
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
from PIL import Image

from giantleap.service.errors import BadConfiguration
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import Job, JobState, Priority, UpscaleParams
from giantleap.service.settings import Settings
from giantleap.service.supervisor.embedded_redis import free_port
from giantleap.service.worker.process import run_worker

TIMEOUT_S = 120.0


@pytest.fixture
def worker_settings(settings: Settings, tiny_bundle_dir: Path) -> Settings:
    return settings.model_copy(update={"bundle": (tiny_bundle_dir,), "torch_threads": 1, "device": "cpu"})


@contextmanager
def running_worker(settings: Settings) -> Iterator[threading.Event]:
    """A worker in a thread; fails the test when it raised, or did not stop in time."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            run_worker(settings, stop)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's own thread
            errors.append(error)

    thread = threading.Thread(target=run, name="worker")
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "the worker did not stop"
    assert not errors, errors


async def ready(producer: JobProducer) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while (await producer.stats()).live_workers == 0:
        assert time.monotonic() < deadline_s, "the worker never became ready"
        await asyncio.sleep(0.02)


async def result_of(producer: JobProducer, job: Job, index: int = 0) -> bytes:
    content = await producer.read_result(job.id, index)
    assert content is not None
    return content


def upscale_job(height: int, width: int) -> tuple[Job, bytes]:
    latent = torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(height))
    params = UpscaleParams(2, "tiny", 1, 16, height, width, "latent", "png")
    job = Job(f"upscale-{height}-{width}", "tiny", priority=Priority.LOW, created_at_s=time.time(), params=params)
    return job, safetensors.torch.save({"latent": latent})


async def test_jobs_become_images_and_latents_with_progress(
    worker_settings: Settings, open_producer: Any, make_job: Any
) -> None:
    async with open_producer() as producer:
        generated = [make_job(bundle="tiny", width_px=128, height_px=128, seed=seed) for seed in (1, 2, 1)]
        large = make_job(bundle="tiny", scale=4, width_px=256, height_px=128, num_images=2, output_format="webp")
        upscaled, body = upscale_job(5, 7)
        for job in (*generated, large):
            await producer.enqueue(job)
        await producer.enqueue(upscaled, body)
        with running_worker(worker_settings):
            records = [await producer.wait(job.id, TIMEOUT_S) for job in (*generated, large, upscaled)]
        assert [record.state for record in records] == [JobState.SUCCEEDED] * 5

        images = [Image.open(io.BytesIO(await result_of(producer, job))) for job in generated]
        assert [image.size for image in images] == [(128, 128)] * 3
        assert images[0].tobytes() == images[2].tobytes() != images[1].tobytes(), "a seed is an image"

        pair = [Image.open(io.BytesIO(await result_of(producer, large, index))) for index in (0, 1)]
        assert [(image.format, image.size) for image in pair] == [("WEBP", (256, 128))] * 2
        assert [file.seed for file in records[3].results] == [7, 8]

        enlarged = safetensors.torch.load(await result_of(producer, upscaled))["latent"]
        assert enlarged.shape == (16, 10, 14) and enlarged.isfinite().all()

        assert set(records[0].stages) == {"generate", "upscale", "decode", "encode"}
        assert all(0 < duration_s < TIMEOUT_S for duration_s in records[0].stages.values())
        events = [event async for event in producer.events(generated[0].id)]
        assert [event.data["step"] for event in events if event.name == "step"] == [1, 2, 3, 4]
        assert events[-1].name == "done"
        assert (await producer.stats()).live_workers == 0, "the worker signed off"


async def test_a_running_job_is_canceled_between_steps_and_the_next_one_runs(
    worker_settings: Settings, open_producer: Any, make_job: Any
) -> None:
    async with open_producer() as producer:
        long_job = make_job(bundle="tiny", width_px=128, height_px=128, steps=1000)
        after = make_job(bundle="tiny", width_px=128, height_px=128, steps=2)
        with running_worker(worker_settings):
            await ready(producer)
            await producer.enqueue(long_job)
            async for event in producer.events(long_job.id):
                if event.name == "step":
                    break
            await producer.cancel(long_job.id)
            canceled = await producer.wait(long_job.id, TIMEOUT_S)
            await producer.enqueue(after)
            ended = await producer.wait(after.id, TIMEOUT_S)
        assert canceled.state is JobState.CANCELED and not canceled.results
        steps = [event async for event in producer.events(long_job.id) if event.name == "step"]
        assert steps[-1].data["step"] < 1000
        assert ended.state is JobState.SUCCEEDED


async def test_a_stop_past_its_grace_leaves_the_job_to_the_next_worker(
    worker_settings: Settings, open_producer: Any, make_job: Any
) -> None:
    async with open_producer() as producer:
        job = make_job(bundle="tiny", width_px=128, height_px=128, steps=80)
        await producer.enqueue(job)
        impatient = worker_settings.model_copy(update={"drain_grace_s": 0.0})
        with running_worker(impatient):
            async for event in producer.events(job.id):
                if event.name == "step":
                    break
        released = await producer.get(job.id)
        assert released is not None and released.state is JobState.QUEUED
        with running_worker(worker_settings):
            record = await producer.wait(job.id, TIMEOUT_S)
        assert record.state is JobState.SUCCEEDED and record.deliveries == 1, "a drain is no failed start"


async def test_one_bad_input_fails_alone_among_jobs_that_share_its_batch(
    worker_settings: Settings, open_producer: Any
) -> None:
    async with open_producer() as producer:
        jobs = [upscale_job(height, 8) for height in (5, 6, 7)]
        await producer.enqueue(*jobs[0])
        await producer.enqueue(jobs[1][0], b"this is no tensor")
        await producer.enqueue(*jobs[2])
        with running_worker(worker_settings):
            records = [await producer.wait(job.id, TIMEOUT_S) for job, _ in jobs]
        assert [str(record.state) for record in records] == ["succeeded", "failed", "succeeded"]
        assert records[1].error is not None and records[1].error.code == "engine_error"
        assert records[1].deliveries == 1, "what cannot succeed is not tried again"


async def test_a_stop_while_loading_claims_nothing(
    worker_settings: Settings, open_producer: Any, make_job: Any
) -> None:
    async with open_producer() as producer:
        job = make_job(bundle="tiny", width_px=128, height_px=128)
        await producer.enqueue(job)
        with running_worker(worker_settings) as stop:
            stop.set()
        record = await producer.get(job.id)
        assert record is not None and record.state is JobState.QUEUED and record.deliveries == 0


def test_a_stop_while_measuring_the_protocol_is_seen_after_the_run(
    worker_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with running_worker(worker_settings.model_copy(update={"measure_protocol": True})) as stop:
        stop.set()
    assert [record.message for record in caplog.records if "protocol" in record.message] == [
        "worker measuring protocol"
    ]
    assert "worker ready" not in caplog.text


async def test_a_worker_alone_answers_for_itself_on_its_metrics_port(
    worker_settings: Settings, open_producer: Any, make_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    settings = worker_settings.model_copy(update={"metrics_port": free_port()})
    async with open_producer() as producer:
        job = make_job(bundle="tiny", width_px=128, height_px=128)
        await producer.enqueue(job)
        with running_worker(settings):
            await producer.wait(job.id, TIMEOUT_S)
            text = await asyncio.to_thread(read_metrics, settings, 'status="succeeded"')
    assert 'giantleap_jobs_total{bundle="tiny",kind="generate",status="succeeded"} 1.0' in text
    for scale in (1, 2, 4):
        warm = f'{{bundle="tiny",engine="torch",method="lua",scale="{scale}",stage="decode",warmup="true"}} 1.0'
        assert f"giantleap_stage_duration_seconds_count{warm}" in text
    assert 'giantleap_engine_info{bundle="tiny",decoder="plain",device="cpu",dtype="float32",engine="torch"' in text


def read_metrics(settings: Settings, awaited: str) -> str:
    """The worker's own metrics once they hold `awaited`: a job is counted just after it is ended."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        text = httpx.get(f"http://{settings.host}:{settings.metrics_port}/metrics", timeout=60).text
        if awaited in text:
            return text
        time.sleep(0.05)
    raise AssertionError(f"{awaited} never came up")


def test_a_wrong_bundle_stops_the_worker_before_it_signs_on(worker_settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(BadConfiguration, match="is no bundle"):
        run_worker(worker_settings.model_copy(update={"bundle": (tmp_path,)}), threading.Event())


async def test_a_prompt_never_reaches_the_log(
    worker_settings: Settings, open_producer: Any, make_job: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with open_producer() as producer:
        job = make_job(bundle="tiny", width_px=128, height_px=128, prompt="a purple zeppelin", steps=2)
        crashing = dataclasses.replace(job, id="crashing", params=dataclasses.replace(job.params, height_px=36))
        await producer.enqueue(job)
        await producer.enqueue(crashing)
        with running_worker(worker_settings):
            states = [(await producer.wait(name, TIMEOUT_S)).state for name in (job.id, "crashing")]
        assert states == [JobState.SUCCEEDED, JobState.FAILED]
    assert "job ended" in caplog.text and "zeppelin" not in caplog.text
    assert all("zeppelin" not in str(getattr(record, "fields", "")) for record in caplog.records)
