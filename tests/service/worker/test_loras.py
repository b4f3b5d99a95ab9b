"""Jobs with LoRAs on one worker: each image is what a worker with that LoRA alone gives, and plain jobs stay plain."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from giantleap.models.adapters.files import AdapterUse, read_file
from giantleap.models.bundle.bundle import read_bundle
from giantleap.service.jobs.grid import LatentGrid
from giantleap.service.settings import read_settings
from giantleap.service.worker.batching import plan_batch
from giantleap.service.worker.engines import open_route
from tests.lora_files import write_lora
from tests.service.fakes import GENERATE, FakeConsumer, make_claim, open_worker

JOB = replace(GENERATE, scale=1, width_px=64, height_px=64, steps=2)


@pytest.fixture(scope="module")
def loras(tiny_bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    directory = tmp_path_factory.mktemp("loras")
    pipeline = DiffusionPipeline.from_pretrained(str(read_bundle(tiny_bundle_dir).pipeline))
    return {name: write_lora(directory / f"{name}.safetensors", pipeline, n) for n, name in enumerate("ab")}


def run(tiny: Path, directory: Path, jobs: Mapping[str, tuple[AdapterUse, ...]]) -> FakeConsumer:
    """Run jobs in their order on a new worker."""
    settings = read_settings(lora_dir=directory, bundle=(tiny,), batch_items=1)  # batches differ by rounding
    bundle, stop = read_bundle(tiny), threading.Event()
    consumer = FakeConsumer([make_claim(name, replace(JOB, loras=uses)) for name, uses in jobs.items()])
    consumer.on_empty = stop.set
    route = open_route(bundle, settings, torch.device("cpu"), torch.float32)
    worker, _ = open_worker(route, consumer, settings, stop=stop, bundle=bundle)
    worker.run()
    return consumer


def test_jobs_in_turn_give_the_bytes_of_workers_with_one_lora_each(
    tiny_bundle_dir: Path, loras: Mapping[str, Path]
) -> None:
    directory = loras["a"].parent
    a, b = (read_file(loras[name]).use(0.8) for name in "ab")
    alone = {
        name: run(tiny_bundle_dir, directory, {name: uses}).finished[name][0][1]
        for name, uses in {"plain": (), "a": (a,), "b": (b,)}.items()
    }
    mixed = {"1-a": (a,), "2-plain": (), "3-b": (b,), "4-a": (a,), "5-plain": ()}
    finished = run(tiny_bundle_dir, directory, mixed).finished
    assert len(set(alone.values())) == 3
    assert {name: files[0][1] == alone[name[2:]] for name, files in finished.items()} == dict.fromkeys(mixed, True)


def test_a_lora_that_this_worker_lacks_fails_its_job_and_says_why(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    jobs = {"missing": (AdapterUse("missing", 1.0, "0" * 64),), "plain": ()}
    consumer = run(tiny_bundle_dir, tmp_path, jobs)
    assert set(consumer.finished) == {"plain"}
    error = consumer.failed["missing"]
    assert error.code == "job_failed" and "GIANTLEAP_LORA_DIR" in error.detail


def test_only_jobs_of_the_same_loras_run_together() -> None:
    a, b = AdapterUse("a", 1.0, "0" * 64), AdapterUse("b", 1.0, "1" * 64)
    sets = [(a,), (), (b,), (a,), (replace(a, weight=0.5),), (a, b), ()]
    claims = [make_claim(str(n), replace(JOB, loras=uses)) for n, uses in enumerate(sets)]
    batches = plan_batch(claims, {"tiny": LatentGrid(8, 1)}, 8, 1 << 20)
    assert [[int(claim.job.id) for claim in batch] for batch in batches] == [[0, 3], [1, 6], [2], [4], [5]]
