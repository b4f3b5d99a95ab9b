"""Real bundles on demand: their images are those of workers that serve one bundle each, and their memory is freed."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from prometheus_client import CollectorRegistry

from giantleap.models.adapters.files import read_file
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.live_storage import tensor_bytes
from giantleap.models.route import Route
from giantleap.models.runs import warm
from giantleap.service.errors import BadConfiguration
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import Job, JobState
from giantleap.service.settings import Settings, read_settings
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.worker.bundles import BundleCache
from giantleap.service.worker.engines import open_route
from giantleap.service.worker.process import open_bundles, run_worker
from tests.lora_files import write_lora
from tests.redis_fixtures import JobMaker, ProducerOpener
from tests.service.fakes import GENERATE, FakeConsumer, make_claim, open_worker
from tests.service.worker.test_loop_redis import running_worker, upscale_job
from tests.tiny_bundle import write_tiny_bundle

CPU = torch.device("cpu")
BUNDLES, FITTING, JOBS = 10, 3, 200
TIMEOUT_S = 600.0


@pytest.fixture(scope="module")
def ten_dirs(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    root = tmp_path_factory.mktemp("ten")
    for number in range(BUNDLES):
        write_tiny_bundle(root / f"tiny{number}", f"tiny{number}", seed=number)
    return sorted(root.iterdir())


def open_cache(settings: Settings, budget_bytes: int | None = None) -> BundleCache:
    bundles = {bundle.name: bundle for bundle in map(read_bundle, settings.bundle)}

    def open_one(bundle: Any) -> Any:
        return open_route(bundle, settings, CPU, torch.float32)

    return BundleCache(bundles, open_one, CPU, budget_bytes, Metrics(CollectorRegistry()))


def warm_tiny(route: Route) -> None:
    warm(route, 64, 64, steps=1)


def test_an_evicted_bundle_frees_its_weights_its_engines_and_its_loras(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(str(read_bundle(tiny_bundle_dir).pipeline))
    lora = read_file(write_lora(tmp_path / "ink.safetensors", pipeline, 1))
    del pipeline
    settings = read_settings(bundle=(tiny_bundle_dir,), lora_dir=tmp_path, batch_items=1)
    cache = open_cache(settings, budget_bytes=1 << 40)
    before_bytes = tensor_bytes()
    cache.measure("tiny", warm_tiny)
    size_bytes = cache.sizes_bytes["tiny"]
    assert 100_000 < size_bytes == tensor_bytes() - before_bytes
    jobs = [replace(GENERATE, width_px=64, height_px=64, steps=2, loras=uses) for uses in ((), (lora.use(0.5),))]
    consumer, stop = FakeConsumer([make_claim(str(n), params) for n, params in enumerate(jobs)]), threading.Event()
    consumer.on_empty = stop.set
    open_worker(None, consumer, settings, bundles=cache, stop=stop)[0].run()
    assert set(consumer.finished) == {"0", "1"}

    route = cache.use("tiny")
    assert route.generator.adapters.loaded == ("ink",) and route.lua is not None and route.pixel is not None
    parts = (route, route.generator, route.generator.pipeline.unet, route.vae.model, route.lua, route.pixel)
    watched = [weakref.ref(part) for part in parts]
    parameters = [weakref.ref(each) for each in route.generator.pipeline.unet.parameters()]
    del route, parts
    cache._evict_until(0)
    assert [each() for each in watched] == [None] * len(watched)
    assert not any(each() is not None for each in parameters)
    assert tensor_bytes() - before_bytes < size_bytes / 10


def test_loading_again_and_again_takes_no_more_memory_and_gives_the_same_bits(ten_dirs: Sequence[Path]) -> None:
    settings = read_settings(bundle=tuple(ten_dirs[:2]), batch_items=1)
    cache = open_cache(settings, budget_bytes=1 << 40)
    for name in cache.bundles:
        cache.measure(name, warm_tiny)
    cache._budget_bytes = max(cache.sizes_bytes.values())
    images: dict[str, set[bytes]] = {}
    held_bytes = []
    for turn in range(3):
        for name in cache.bundles:
            consumer, stop = FakeConsumer([make_claim(f"{turn}", bundle=name)]), threading.Event()
            consumer.on_empty = stop.set
            open_worker(None, consumer, settings, bundles=cache, stop=stop)[0].run()
            images.setdefault(name, set()).add(consumer.finished[f"{turn}"][0][1])
        held_bytes.append(tensor_bytes())
    assert [len(each) for each in images.values()] == [1, 1] and len(set.union(*images.values())) == 2
    assert max(held_bytes) - min(held_bytes) < min(cache.sizes_bytes.values()) / 10


def test_a_bundle_that_never_fits_stops_the_start_with_one_line(settings: Settings, tiny_bundle_dir: Path) -> None:
    changed = settings.model_copy(update={"bundle": (tiny_bundle_dir,), "device": "cpu", "bundle_memory_bytes": 1000})
    with pytest.raises(BadConfiguration, match=r"^bundle tiny takes \d+ bytes once loaded, .*raise it.*$") as stopped:
        run_worker(changed, threading.Event())
    assert "\n" not in str(stopped.value)


class Recorder(Metrics):
    """Notes what tensors hold whenever a bundle was measured."""

    def __init__(self) -> None:
        super().__init__(CollectorRegistry())
        self.held_bytes = [tensor_bytes()]

    def set_bundle_size(self, bundle: str, size_bytes: int) -> None:
        self.held_bytes.append(tensor_bytes())
        super().set_bundle_size(bundle, size_bytes)


def test_the_start_measures_one_bundle_after_the_other_and_the_default_stays(ten_dirs: Sequence[Path]) -> None:
    settings = read_settings(bundle=tuple(ten_dirs[:3]), device="cpu", bundle_memory_bytes=1 << 30)
    metrics = Recorder()
    cache, device = open_bundles(settings, metrics, threading.Event())
    before_bytes, *held_bytes = metrics.held_bytes
    sizes_bytes = list(cache.sizes_bytes.values())
    assert [round((held - before_bytes) / size, 1) for held, size in zip(held_bytes, sizes_bytes, strict=True)] == [
        1
    ] * 3
    assert cache.loaded == device.loaded == ("tiny0",)
    assert set(device.bundles) == {"tiny0", "tiny1", "tiny2"}
    assert cache.use("tiny0").vae.budget_bytes == device.memory_bytes - device.loaded_bytes


def mixed_jobs(make_job: JobMaker, jobs: int) -> list[tuple[Job, bytes | None]]:
    """Jobs of all bundles in turn, with every method, several sizes, and latents to upscale."""
    mixed: list[tuple[Job, bytes | None]] = []
    methods = ("lua", "bicubic", "swinir", "direct")
    for number in range(jobs):
        name = f"tiny{number * 7 % BUNDLES}"
        if number % 7 == 3:
            job, body = upscale_job(4 + number % 3, 6)
            mixed.append((replace(job, id=make_job().id, bundle=name), body))
        else:
            side_px = (64, 128)[number // 4 % 2]
            params = {"width_px": side_px, "height_px": 64, "method": methods[number % 4], "steps": 2, "seed": number}
            mixed.append((make_job(bundle=name, **params), None))
    return mixed


def to_claims(jobs: Sequence[tuple[Job, bytes | None]], name: str) -> list[Any]:
    return [replace(make_claim(job.id, job.params, body), job=job) for job, body in jobs if job.bundle == name]


def alone(directory: Path, jobs: Sequence[tuple[Job, bytes | None]]) -> Mapping[str, bytes]:
    """The files by job of a worker that serves this bundle alone."""
    settings = read_settings(bundle=(directory,), batch_items=1)
    consumer, stop = FakeConsumer(to_claims(jobs, directory.name)), threading.Event()
    consumer.on_empty = stop.set
    route = open_route(read_bundle(directory), settings, CPU, torch.float32)
    open_worker(route, consumer, settings, name=directory.name, stop=stop, bundle=read_bundle(directory))[0].run()
    return {job_id: files[0][1] for job_id, files in consumer.finished.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_ten_bundles_on_a_budget_of_three_give_200_mixed_jobs_the_files_of_ten_workers(
    ten_dirs: Sequence[Path], settings: Settings, make_job: JobMaker, open_producer: ProducerOpener
) -> None:
    probe = open_cache(read_settings(bundle=(ten_dirs[0],)))
    probe.measure("tiny0", warm_tiny)
    budget_bytes = int(probe.sizes_bytes["tiny0"] * (FITTING + 0.5))
    del probe
    gc.collect()
    shared = settings.model_copy(
        update={
            "bundle": tuple(ten_dirs),
            "bundle_memory_bytes": budget_bytes,
            "loaded_first_s": 0.0,
            "batch_budget_latent_px": 1,  # one image at a time: batches differ by rounding
            "torch_threads": 1,
            "job_ttl_s": 3600,
            "device": "cpu",
        }
    )
    jobs = mixed_jobs(make_job, JOBS)
    async with open_producer() as producer:
        for job, body in jobs:
            await producer.enqueue(job, body)
        with running_worker(shared):
            records = [await producer.wait(job.id, TIMEOUT_S) for job, _ in jobs]
            loaded = [device.loaded for device in await read_devices(producer)]
        assert {record.state for record in records} == {JobState.SUCCEEDED}
        files = {job.id: await producer.read_result(job.id, 0) for job, _ in jobs}
    assert [len(each) for each in loaded] == [FITTING]
    assert sum("load" in record.stages for record in records) > JOBS / 2, "the bundles came and went"
    expected: dict[str, bytes] = {}
    for directory in ten_dirs:
        expected |= await asyncio.to_thread(alone, directory, jobs)
    wrong = [job.id for job, _ in jobs if files[job.id] != expected[job.id]]
    assert not wrong and len(set(expected.values())) == JOBS


async def read_devices(producer: JobProducer) -> Sequence[Any]:
    await producer.read_devices()
    return producer.devices
