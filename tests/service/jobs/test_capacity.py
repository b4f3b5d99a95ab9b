"""Jobs that fit no device: where devices come from, what is refused, and that a refusal costs the queue nothing."""

import json
import shutil
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
import torch
from prometheus_client import CollectorRegistry
from safetensors.numpy import save

from giantleap.models.bundle.bundle import Bundle, read_bundle, write_bundle
from giantleap.models.bundle.descriptor import Limits
from giantleap.models.engines.eager import TorchEngine
from giantleap.models.memory.plan import MemoryPlan
from giantleap.models.route import Route
from giantleap.service.api.app import create_app
from giantleap.service.api.problems import from_job_error
from giantleap.service.errors import DoesNotFit
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.capacity import (
    BundleMemory,
    DeviceShare,
    check_capacity,
    find_places,
    largest_note,
    max_items,
    read_memory,
    share_device,
    to_workload,
)
from giantleap.service.jobs.devices import Device, LoadedBundle, machine_memory_bytes, usable_bytes
from giantleap.service.jobs.grid import LatentGrid
from giantleap.service.jobs.job import UpscaleParams
from giantleap.service.jobs.planning import plan_generate
from giantleap.service.jobs.requests import GenerateRequest
from giantleap.service.settings import POCKET_BUNDLE, Settings, read_settings
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.worker.batch_runner import Drain
from giantleap.service.worker.device import find_device
from giantleap.service.worker.loop import Worker
from tests.redis_fixtures import ProducerOpener
from tests.service.fake_producer import FakeProducer
from tests.service.fakes import GENERATE, FakeConsumer, FakeRoute, make_claim
from tests.waiting import wait_until

MIB = 2**20
LIMIT_PX = 2**27  # leaves it to the memory to refuse
LARGE = replace(GENERATE, width_px=8192, height_px=8192, scale=4)
REFUSALS = 200


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket bundle under the name `large`, with limits that let it draw 8192 px."""
    directory = tmp_path_factory.mktemp("bundles") / "large"
    shutil.copytree(POCKET_BUNDLE, directory)
    said = read_bundle(POCKET_BUNDLE).descriptor
    about = said.bundle.model_copy(update={"name": "large"})
    limits = Limits(min_base_px=64, max_base_px=2048, multiple_px=32, max_steps=100, max_direct_px=8192)
    write_bundle(directory, said.model_copy(update={"bundle": about, "limits": limits}))
    return directory


@pytest.fixture(scope="module")
def bundle(directory: Path) -> Bundle:
    return read_bundle(directory)


@pytest.fixture(scope="module")
def memory(bundle: Bundle) -> BundleMemory:
    return read_memory(bundle)


@pytest.fixture(scope="module")
def plan(memory: BundleMemory) -> MemoryPlan:
    return memory.plans["float32"]


def small_device(memory_bytes: int = 2048 * MIB, **others: LoadedBundle) -> Device:
    return Device("cpu", memory_bytes, {"large": LoadedBundle("float32", 0), **others})


# Devices


def test_a_device_comes_back_from_its_json(plan: MemoryPlan) -> None:
    device = Device(
        "cuda", 24 << 30, {"a": LoadedBundle("bfloat16", 5, plan.lua, prepared=True), "b": LoadedBundle("float32", 7)}
    )
    assert Device.from_json(device.to_json()) == device


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"kind": "tpu", "memory_bytes": 1, "bundles": {}}',
        '{"kind": "cpu", "memory_bytes": 1}',
        '{"kind": "cpu", "memory_bytes": 1, "bundles": {"a": {"dtype": "float32"}}}',
    ],
)
def test_what_another_version_wrote_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Device.from_json(text)


def test_jobs_may_take_less_than_the_whole_device() -> None:
    assert 0.5 * 1000 < usable_bytes("cpu", 1000) < usable_bytes("cuda", 1000) < 1000
    assert 64 * MIB < machine_memory_bytes() < 2**50


def test_a_bundle_has_what_the_others_leave(bundle: Bundle, plan: MemoryPlan, memory: BundleMemory) -> None:
    half = memory.plans["bfloat16"]
    loaded = share_device(
        {"a": "float32", "b": "bfloat16", "c": "float32"}, {"a": memory.plans, "b": memory.plans, "c": {}}
    )
    assert [loaded[name].others_bytes for name in "abc"] == [
        half.weights_bytes,
        plan.weights_bytes,
        half.weights_bytes + plan.weights_bytes,
    ]
    alone, beside = DeviceShare(plan, 1000 * MIB), DeviceShare(plan, 1000 * MIB, others_bytes=400 * MIB)
    work = to_workload(replace(LARGE, width_px=1024, height_px=1024), bundle)
    assert alone.fits(work) and not replace(beside, others_bytes=950 * MIB).fits(work)
    assert beside.own_bytes == 600 * MIB


def test_places_are_those_of_the_workers_that_serve_the_bundle(memory: BundleMemory) -> None:
    devices = [
        small_device(1000),
        Device("cuda", 3000, {"large": LoadedBundle("bfloat16", 7, prepared=True)}),
        Device("cuda", 9000, {"another": LoadedBundle("bfloat16", 0)}),
    ]
    places = find_places("large", {"large": memory}, devices, read_settings())
    assert [(p.memory_bytes, p.others_bytes, p.plan.device, p.plan.dtype, p.plan.prepared) for p in places] == [
        (1000, 0, "cpu", "float32", False),
        (3000, 7, "cuda", "bfloat16", True),
    ]
    assert find_places("large", {"large": memory}, [], read_settings()) == ()
    assert find_places("large", {"large": BundleMemory({})}, devices, read_settings()) == ()


def test_the_setting_counts_before_what_workers_say_and_without_any(memory: BundleMemory) -> None:
    settings = read_settings(device_memory_bytes=500)
    assert [p.memory_bytes for p in find_places("large", {"large": memory}, [small_device(1000)], settings)] == [500]
    unknown = find_places("large", {"large": memory}, [], settings)
    assert {(p.plan.device, p.plan.dtype) for p in unknown} == {("cpu", "float32"), ("cuda", "bfloat16")}
    named = find_places(
        "large", {"large": replace(memory, dtype="float16")}, [], settings.model_copy(update={"device": "cuda:1"})
    )
    assert [(p.plan.device, p.plan.dtype) for p in named] == [("cuda", "float16")]
    on_cpu = find_places("large", {"large": memory}, [], settings.model_copy(update={"device": "cpu"}))
    assert [(p.plan.device, p.plan.dtype) for p in on_cpu] == [("cpu", "float32")]


def test_the_lua_that_only_a_worker_can_read_is_planned_with(memory: BundleMemory, plan: MemoryPlan) -> None:
    blind = BundleMemory({"float32": replace(plan, lua=None)})
    device = Device("cpu", 1000, {"large": LoadedBundle("float32", 0, plan.lua)})
    (place,) = find_places("large", {"large": blind}, [device], read_settings())
    assert place.plan.lua == plan.lua and place.plan.weights_bytes > plan.weights_bytes


# What is refused


def test_a_job_that_fits_is_accepted_and_one_that_does_not_is_refused_with_the_size_that_does(
    bundle: Bundle, plan: MemoryPlan
) -> None:
    place = DeviceShare(plan, 2048 * MIB)
    with pytest.raises(DoesNotFit) as caught:
        check_capacity(LARGE, bundle, [place], LIMIT_PX)
    error = caught.value
    assert error.largest_px is not None and error.needed_bytes is not None
    width_px, height_px = error.largest_px
    assert width_px == height_px and width_px % 128 == 0
    assert error.device_bytes == 2048 * MIB < error.needed_bytes
    for part in ("8192x8192 px", str(error.needed_bytes), str(2048 * MIB), f"{width_px}x{height_px} px"):
        assert part in error.detail
    check_capacity(replace(LARGE, width_px=width_px, height_px=height_px), bundle, [place], LIMIT_PX)
    with pytest.raises(DoesNotFit):
        check_capacity(replace(LARGE, width_px=width_px + 128, height_px=height_px + 128), bundle, [place], LIMIT_PX)


def test_the_largest_device_counts_and_an_unknown_one_refuses_nothing(bundle: Bundle, plan: MemoryPlan) -> None:
    small, roomy = DeviceShare(plan, 2048 * MIB), DeviceShare(plan, 64 << 30)
    check_capacity(LARGE, bundle, [small, roomy], LIMIT_PX)
    check_capacity(LARGE, bundle, [], LIMIT_PX)
    check_capacity(LARGE, bundle, [DeviceShare(replace(plan, lua=None), 1)], LIMIT_PX)
    with pytest.raises(DoesNotFit, match=str(2049 * MIB)):
        check_capacity(LARGE, bundle, [small, DeviceShare(plan, 2049 * MIB)], LIMIT_PX)


def test_where_not_even_the_least_size_fits_the_refusal_says_so(bundle: Bundle, plan: MemoryPlan) -> None:
    with pytest.raises(DoesNotFit, match=f"no size fits beside {plan.weights_bytes} bytes of weights") as caught:
        check_capacity(LARGE, bundle, [DeviceShare(plan, plan.weights_bytes)], LIMIT_PX)
    assert caught.value.largest_px is None


@pytest.mark.parametrize("method", ["lua", "direct", "bicubic"])
def test_the_size_that_is_offered_is_accepted(bundle: Bundle, plan: MemoryPlan, method: str) -> None:
    asked = GenerateRequest.model_validate({"prompt": "a", "width": 8192, "height": 4096, "scale": 4, "method": method})
    settings = read_settings(max_image_px=LIMIT_PX)
    places = [DeviceShare(plan, 1024 * MIB)]
    with pytest.raises(DoesNotFit) as caught:
        plan_generate(asked, bundle, settings, 1, "png", places)
    assert caught.value.largest_px is not None
    width_px, height_px = caught.value.largest_px
    smaller = asked.model_copy(update={"width": width_px, "height": height_px})
    assert plan_generate(smaller, bundle, settings, 1, "png", places).width_px == width_px


def test_an_upscale_is_planned_by_its_latent_or_image(bundle: Bundle, plan: MemoryPlan) -> None:
    latent = UpscaleParams(4, "pocket16", 2, 16, 100, 50, "image", "png")
    assert (to_workload(latent, bundle).width_px, to_workload(latent, bundle).height_px) == (1600, 3200)
    assert to_workload(latent, bundle).source == "latent"
    assert to_workload(replace(latent, output="latent"), bundle).decode is None
    image = to_workload(replace(latent, image_width_px=393, image_height_px=799), bundle)
    assert (image.width_px, image.height_px, image.source) == (1572, 3196, "image")
    with pytest.raises(DoesNotFit) as caught:
        check_capacity(replace(latent, latent_height=1000), bundle, [DeviceShare(plan, 300 * MIB)], LIMIT_PX)
    assert caught.value.largest_px is not None
    assert all(side_px % 32 == 0 for side_px in caught.value.largest_px)
    start = to_workload(replace(GENERATE, strength=0.5), bundle)
    assert start.source == "prompt and image"


def test_a_limit_on_pixels_names_the_largest_size_as_well(bundle: Bundle, plan: MemoryPlan) -> None:
    work = to_workload(LARGE, bundle)
    assert largest_note(work, bundle, [], 1024**2) == "; the largest size that fits is 1024x1024 px"
    assert largest_note(work, bundle, [DeviceShare(replace(plan, lua=None), 1)], 1024**2).endswith("1024x1024 px")
    narrow = largest_note(work, bundle, [DeviceShare(plan, 200 * MIB)], 2048**2)
    assert int(narrow.split()[-2].split("x")[0]) < 2048


# Over HTTP


def app_of(settings: Settings, producer: FakeProducer | JobProducer) -> httpx.ASGITransport:
    return httpx.ASGITransport(create_app(settings, producer))  # type: ignore[arg-type]


def settings_of(directory: Path, **changes: Any) -> Settings:
    return read_settings(bundle=(directory,), max_image_px=LIMIT_PX, **changes)


@pytest.fixture
async def client(directory: Path) -> AsyncIterator[httpx.AsyncClient]:
    producer = FakeProducer(devices=(small_device(),))
    transport = app_of(settings_of(directory), producer)
    async with httpx.AsyncClient(transport=transport, base_url="http://giantleap") as client:
        yield client
    assert not producer.jobs


async def test_a_refusal_is_a_problem_that_a_program_can_read(client: httpx.AsyncClient) -> None:
    answer = await client.post("/generate", json={"prompt": "a", "width": 8192, "height": 8192, "scale": 4})
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["code"] == "does_not_fit" and not problem["retryable"]
    assert problem["needed_bytes"] > problem["device_bytes"] == 2048 * MIB
    largest = problem["largest"]
    assert f"{largest['width']}x{largest['height']} px" in problem["detail"]


async def test_an_upscale_to_8192_px_is_refused_as_well(client: httpx.AsyncClient) -> None:
    body = save({"latent": np.zeros((16, 256, 256), np.float32)})
    headers = {"Content-Type": "application/x-safetensors"}
    answer = await client.post("/upscale", params={"scale": 4}, content=body, headers=headers)
    assert answer.status_code == 422 and answer.json()["code"] == "does_not_fit"


async def test_two_hundred_refusals_leave_the_queue_alone_and_take_less_than_50_ms(
    directory: Path, settings: Settings, open_producer: ProducerOpener, redis_client: redis.Redis
) -> None:
    served = settings.model_copy(update={"bundle": (directory,), "max_image_px": LIMIT_PX})
    worker = JobConsumer(open_redis(str(served.redis_url)), served, ("large",), "w", small_device())
    worker.open()
    try:
        async with (
            open_producer() as producer,
            httpx.AsyncClient(transport=app_of(served, producer), base_url="http://giantleap") as client,
        ):
            before = redis_state(redis_client, served.key_prefix)
            body = {"prompt": "a red ball", "width": 8192, "height": 8192, "scale": 4}
            took_s, computed_s = [], []
            for _ in range(REFUSALS):
                start_s, cpu_s = time.perf_counter(), time.thread_time()
                answer = await client.post("/generate", json=body)
                took_s.append(time.perf_counter() - start_s)
                computed_s.append(time.thread_time() - cpu_s)
                assert answer.status_code == 422 and answer.json()["code"] == "does_not_fit"
            assert redis_state(redis_client, served.key_prefix) == before
            stats = await producer.stats()
            assert (sum(stats.queued.values()), stats.processing, stats.delayed) == (0, 0, 0)
    finally:
        worker.close()
    # 3 ms of computing. On the clock the quickest quarter counts: neighbours take the processors away for a while.
    assert statistics.median(computed_s) < 0.050
    assert statistics.quantiles(took_s, n=4)[0] < 0.050


def redis_state(client: redis.Redis, prefix: str) -> dict[bytes, int]:
    """Every key but the heartbeat's, and how much it holds."""
    state = {}
    for key in client.scan_iter(f"{{{prefix}}}:*"):
        if not key.endswith((b":workers", b":devices")):
            state[key] = client.memory_usage(key) or 0
    return state


# Through Redis


async def test_the_api_learns_the_devices_of_live_workers_and_forgets_those_that_left(
    settings: Settings, open_producer: ProducerOpener, redis_client: redis.Redis
) -> None:
    async with open_producer() as producer:
        assert producer.devices == ()
        workers = [
            JobConsumer(open_redis(str(settings.redis_url)), settings, ("pocket",), f"w{n}", device)
            for n, device in enumerate((small_device(111), small_device(222), None))
        ]
        for worker in workers:
            worker.open()
        await producer.read_devices()
        assert sorted(device.memory_bytes for device in producer.devices) == [111, 222]
        workers[0].close()
        await producer.read_devices()
        assert [device.memory_bytes for device in producer.devices] == [222]
        key = f"{{{settings.key_prefix}}}:devices"
        redis_client.hset(key, "dead", small_device(333).to_json())
        await producer.read_devices()
        assert [device.memory_bytes for device in producer.devices] == [222], "the dead one has no heartbeat"
        wait_until(lambda: not redis_client.hexists(key, "dead"))  # the next heartbeat sweeps it away
        redis_client.delete(key)  # as after a loss of Redis: the next heartbeat brings it back
        wait_until(lambda: redis_client.hlen(key) == 1)
        for worker in workers[1:]:
            worker.close()
        await producer.read_devices()
        assert producer.devices == () and redis_client.hlen(key) == 0


async def test_a_device_that_cannot_be_read_is_left_out(
    settings: Settings, open_producer: ProducerOpener, redis_client: redis.Redis
) -> None:
    worker = JobConsumer(open_redis(str(settings.redis_url)), settings, ("pocket",), "w", small_device(5))
    worker.open()
    try:
        async with open_producer() as producer:
            (name,) = redis_client.hkeys(f"{{{settings.key_prefix}}}:devices")
            assert isinstance(name, bytes)
            redis_client.zadd(f"{{{settings.key_prefix}}}:workers", {"odd": time.time() * 1000 + 60_000})
            redis_client.hset(f"{{{settings.key_prefix}}}:devices", "odd", "{}")
            await producer.read_devices()
            assert [device.memory_bytes for device in producer.devices] == [5]
    finally:
        worker.close()


# In the worker


@pytest.fixture
def worker_of(bundle: Bundle, plan: MemoryPlan) -> Iterator[Any]:
    def make(consumer: FakeConsumer, route: FakeRoute, memory_bytes: int) -> Worker:
        stop = threading.Event()
        consumer.on_empty = stop.set
        settings = read_settings(max_image_px=LIMIT_PX, batch_budget_latent_px=10**9)
        place = DeviceShare(plan, memory_bytes)
        metrics = Metrics(CollectorRegistry())
        grids = {"tiny": LatentGrid(8, 8)}
        return Worker(
            {"tiny": route},  # type: ignore[dict-item]
            grids,
            consumer,  # type: ignore[arg-type]
            metrics,
            settings,
            Drain(stop, 1.0),
            {"tiny": bundle},
            {"tiny": place},
        )

    yield make


def test_a_worker_refuses_what_its_device_cannot_hold_and_lives_on(worker_of: Any) -> None:
    consumer = FakeConsumer([make_claim("large", LARGE), make_claim("small")])
    route = FakeRoute()
    worker_of(consumer, route, 2048 * MIB).run()
    error = consumer.failed["large"]
    assert error.code == "does_not_fit" and not error.retryable and "the largest size that fits" in error.detail
    assert isinstance(from_job_error(error), DoesNotFit)
    assert list(consumer.finished) == ["small"] and route.batches == [1]


def test_a_worker_cuts_a_batch_to_what_its_device_holds(worker_of: Any, bundle: Bundle, plan: MemoryPlan) -> None:
    params = replace(GENERATE, width_px=512, height_px=512, scale=1)
    three_bytes = plan.estimate(replace(to_workload(params, bundle), items=3, decode=None)).peak_bytes
    assert max_items(params, bundle, DeviceShare(plan, three_bytes), 8) == 3
    consumer = FakeConsumer([make_claim(f"job-{n}", params) for n in range(8)])
    route = FakeRoute()
    worker_of(consumer, route, three_bytes).run()
    assert route.batches == [3, 3, 2] and len(consumer.finished) == 8
    assert max_items(params, bundle, DeviceShare(replace(plan, denoiser={}), three_bytes), 8) == 8


def test_a_worker_finds_the_share_of_each_bundle(bundle: Bundle, plan: MemoryPlan) -> None:
    route = Route.open(bundle, torch.device("cpu"), torch.float32)
    device, places = find_device({"large": bundle}, {"large": route}, read_settings(device_memory_bytes=1000 * MIB))
    assert (device.kind, device.memory_bytes) == ("cpu", 1000 * MIB)
    assert isinstance(route.lua, TorchEngine) and route.pixel is not None
    prepared = route.lua.prepared and route.pixel.prepared  # which form is faster differs between machines
    assert places["large"] == DeviceShare(replace(plan, prepared=prepared), 1000 * MIB)
    assert device.bundles["large"] == LoadedBundle("float32", 0, route.lua.spec, prepared)
    found, _ = find_device({"large": bundle}, {"large": route}, read_settings())
    assert found.memory_bytes == usable_bytes("cpu", machine_memory_bytes())
    assert json.loads(device.to_json())["bundles"]["large"]["dtype"] == "float32"
