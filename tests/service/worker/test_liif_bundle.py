"""A bundle whose LUA has a LIIF head: scales that are no whole numbers, from the door to the image."""

import io
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client import generate_latest
from safetensors.numpy import load, save

from giantleap.export.build import Request, export_bundle
from giantleap.export.manifest import ArtifactError
from giantleap.models.bundle.bundle import BundleError, read_bundle
from giantleap.models.bundle.digests import file_hash
from giantleap.models.engines.base import ENGINES, EngineError
from giantleap.models.engines.factory import open_engine
from giantleap.models.lua.checkpoints import write_lua
from giantleap.models.lua.network import Lua
from giantleap.models.lua.spec import LuaSpec
from giantleap.service.api.app import create_app
from giantleap.service.jobs.job import GenerateParams, Job, UpscaleParams
from giantleap.service.settings import Settings, read_settings
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.worker.engines import find_artifacts
from tests.service.fake_producer import FakeProducer
from tests.service.live_server import live_server
from tests.service.worker.test_loop_redis import TIMEOUT_S, running_worker
from tests.tiny_bundle import LATENT_CHANNELS, WINDOW

SPEC = LuaSpec(LATENT_CHANNELS, 12, (2,), 2, window=WINDOW, num_feat=8, bicubic_skip=True, head="liif")
SCALES = (1.5, 2, 3)
CPU = torch.device("cpu")


def write_liif_bundle(source: Path, directory: Path, scales: tuple[float, ...] = SCALES) -> Path:
    """The tiny bundle with a LIIF head in place of its heads per scale."""
    shutil.copytree(source, directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Lua(SPEC)
        torch.nn.init.normal_(net.heads["liif"].last.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    path, toml = directory / "lua.safetensors", directory / "bundle.toml"
    before = file_hash(path)
    write_lua(path, net)
    text = toml.read_text().replace(before, file_hash(path)).replace('name = "tiny"\ntitle', 'name = "liif"\ntitle')
    toml.write_text(text.replace("scales = [2, 4]", f"scales = {list(scales)}"))
    return directory


@pytest.fixture(scope="module")
def liif_dir(tiny_bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_liif_bundle(tiny_bundle_dir, tmp_path_factory.mktemp("bundles") / "liif")


@pytest.fixture
def producer() -> FakeProducer:
    return FakeProducer()


@pytest.fixture
async def client(liif_dir: Path, producer: FakeProducer) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(read_settings(bundle=(liif_dir,)), producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        yield client


def latent_body(height: int, width: int) -> bytes:
    latent = np.random.default_rng(0).standard_normal((LATENT_CHANNELS, height, width)).astype(np.float32)
    return save({"latent": latent})


LATENT = {"Content-Type": "application/x-safetensors"}


def test_the_service_generates_and_upscales_by_one_and_a_half_and_by_three(settings: Settings, liif_dir: Path) -> None:
    running = settings.model_copy(update={"bundle": (liif_dir,), "torch_threads": 1, "device": "cpu"})
    with running_worker(running), live_server(create_app(running)) as url, httpx.Client(timeout=TIMEOUT_S) as client:
        for scale, side_px in ((1.5, 96), (3, 192)):
            fields = {"prompt": "a red sphere", "scale": scale, "seed": 1}
            generated = client.post(f"{url}/generate", json=fields, headers={"Accept": "image/png"})
            assert generated.status_code == 200, generated.text
            assert Image.open(io.BytesIO(generated.content)).size == (side_px, side_px)
            query = {"scale": scale, "output": "latent"}
            accept = LATENT | {"Accept": "application/x-safetensors"}
            upscaled = client.post(f"{url}/upscale", params=query, content=latent_body(6, 10), headers=accept)
            assert upscaled.status_code == 200, upscaled.text
            (latent,) = load(upscaled.content).values()
            assert latent.shape[-2:] == (6 * scale, 10 * scale) and np.isfinite(latent).all()


@pytest.mark.parametrize(("value", "scale", "side_px"), [(1.5, 1.5, 96), (3, 3, 192), (2.0, 2, 128), (None, 2, 128)])
async def test_a_scale_is_the_bundles_own_number(
    client: httpx.AsyncClient, producer: FakeProducer, value: float | None, scale: float, side_px: int
) -> None:
    answer = await client.post("/generate", json={"prompt": "a red sphere", "scale": value})
    (job,) = producer.jobs
    assert isinstance(job.params, GenerateParams)
    assert (job.params.width_px, job.params.base_size_px) == (side_px, (64, 64))
    assert f'"scale":{scale},' in answer.text, "2, not 2.0"
    assert repr(job.params.scale) == repr(Job.from_json(job.to_json()).params.scale) == str(scale)


async def test_the_bundle_lists_its_scales(client: httpx.AsyncClient) -> None:
    answer = await client.get("/models")
    assert answer.json()[0]["methods"]["lua"] == [1, 1.5, 2, 3]
    assert '"lua":[1,1.5,2,3]' in answer.text


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"scale": 1.25}, "scale", "has 1, 1.5, 2, 3 by method lua"),
        ({"scale": 4}, "scale", "has 1, 1.5, 2, 3 by method lua"),
        ({"scale": 1.5, "width": 108, "height": 96}, "width", "nearest: 96x96 and 120x96"),
        ({"scale": 1.5, "width": 97, "height": 96}, "width", "in steps of 24"),
        ({"scale": "1.5"}, "scale", "number"),
        ({"scale": 0.5}, "scale", "must be at least 1"),
    ],
)
async def test_what_makes_no_whole_latents_or_is_not_there_is_refused(
    client: httpx.AsyncClient, producer: FakeProducer, fields: dict[str, Any], field: str, reason: str
) -> None:
    answer = await client.post("/generate", json={"prompt": "a red sphere", **fields})
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == [field]
    assert reason in answer.text
    assert producer.jobs == []


async def test_a_latent_or_an_image_that_would_not_stay_whole_is_refused(
    client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    answer = await client.post("/upscale", params={"scale": 1.5}, content=latent_body(6, 7), headers=LATENT)
    assert answer.status_code == 422 and "whose sides times 1.5 are not whole" in answer.text
    for side_px, is_taken in (
        (48, True),
        (46, True),
        (45, False),
        (36, False),
    ):  # 36 px fill 5 latents, 45 px make 67.5
        picture = io.BytesIO()
        Image.new("RGB", (side_px, 64)).save(picture, format="PNG")
        kind = {"Content-Type": "image/png"}
        answer = await client.post("/upscale", params={"scale": 1.5}, content=picture.getvalue(), headers=kind)
        assert (answer.status_code == 200) is is_taken, answer.text
        assert is_taken or "send sides in multiples of 16 px" in answer.text
    assert all(isinstance(job.params, UpscaleParams) and job.params.scale == 1.5 for job in producer.jobs)


def test_labels_keep_whole_scales_whole() -> None:
    metrics = Metrics()
    metrics.count_images("liif", 2, 1, 100)
    metrics.count_images("liif", 1.5, 1, 100)
    page = generate_latest(metrics.registry).decode()
    assert 'scale="2"' in page and 'scale="1.5"' in page and 'scale="2.0"' not in page


def test_only_the_engine_torch_runs_it_and_it_is_not_exported(liif_dir: Path, tmp_path: Path) -> None:
    net = Lua(SPEC).eval()
    for name in ENGINES:
        if name != "torch":
            with pytest.raises(EngineError, match="runs no LIIF head"):
                open_engine(name, net, CPU, torch.float32, {})
    engine = open_engine("torch", net, CPU, torch.float32)
    with torch.no_grad():
        assert torch.equal(engine.run(torch.ones(1, 16, 4, 6), 1.5), net(torch.ones(1, 16, 4, 6), 1.5))
    bundle = read_bundle(liif_dir)
    with pytest.raises(EngineError, match="runs no LIIF head"):
        find_artifacts(bundle, read_settings(bundle=(liif_dir,), engine="onnx"), CPU)
    with pytest.raises(ArtifactError, match="LIIF head, which is not exported"):
        export_bundle(Request(bundle, "onnx", "fp32", tmp_path / "onnx"))
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        ((1.3, 2), "no whole latents"),
        ((1.125, 2), "makes a window of 4 a whole number"),
        ((0.5, 2), "any scale above 1"),
    ],
)
def test_a_bundle_with_a_scale_that_its_head_cannot_serve_is_refused(
    tiny_bundle_dir: Path, tmp_path: Path, scales: tuple[float, ...], reason: str
) -> None:
    with pytest.raises(BundleError, match=reason):
        read_bundle(write_liif_bundle(tiny_bundle_dir, tmp_path / "bundle", scales))


def test_heads_per_scale_serve_the_scales_of_their_file_only(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle_dir, tmp_path / "bundle")
    toml = tmp_path / "bundle" / "bundle.toml"
    toml.write_text(toml.read_text().replace("scales = [2, 4]", "scales = [1.5, 2]"))
    with pytest.raises(BundleError, match=r"found heads for scales \(2, 4\)"):
        read_bundle(tmp_path / "bundle")
