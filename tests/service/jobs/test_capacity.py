"""Jobs that fit no device: where devices come from, what is refused, and that a refusal costs the queue nothing."""

import shutil
import statistics
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
from safetensors.numpy import save

from giantleap.models.bundle.bundle import Bundle, read_bundle, write_bundle
from giantleap.models.bundle.descriptor import Limits
from giantleap.models.worker_role import WorkerRole
from giantleap.service.api.app import create_app
from giantleap.service.api.problems import from_job_error
from giantleap.service.errors import DoesNotFit
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.capacity import check_capacity, largest_note, max_items, required_bytes, to_workload
from giantleap.service.jobs.devices import Device, StagePeak, machine_memory_bytes, usable_bytes
from giantleap.service.jobs.job import UpscaleParams
from giantleap.service.jobs.planning import plan_generate
from giantleap.service.jobs.requests import GenerateRequest
from giantleap.service.settings import Settings, read_settings
from tests.redis_fixtures import ProducerOpener
from tests.service.fake_producer import FakeProducer
from tests.service.fakes import GENERATE, FakeConsumer, FakeRoute, make_claim, open_worker
from tests.waiting import wait_until

MIB = 2**20
LIMIT_PX = 2**27  # leaves it to the memory to refuse
LARGE = replace(GENERATE, width_px=8192, height_px=8192, scale=4)
REFUSALS = 200


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tiny_bundle_dir: Path) -> Path:
    """The tiny bundle under the name `large`, with limits that allow 8192 px."""
    directory = tmp_path_factory.mktemp("bundles") / "large"
    shutil.copytree(tiny_bundle_dir, directory)
    descriptor = read_bundle(tiny_bundle_dir).descriptor
    about = descriptor.bundle.model_copy(update={"name": "large"})
    limits = Limits(min_base_px=64, max_base_px=2048, multiple_px=32, max_steps=100, max_direct_px=8192)
    write_bundle(directory, descriptor.model_copy(update={"bundle": about, "limits": limits}))
    return directory


@pytest.fixture(scope="module")
def bundle(directory: Path) -> Bundle:
    return read_bundle(directory)


# Figures of a small bundle of stride 8 in float32 on a CPU, as a worker measures them.
PEAKS = {
    "generate": StagePeak(50_000, 7_300.0),
    "encode": StagePeak(0, 17_000.0),
    "lua x2": StagePeak(136_000, 2_430.0),
    "lua x4": StagePeak(0, 8_300.0),
    "bicubic x4": StagePeak(0, 1_088.0),
    "exact": StagePeak(98_000, 9_216.0),
    "swinir x2": StagePeak(1_400_000, 208_000.0, tile_px=4096),
}


def device_of(
    memory_bytes: int = 2048 * MIB, role: WorkerRole = WorkerRole.ALL, loaded_bytes: int = 600 * MIB
) -> Device:
    return Device("cpu", memory_bytes, loaded_bytes, {"large": PEAKS}, role)


# Devices


def test_a_device_comes_back_from_its_json() -> None:
    device = Device("cuda", 24 << 30, 6 << 30, {"a": PEAKS, "b": {}}, WorkerRole.DECODE)
    assert Device.from_json(device.to_json()) == device


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"kind": "tpu", "memory_bytes": 1, "loaded_bytes": 1, "bundles": {}}',
        '{"kind": "cpu", "memory_bytes": 1}',
        '{"kind": "cpu", "memory_bytes": 1, "loaded_bytes": 1, "bundles": {"a": {"exact": {"fixed_bytes": 1}}}}',
        '{"kind": "cpu", "memory_bytes": 1, "loaded_bytes": 1, "bundles": {}, "role": "draw"}',
    ],
)
def test_what_another_version_wrote_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Device.from_json(text)


def test_jobs_may_take_less_than_the_whole_device() -> None:
    assert 0.5 * 1000 < usable_bytes("cpu", 1000) < usable_bytes("cuda", 1000) < 1000
    assert 64 * MIB < machine_memory_bytes() < 2**50


def test_a_peak_is_the_line_through_two_points() -> None:
    line = StagePeak.through((100, 1500), (300, 3500))
    assert line == StagePeak(500, 10.0) and line.peak_bytes(1000) == 10_500
    assert StagePeak.through((100, 900), (300, 900)) == StagePeak(900, 0.0)
    assert StagePeak.through((100, 100), (300, 1000)).fixed_bytes == 0, "a peak that grows faster than the size"
    with pytest.raises(ValueError, match="found 300 and 300"):
        StagePeak.through((300, 1), (300, 2))
    assert replace(line, tile_px=200).peak_bytes(1000) == 2500, "tiles bound the network, not the image"


def test_each_role_runs_its_stages(bundle: Bundle) -> None:
    start = to_workload(replace(LARGE, strength=0.5), bundle)
    base_px, final_px = 256**2, 1024**2
    expected = {"generate": base_px, "encode": base_px, "lua x4": base_px, "exact": final_px}
    assert start.stages(WorkerRole.ALL) == expected
    assert start.stages(WorkerRole.GENERATE) == {"generate": base_px, "encode": base_px}
    assert start.stages(WorkerRole.DECODE) == {"lua x4": base_px, "exact": final_px}
    direct = to_workload(replace(LARGE, method="direct"), bundle)
    assert direct.stages(WorkerRole.ALL) == {"generate": final_px, "exact": final_px}
    again = to_workload(replace(LARGE, method="demofusion"), bundle)
    assert again.stages(WorkerRole.ALL) == {"generate": final_px, "exact": final_px}
    decoding = to_workload(replace(LARGE, method="rectifiedhr"), bundle)
    assert decoding.stages(WorkerRole.ALL) == {"generate": final_px, "encode": final_px, "exact": final_px}
    assert decoding.stages(WorkerRole.DECODE) == {"exact": final_px}
    device = device_of(loaded_bytes=0)
    assert required_bytes(again, "large", device, items=4) == required_bytes(again, "large", device), "one by one"
    pixels = to_workload(replace(LARGE, method="swinir"), bundle)
    assert pixels.stages(WorkerRole.DECODE) == {"swinir x4": base_px, "exact": base_px}
    image = UpscaleParams(2, "tiny", 1, 16, 16, 16, "image", "png", image_width_px=120, image_height_px=128)
    assert to_workload(image, bundle).stages(WorkerRole.ALL) == {"encode": 240, "lua x2": 240, "exact": 960}
    assert not to_workload(image, bundle).stages(WorkerRole.GENERATE)
    assert set(to_workload(replace(image, method="swinir"), bundle).stages(WorkerRole.ALL)) == {"swinir x2"}
    assert "exact" not in to_workload(replace(image, output="latent"), bundle).stages(WorkerRole.ALL)


def test_the_largest_stage_counts_beside_what_is_loaded(bundle: Bundle) -> None:
    work = to_workload(replace(LARGE, width_px=1024, height_px=1024), bundle)
    decode_bytes = PEAKS["exact"].peak_bytes(128 * 128)
    assert required_bytes(work, "large", device_of(loaded_bytes=7)) == 7 + decode_bytes
    assert required_bytes(work, "large", device_of(loaded_bytes=7), items=4) == 7 + decode_bytes, (
        "a CPU decodes one by one"
    )
    on_gpu = Device("cuda", 1, 0, {"large": PEAKS})
    assert required_bytes(work, "large", on_gpu, items=4) == PEAKS["exact"].peak_bytes(4 * 128 * 128)


def test_tiles_bound_the_network_and_the_image_still_counts(bundle: Bundle) -> None:
    work = to_workload(replace(LARGE, scale=2, method="swinir", decode="tiled"), bundle)
    assert (
        required_bytes(work, "large", device_of(loaded_bytes=0)) == PEAKS["swinir x2"].peak_bytes(4096) + 48 * 8192**2
    )


# What is refused


def test_a_job_that_fits_is_accepted_and_one_that_does_not_is_refused_with_the_size_that_does(bundle: Bundle) -> None:
    device = device_of(2048 * MIB)
    with pytest.raises(DoesNotFit) as caught:
        check_capacity(LARGE, bundle, [device], LIMIT_PX)
    error = caught.value
    assert error.largest_px is not None and error.needed_bytes is not None
    width_px, height_px = error.largest_px
    assert width_px == height_px and width_px % 128 == 0
    assert error.device_bytes == 2048 * MIB < error.needed_bytes
    for part in ("8192x8192 px", str(error.needed_bytes), str(2048 * MIB), f"{width_px}x{height_px} px"):
        assert part in error.detail
    check_capacity(replace(LARGE, width_px=width_px, height_px=height_px), bundle, [device], LIMIT_PX)
    with pytest.raises(DoesNotFit):
        check_capacity(replace(LARGE, width_px=width_px + 128, height_px=height_px + 128), bundle, [device], LIMIT_PX)


def test_the_largest_device_counts_and_an_unknown_one_refuses_nothing(bundle: Bundle) -> None:
    small, roomy = device_of(2048 * MIB), device_of(64 << 30)
    check_capacity(LARGE, bundle, [small, roomy], LIMIT_PX)
    check_capacity(LARGE, bundle, [], LIMIT_PX)
    check_capacity(LARGE, bundle, [Device("cpu", 2, 1, {"large": {}})], LIMIT_PX)
    with pytest.raises(DoesNotFit, match=str(2049 * MIB)):
        check_capacity(LARGE, bundle, [small, device_of(2049 * MIB)], LIMIT_PX)


def test_where_not_even_the_least_size_fits_the_refusal_says_so(bundle: Bundle) -> None:
    with pytest.raises(DoesNotFit, match=f"no size fits beside the {600 * MIB} bytes in use") as caught:
        check_capacity(LARGE, bundle, [device_of(600 * MIB)], LIMIT_PX)
    assert caught.value.largest_px is None


def test_a_job_needs_a_device_for_each_half(bundle: Bundle) -> None:
    def is_refused(*devices: Device) -> bool:
        try:
            check_capacity(LARGE, bundle, devices, LIMIT_PX)
        except DoesNotFit:
            return True
        return False

    roomy, tight = 64 << 30, 700 * MIB
    generate, decode = WorkerRole.GENERATE, WorkerRole.DECODE
    assert not is_refused(device_of(roomy, generate), device_of(roomy, decode))
    assert is_refused(device_of(roomy, generate), device_of(tight, decode)), "no device can decode it"
    assert is_refused(device_of(tight, generate), device_of(roomy, decode)), "no device can generate it"
    assert not is_refused(device_of(tight, generate), device_of(roomy, decode), device_of(roomy))
    assert not is_refused(device_of(roomy, generate)), "a half without a worker is not known to be too small"
    with pytest.raises(DoesNotFit) as caught:
        check_capacity(LARGE, bundle, [device_of(roomy, generate), device_of(tight, decode)], LIMIT_PX)
    assert caught.value.device_bytes == tight, "the device that refuses"


@pytest.mark.parametrize("method", ["lua", "direct", "bicubic"])
def test_the_size_that_is_offered_is_accepted(bundle: Bundle, method: str) -> None:
    request = GenerateRequest.model_validate(
        {"prompt": "a", "width": 8192, "height": 4096, "scale": 4, "method": method}
    )
    settings = read_settings(max_image_px=LIMIT_PX)
    devices = [device_of(1024 * MIB)]
    with pytest.raises(DoesNotFit) as caught:
        plan_generate(request, bundle, settings, 1, "png", devices)
    assert caught.value.largest_px is not None
    width_px, height_px = caught.value.largest_px
    smaller = request.model_copy(update={"width": width_px, "height": height_px})
    assert plan_generate(smaller, bundle, settings, 1, "png", devices).width_px == width_px


def test_an_upscale_is_planned_by_its_latent_or_image(bundle: Bundle) -> None:
    latent = UpscaleParams(4, "tiny", 2, 16, 100, 50, "image", "png")
    work = to_workload(latent, bundle)
    assert (work.width_px, work.height_px, work.source) == (1600, 3200, "latent")
    image = to_workload(replace(latent, image_width_px=393, image_height_px=799), bundle)
    assert (image.width_px, image.height_px, image.source) == (1572, 3196, "image")
    with pytest.raises(DoesNotFit) as caught:
        check_capacity(replace(latent, latent_height=1000), bundle, [device_of(700 * MIB)], LIMIT_PX)
    assert caught.value.largest_px is not None
    assert all(side_px % 32 == 0 for side_px in caught.value.largest_px)


def test_a_limit_on_pixels_names_the_largest_size_as_well(bundle: Bundle) -> None:
    work = to_workload(LARGE, bundle)
    assert largest_note(work, bundle, [], 1024**2) == "; the largest size that fits is 1024x1024 px"
    narrow = largest_note(work, bundle, [device_of(700 * MIB)], 2048**2)
    assert int(narrow.split()[-2].split("x")[0]) < 2048


# Over HTTP


def app_of(settings: Settings, producer: FakeProducer | JobProducer) -> httpx.ASGITransport:
    return httpx.ASGITransport(create_app(settings, producer))  # type: ignore[arg-type]


def settings_of(directory: Path, **changes: Any) -> Settings:
    return read_settings(bundle=(directory,), max_image_px=LIMIT_PX, **changes)


@pytest.fixture
async def client(directory: Path) -> AsyncIterator[httpx.AsyncClient]:
    producer = FakeProducer(devices=(device_of(),))
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


async def test_two_hundred_refusals_leave_the_queue_alone_and_compute_less_than_50_ms(
    directory: Path, settings: Settings, open_producer: ProducerOpener, redis_client: redis.Redis
) -> None:
    served = settings.model_copy(update={"bundle": (directory,), "max_image_px": LIMIT_PX})
    worker = JobConsumer(open_redis(str(served.redis_url)), served, ("large",), "w", device_of())
    worker.open()
    try:
        async with (
            open_producer() as producer,
            httpx.AsyncClient(transport=app_of(served, producer), base_url="http://giantleap") as client,
        ):
            before = redis_state(redis_client, served.key_prefix)
            body = {"prompt": "a red ball", "width": 8192, "height": 8192, "scale": 4}
            computed_s = []
            for _ in range(REFUSALS):
                started_s = time.thread_time()
                answer = await client.post("/generate", json=body)
                computed_s.append(time.thread_time() - started_s)
                assert answer.status_code == 422 and answer.json()["code"] == "does_not_fit"
            assert redis_state(redis_client, served.key_prefix) == before
            stats = await producer.stats()
            assert (sum(stats.queued.values()), stats.processing, stats.delayed) == (0, 0, 0)
    finally:
        worker.close()
    assert statistics.median(computed_s) < 0.050


def redis_state(client: redis.Redis, prefix: str) -> dict[bytes, int]:
    """Every key but those of heartbeats, and how much it holds."""
    state = {}
    for key in client.scan_iter(f"{{{prefix}}}:*"):
        if not key.endswith((b":workers", b":devices", b":seen_ms", b":resumed_ms")):
            state[key] = client.memory_usage(key) or 0
    return state


# Through Redis


async def test_the_api_learns_the_devices_of_live_workers_and_forgets_those_that_left(
    settings: Settings, open_producer: ProducerOpener, redis_client: redis.Redis
) -> None:
    async with open_producer() as producer:
        assert not producer.devices
        workers = [
            JobConsumer(open_redis(str(settings.redis_url)), settings, ("pocket",), f"w{n}", device)
            for n, device in enumerate((device_of(111), device_of(222), None))
        ]
        for worker in workers:
            worker.open()
        await producer.read_devices()
        assert sorted(device.memory_bytes for device in producer.devices) == [111, 222]
        workers[0].close()
        await producer.read_devices()
        assert [device.memory_bytes for device in producer.devices] == [222]
        key = f"{{{settings.key_prefix}}}:devices"
        redis_client.hset(key, "dead", device_of(333).to_json())
        await producer.read_devices()
        assert [device.memory_bytes for device in producer.devices] == [222], "the dead one has no heartbeat"
        wait_until(lambda: not redis_client.hexists(key, "dead"))  # the next heartbeat sweeps it away
        redis_client.delete(key)  # as after a loss of Redis: the next heartbeat brings it back
        wait_until(lambda: redis_client.hlen(key) == 1)
        for worker in workers[1:]:
            worker.close()
        await producer.read_devices()
        assert not producer.devices and redis_client.hlen(key) == 0


async def test_a_device_that_cannot_be_read_is_left_out(
    settings: Settings, open_producer: ProducerOpener, redis_client: redis.Redis
) -> None:
    worker = JobConsumer(open_redis(str(settings.redis_url)), settings, ("pocket",), "w", device_of(5))
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


def run_worker(bundle: Bundle, consumer: FakeConsumer, route: FakeRoute, memory_bytes: int) -> None:
    stop = threading.Event()
    consumer.on_empty = stop.set
    settings = read_settings(max_image_px=LIMIT_PX, batch_budget_latent_px=10**9)
    worker, _ = open_worker(route, consumer, settings, stop=stop, bundle=bundle, device=device_of(memory_bytes))
    worker.run()


def test_a_worker_refuses_what_its_device_cannot_hold_and_lives_on(bundle: Bundle) -> None:
    consumer = FakeConsumer([make_claim("large", LARGE), make_claim("small")])
    route = FakeRoute()
    run_worker(bundle, consumer, route, 2048 * MIB)
    error = consumer.failed["large"]
    assert error.code == "does_not_fit" and not error.retryable and "the largest size that fits" in error.detail
    assert isinstance(from_job_error(error), DoesNotFit)
    assert list(consumer.finished) == ["small"] and route.batches == [1]


def test_a_worker_cuts_a_batch_to_what_its_device_holds(bundle: Bundle) -> None:
    params = replace(GENERATE, width_px=512, height_px=512, scale=1)
    three_bytes = 600 * MIB + PEAKS["generate"].peak_bytes(3 * 64 * 64)
    assert max_items(params, bundle, device_of(three_bytes), 8) == 3
    consumer = FakeConsumer([make_claim(f"job-{n}", params) for n in range(8)])
    route = FakeRoute()
    run_worker(bundle, consumer, route, three_bytes)
    assert route.batches == [3, 3, 2] and len(consumer.finished) == 8
    assert max_items(params, bundle, Device("cpu", 2, 1, {"large": {}}), 8) == 8
