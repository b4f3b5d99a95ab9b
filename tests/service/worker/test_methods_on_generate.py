"""Every method as `/generate` plans it and the worker draws it, on small random pipelines of the real classes."""

import io
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from giantleap.models.bundle.bundle import Bundle, read_bundle, write_bundle
from giantleap.models.bundle.descriptor import Defaults, Limits, LuaFile
from giantleap.models.bundle.digests import file_hash, file_hashes
from giantleap.models.lua.checkpoints import write_lua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from giantleap.models.route import Route
from giantleap.service.api.app import create_app
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobs.job import JobParams
from giantleap.service.settings import read_settings
from tests.models.generation.test_generator_families import saved
from tests.models.methods.tiny_unets import PIPELINES
from tests.service.fake_producer import FakeProducer
from tests.service.fakes import FakeConsumer, make_claim, open_worker

SIZES = [(128, 128), (192, 128)]
REFINE = {"strength": 0.4, "steps": 2}


def write_bundle_around(directory: Path, name: str) -> Bundle:
    """A bundle of a pipeline of `PIPELINES` with a LUA."""
    directory.mkdir()
    build, space = PIPELINES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        write_lua(directory / "lua.safetensors", Lua(LuaSpec(space.channels, 12, (1,), 2, window=4, num_feat=8)))
    limits = Limits(min_base_px=64, max_base_px=256, multiple_px=space.multiple_px, max_steps=50, max_direct_px=256)
    made = saved(
        directory,
        build(),
        space,
        lua=LuaFile(file="lua.safetensors", scales=(2, 4), sha256=file_hash(directory / "lua.safetensors")),
        limits=limits,
        defaults=Defaults(steps=3, guidance_scale=3.0, base_width_px=64, base_height_px=64),
    )
    write_bundle(directory, made.descriptor.model_copy(update={"files": file_hashes(directory)}))
    return read_bundle(directory)


async def plan(bundle: Bundle, *requests: dict[str, Any]) -> list[JobParams]:
    """The parameters of the jobs that requests become."""
    producer = FakeProducer()
    app = create_app(read_settings(bundle=(bundle.directory,)), producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        for request in requests:
            answer = await client.post("/generate", json={"prompt": "a red sphere", "seed": 1, **request})
            assert answer.status_code == 200, answer.text
    return [job.params for job in producer.jobs]


def draw(route: Route, bundle: Bundle, jobs: list[JobParams]) -> list[bytes]:
    """The files of jobs that a worker runs."""
    stop = threading.Event()
    claims: list[Claim] = [make_claim(str(number), params) for number, params in enumerate(jobs)]
    consumer = FakeConsumer(claims, on_empty=stop.set)
    worker, _ = open_worker(route, consumer, read_settings(), stop=stop, bundle=bundle)
    worker.run()
    assert not consumer.failed
    return [consumer.finished[str(number)][0][1] for number in range(len(jobs))]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
async def test_every_method_answers_alone_and_refined_at_both_sizes(name: str, tmp_path: Path) -> None:
    bundle = write_bundle_around(tmp_path / name, name)
    plain = {"method": "lua", "width": 128, "height": 128}
    requests = [
        {"method": method, "width": width, "height": height, **refine}
        for method in bundle.methods
        for width, height in SIZES
        for refine in ({}, {"refine": REFINE})
    ]
    assert {request["method"] for request in requests} == set(bundle.methods) and len(bundle.methods) == 8
    first, *jobs = await plan(bundle, plain, *requests)
    route = Route.open(bundle, torch.device("cpu"), torch.float32)
    before, files, after = (draw(route, bundle, each) for each in ([first], jobs, [first]))
    assert before == after, "nothing is left of the methods that change the UNet"
    for request, file in zip(requests, files, strict=True):
        assert Image.open(io.BytesIO(file)).size == (request["width"], request["height"]), request
    alone, refined = files[::2], files[1::2]
    assert all(one != other for one, other in zip(alone, refined, strict=True))
    assert len(set(files)) == len(files)
