"""A worker with exported artifacts gives the same images; where artifacts or libraries do not fit, none starts."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image

from giantleap.export.manifest import FILE
from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.engines.base import EngineError
from giantleap.service.errors import BadConfiguration
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.job import Job, JobState
from giantleap.service.settings import Settings, to_environment
from giantleap.service.worker.engines import artifact_directory, find_artifacts, open_route
from giantleap.service.worker.process import run_worker
from tests.service.worker.test_loop_redis import running_worker, upscale_job

TIMEOUT_S = 300.0
CPU = torch.device("cpu")


@pytest.fixture
def torch_settings(settings: Settings, tiny_bundle_dir: Path) -> Settings:
    return settings.model_copy(update={"bundle": (tiny_bundle_dir,), "torch_threads": 1, "device": "cpu"})


@pytest.fixture
def onnx_settings(torch_settings: Settings, tiny_onnx_dir: Path) -> Settings:
    return torch_settings.model_copy(update={"engine": "onnx", "engine_dir": tiny_onnx_dir})


@pytest.fixture
def artifacts_copy(tiny_onnx_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_onnx_dir, tmp_path / "artifacts"))


def psnr_db(found: NDArray[Any], expected: NDArray[Any], peak: float) -> float:
    error = float(np.square(found.astype(np.float64) - expected.astype(np.float64)).mean())
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


async def read(producer: JobProducer, job: Job) -> bytes:
    record = await producer.wait(job.id, TIMEOUT_S)
    assert record.state is JobState.SUCCEEDED, record.error
    content = await producer.read_result(job.id, 0)
    assert content is not None
    return content


async def test_onnx_serves_the_images_and_latents_that_torch_serves(
    torch_settings: Settings, onnx_settings: Settings, open_producer: Any, make_job: Any
) -> None:
    async with open_producer() as producer:
        served: dict[str, tuple[NDArray[Any], ...]] = {}
        for settings in (torch_settings, onnx_settings):
            jobs = [make_job(bundle="tiny", scale=s, width_px=64 * s, height_px=64 * s, seed=3) for s in (2, 4)]
            upscaled, body = upscale_job(5, 7)
            for job in jobs:
                await producer.enqueue(job)
            upscaled = replace(upscaled, id=f"{settings.engine}-latent")
            await producer.enqueue(upscaled, body)
            with running_worker(settings):
                images = [np.asarray(Image.open(io.BytesIO(await read(producer, job)))) for job in jobs]
                latent = safetensors.torch.load(await read(producer, upscaled))["latent"]
            served[settings.engine] = (*images, latent.numpy())
        for found, expected in zip(served["onnx"][:2], served["torch"][:2], strict=True):
            assert found.shape == expected.shape and psnr_db(found, expected, 255) >= 60
        assert np.abs(served["onnx"][2] - served["torch"][2]).max() < 1e-4


def refusal(settings: Settings) -> str:
    """The one line with which a worker ends."""
    with pytest.raises(BadConfiguration) as caught:
        run_worker(settings, threading.Event())
    assert "\n" not in caught.value.detail
    return caught.value.detail


def test_a_damaged_artifact_stops_the_worker_with_the_command_that_rebuilds_it(
    onnx_settings: Settings, artifacts_copy: Path
) -> None:
    path = artifacts_copy / "lua_x4.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    settings = onnx_settings.model_copy(update={"engine_dir": artifacts_copy})
    command = [sys.executable, "-m", "giantleap", "worker"]
    ended = subprocess.run(command, env=_environment(settings), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ended.returncode == 2
    lines = [line for line in ended.stderr.splitlines() if line.startswith("giantleap:")]
    assert len(lines) == 1 and "lua_x4.onnx is damaged" in lines[0]
    assert f"giantleap export --bundle {settings.bundle[0]} --engine onnx" in lines[0]


def _environment(settings: Settings) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("GIANTLEAP_")}
    return others | to_environment(settings)


def test_artifacts_of_another_bundle_stop_the_worker(onnx_settings: Settings, artifacts_copy: Path) -> None:
    manifest = json.loads((artifacts_copy / FILE).read_text())
    (artifacts_copy / FILE).write_text(json.dumps(manifest | {"bundle": "other"}))
    line = refusal(onnx_settings.model_copy(update={"engine_dir": artifacts_copy}))
    assert "artifacts of bundle other" in line and "giantleap export" in line


def test_missing_artifacts_stop_the_worker(onnx_settings: Settings, tmp_path: Path) -> None:
    line = refusal(onnx_settings.model_copy(update={"engine_dir": tmp_path}))
    assert FILE in line and "giantleap export" in line


def test_a_missing_provider_stops_the_worker(onnx_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CoreMLExecutionProvider"])
    assert "needs CPUExecutionProvider; this onnxruntime has CoreMLExecutionProvider" in refusal(onnx_settings)


def test_tensorrt_without_gpu_or_library_stops_the_worker(
    torch_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = torch_settings.model_copy(update={"engine": "tensorrt"})
    assert "GPU" in refusal(settings)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match="package tensorrt"):
        find_artifacts(read_bundle(settings.bundle[0]), settings, torch.device("cuda:0"))


def test_where_artifacts_are_looked_for(torch_settings: Settings, tmp_path: Path) -> None:
    bundle = read_bundle(torch_settings.bundle[0])
    settings = torch_settings.model_copy(update={"engine": "onnx", "data_dir": tmp_path})
    assert artifact_directory(bundle, settings) == tmp_path / "exports" / "tiny-onnx-fp32"
    alone = settings.model_copy(update={"engine_dir": tmp_path})
    assert artifact_directory(bundle, alone) == tmp_path
    among = alone.model_copy(update={"bundle": (*alone.bundle, tmp_path)})
    assert artifact_directory(bundle, among) == tmp_path / "tiny"


def test_the_route_says_which_engine_it_runs(onnx_settings: Settings, torch_settings: Settings) -> None:
    bundle = read_bundle(onnx_settings.bundle[0])
    for settings in (onnx_settings, torch_settings):
        assert open_route(bundle, settings, CPU, torch.float32).engine == settings.engine


def test_torch_takes_no_artifacts(torch_settings: Settings) -> None:
    assert find_artifacts(read_bundle(torch_settings.bundle[0]), torch_settings, CPU) == {}
