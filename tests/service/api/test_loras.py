"""LoRAs over HTTP: those of a directory are listed and become part of a job; others are refused before the queue."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from giantleap.models.bundle.bundle import BundleError, read_bundle
from giantleap.service.api.app import create_app
from giantleap.service.jobs.job import GenerateParams, Job
from giantleap.service.settings import read_settings
from tests.lora_files import write_lora
from tests.service.compat_fakes import FileProducer
from tests.service.fake_producer import FakeProducer
from tests.service.live_server import live_server


@pytest.fixture(scope="module")
def directory(tiny_bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("loras")
    pipeline = DiffusionPipeline.from_pretrained(str(read_bundle(tiny_bundle_dir).pipeline))
    write_lora(directory / "ink.safetensors", pipeline, 1, rank=2)
    write_lora(directory / "oil.safetensors", pipeline, 2)
    write_lora(directory / "xl.safetensors", pipeline, 3, metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    start = "transformer.transformer_blocks.0.attn.to_q"
    alien = {f"{start}.lora_A.weight": torch.zeros(4, 8), f"{start}.lora_B.weight": torch.zeros(8, 4)}
    save_file(alien, directory / "alien.safetensors")
    return directory


@pytest.fixture
def producer() -> FakeProducer:
    return FakeProducer()


@pytest.fixture
async def client(tiny_bundle_dir: Path, directory: Path, producer: FakeProducer) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(read_settings(bundle=(tiny_bundle_dir,), lora_dir=directory), producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        yield client


def loras_of(job: Job) -> list[tuple[str, float]]:
    assert isinstance(job.params, GenerateParams)
    return [(use.name, use.weight) for use in job.params.loras]


async def test_those_that_fit_are_listed_with_rank_and_digest(client: httpx.AsyncClient) -> None:
    (model,) = (await client.get("/models")).json()
    assert [(each["name"], each["rank"], each["base"]) for each in model["loras"]] == [
        ("ink", 2, None),
        ("oil", 4, None),
    ]
    assert all(len(each["sha256"]) == 64 and each["size_bytes"] > 0 for each in model["loras"])


async def test_names_and_weights_reach_the_job_by_every_front(
    client: httpx.AsyncClient, producer: FakeProducer
) -> None:
    loras = [{"name": "oil", "weight": 0.8}, {"name": "ink"}]
    native = await client.post("/generate", json={"prompt": "a", "loras": loras})
    compatible = await client.post("/v1/images/generations", json={"prompt": "a", "loras": loras})
    assert native.status_code == compatible.status_code == 200, compatible.text
    for job in producer.jobs:
        assert loras_of(job) == [("oil", 0.8), ("ink", 1.0)]
        assert Job.from_json(job.to_json()) == job


def test_the_openai_client_sends_them_in_its_extra_body(tiny_bundle_dir: Path, directory: Path) -> None:
    producer = FileProducer()
    app = create_app(read_settings(bundle=(tiny_bundle_dir,), lora_dir=directory), producer)  # type: ignore[arg-type]
    with live_server(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        drawn = client.images.generate(prompt="a", extra_body={"loras": [{"name": "oil", "weight": 0.8}]})
        with pytest.raises(openai.UnprocessableEntityError, match="is not served") as refused:
            client.images.generate(prompt="a", extra_body={"loras": [{"name": "chalk"}]})
    assert drawn.data and refused.value.param == "loras.0.name"
    assert [loras_of(job) for job in producer.jobs] == [[("oil", 0.8)]]


@pytest.mark.parametrize(
    ("loras", "field", "words"),
    [
        ([{"name": "nothing"}], "loras.0.name", "has ink, oil"),
        ([{"name": "../ink"}], "loras.0.name", "is not served"),
        ([{"name": "/etc/passwd"}], "loras.0.name", "is not served"),
        ([{"name": "ink"}, {"name": "xl"}], "loras.1.name", "made for sdxl_base_v1-0"),
        ([{"name": "alien"}], "loras.0.name", "does not fit bundle tiny"),
        ([{"name": "ink"}, {"name": "ink"}], "loras.1.name", "twice"),
        ([{"name": "ink", "weight": 9}], "loras.0.weight", "8"),
        ([{"name": "ink", "rank": 2}], "loras.0.rank", ""),
        ([{"name": "ink"}] * 9, "loras", "8"),
    ],
)
async def test_what_cannot_run_is_refused_before_the_queue(
    client: httpx.AsyncClient, producer: FakeProducer, loras: list[dict[str, Any]], field: str, words: str
) -> None:
    answer = await client.post("/generate", json={"prompt": "a", "loras": loras})
    assert answer.status_code == 422 and not producer.jobs
    (error,) = answer.json()["errors"]
    assert error["field"] == field and words in error["reason"]


async def test_without_a_directory_every_name_is_refused(tiny_bundle_dir: Path) -> None:
    app = create_app(read_settings(bundle=(tiny_bundle_dir,)), FakeProducer())  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        answer = await client.post("/generate", json={"prompt": "a", "loras": [{"name": "ink"}]})
    assert answer.status_code == 422 and "GIANTLEAP_LORA_DIR" in answer.json()["detail"]


def test_a_directory_with_a_file_that_is_no_lora_stops_the_start(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(BundleError, match=r"broken\.safetensors"):
        create_app(read_settings(bundle=(tiny_bundle_dir,), lora_dir=tmp_path), FakeProducer())  # type: ignore[arg-type]


async def test_weights_stored_in_8_bits_take_no_lora_and_the_refusal_says_why(
    tiny_bundle_dir: Path, directory: Path, producer: FakeProducer
) -> None:
    settings = read_settings(bundle=(tiny_bundle_dir,), lora_dir=directory, modes="storage=fp8")
    app = create_app(settings, producer)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        (model,) = (await client.get("/models")).json()
        refused = await client.post("/generate", json={"prompt": "a", "loras": [{"name": "ink"}]})
    assert (model["modes"], model["loras"]) == ({"storage": "fp8"}, [])
    assert refused.status_code == 422 and not producer.jobs
    assert "weights stored as fp8 take no LoRA; with modes.quantize they do" in refused.json()["detail"]
