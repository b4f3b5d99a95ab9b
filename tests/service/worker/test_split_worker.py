"""Workers of one role, on fake routes and on the pocket bundle: two halves give the bytes of one whole worker."""

import json
import logging
import threading
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.generation.refinement import Refinement
from giantleap.models.route import Route
from giantleap.models.worker_role import WorkerRole
from giantleap.service.jobqueue.claims import BaseLatents, Claim
from giantleap.service.jobs.grid import LatentGrid
from giantleap.service.jobs.job import GenerateParams, JobParams
from giantleap.service.settings import POCKET_BUNDLE, read_settings
from giantleap.service.telemetry.logs import JsonFormatter
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.worker.batching import plan_batch
from tests.service.fakes import GENERATE, UPSCALE, FakeConsumer, FakeRoute, make_claim, open_worker

CPU = torch.device("cpu")


def run_all(route: Any, consumer: FakeConsumer, role: WorkerRole) -> Metrics:
    stop, route.role = threading.Event(), role
    consumer.on_empty = stop.set
    worker, metrics = open_worker(route, consumer, read_settings(role=role), stop=stop)
    worker.run()
    return metrics


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_generating_worker_transfers_every_image_and_finishes_none() -> None:
    consumer = FakeConsumer([make_claim(f"job-{n}", replace(GENERATE, seed=n, num_images=2)) for n in (10, 20)])
    route = FakeRoute()
    metrics = run_all(route, consumer, WorkerRole.GENERATE)
    assert route.batches == [4] and not route.finished and not consumer.finished
    for name, seed in (("job-10", 10), ("job-20", 20)):
        transferred = consumer.transferred[name]
        latents = safetensors.torch.load(transferred.body or b"")["latent"]
        assert latents.shape == (2, 4, 4, 4) and latents.dtype == torch.float32
        assert [latent[0, 0, 0].item() for latent in latents] == [seed, seed + 1]
        assert transferred.base_latents is not None and set(transferred.base_latents.stages_s) == {"generate"}
    assert [event[2]["stage"] for event in consumer.events if event[1] == "stage"] == ["generate"] * 2
    assert sample(metrics, "giantleap_jobs_total", kind="generate", bundle="tiny", status="succeeded") is None


def test_transferred_jobs_finish_in_batches_with_the_times_and_warnings_of_both_workers() -> None:
    prompts = ["zeppelin " * 33, "a red sphere", "a red sphere"]
    jobs = [replace(GENERATE, prompt=prompt, seed=n, steps=2 + n) for n, prompt in enumerate(prompts)]
    generating = FakeConsumer([make_claim(f"job-{n}", job) for n, job in enumerate(jobs)])
    run_all(FakeRoute(), generating, WorkerRole.GENERATE)
    assert len(generating.transferred) == 3
    route, decoding = FakeRoute(), FakeConsumer(list(generating.transferred.values()))
    metrics = run_all(route, decoding, WorkerRole.DECODE)
    assert not route.batches, "nothing is generated again"
    assert route.finished == [("lua", 2, "exact")], "one batch: settings of the generator no longer count"
    for n in range(3):
        assert set(decoding.stages[f"job-{n}"]) == {"generate", "upscale", "decode", "encode"}
        assert [file.seed for file, _ in decoding.finished[f"job-{n}"]] == [n]
    generated = generating.transferred["job-0"].base_latents
    assert generated is not None and decoding.stages["job-0"]["generate"] == generated.stages_s["generate"]
    assert "3 tokens" in decoding.warnings["job-0"][0] and decoding.warnings["job-1"] == []
    assert sample(metrics, "giantleap_jobs_total", kind="generate", bundle="tiny", status="succeeded") == 3
    labels = {"bundle": "tiny", "method": "lua", "scale": "2", "engine": "fake", "warmup": "false"}
    assert sample(metrics, "giantleap_stage_duration_seconds_count", stage="generate", **labels) is None
    assert sample(metrics, "giantleap_queue_wait_seconds_count", priority="high") is None, "it was counted before"


@pytest.mark.parametrize("role", [WorkerRole.GENERATE, WorkerRole.DECODE])
def test_half_a_route_fails_a_job_with_a_refine_pass_and_says_why(role: WorkerRole) -> None:
    refinement = Refinement(0.2, 4)
    params: JobParams = replace(GENERATE, refine=refinement)
    if role is WorkerRole.DECODE:
        params = replace(UPSCALE, refine=refinement, prompt="a red sphere", seed=1)
    consumer = FakeConsumer([make_claim("job", params)])
    run_all(FakeRoute(), consumer, role)
    assert consumer.failed["job"].code == "job_failed" and not consumer.transferred
    assert consumer.failed["job"].detail == f"a refine pass needs a worker of role all; this one is of role {role}"


def test_a_job_that_fails_in_generation_is_not_transferred() -> None:
    consumer = FakeConsumer(
        [
            make_claim("fine"),
            make_claim("bad", replace(GENERATE, prompt="crash")),
            make_claim("gone"),
            make_claim("full"),
            make_claim("lost"),
        ],
        cancel_after_polls={"gone": 1},
        full_ids={"full"},
        lost_ids={"lost"},
    )
    metrics = run_all(FakeRoute(), consumer, WorkerRole.GENERATE)
    assert set(consumer.transferred) == {"fine"}
    assert consumer.failed["bad"].code == "engine_error" and consumer.canceled_ids == ["gone"]
    assert consumer.failed["full"].code == "storage_full" and consumer.failed["full"].retryable
    assert sample(metrics, "giantleap_fenced_total") == 1


def test_an_image_that_is_not_finite_fails_where_it_is_decoded() -> None:
    generating = FakeConsumer([make_claim("good"), make_claim("bad", replace(GENERATE, prompt="nan"))])
    run_all(FakeRoute(), generating, WorkerRole.GENERATE)
    decoding = FakeConsumer(list(generating.transferred.values()))
    run_all(FakeRoute(), decoding, WorkerRole.DECODE)
    assert set(decoding.finished) == {"good"} and "not finite" in decoding.failed["bad"].detail


def test_a_generating_worker_passes_on_jobs_without_generation() -> None:
    consumer = FakeConsumer([make_claim("latent", UPSCALE, b"any"), make_claim("draw")])
    route = FakeRoute()
    run_all(route, consumer, WorkerRole.GENERATE)
    assert set(consumer.transferred) == {"latent", "draw"} and consumer.transferred["latent"].body is None
    assert route.batches == [1] and not route.finished


def test_transferred_jobs_and_others_never_share_a_batch() -> None:
    fresh, transferred = make_claim("fresh"), replace(make_claim("transferred"), base_latents=BaseLatents({}, ()))
    grids = {"tiny": LatentGrid(stride_px=8, window=4)}
    assert plan_batch([fresh, transferred], grids, 8, 10**6) == [
        [fresh],
        [transferred],
    ]


def test_a_transfer_is_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run_all(
        FakeRoute(),
        FakeConsumer([make_claim("job", replace(GENERATE, prompt="a purple zeppelin"))]),
        WorkerRole.GENERATE,
    )
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    (line,) = [line for line in lines if line["message"].startswith("job ")]
    assert (line["message"], line["status"], line["job_id"]) == ("job transferred", "transferred", "job")
    assert "zeppelin" not in json.dumps(lines)


def pocket_claims(params: GenerateParams) -> list[Claim]:
    return [make_claim(f"job-{n}", replace(params, seed=n, num_images=n)) for n in (1, 2)]


@pytest.fixture(scope="module")
def pocket() -> dict[WorkerRole, Route]:
    bundle = read_bundle(POCKET_BUNDLE)
    every: tuple[WorkerRole, ...] = (WorkerRole.ALL, WorkerRole.GENERATE, WorkerRole.DECODE)
    routes = {role: Route.open(bundle, CPU, torch.float32, role=role) for role in every}
    # A load chooses between two forms of LUA by a timing; the forms differ in the last bits.
    whole, decoding = routes[WorkerRole.ALL], routes[WorkerRole.DECODE]
    decoding.lua, decoding.pixel = whole.lua, whole.pixel
    return routes


@pytest.mark.parametrize(("method", "scale"), [("lua", 2), ("lua", 1), ("swinir", 2), ("direct", 2)])
def test_the_pocket_bundle_gives_the_same_bytes_whole_and_split(
    pocket: dict[WorkerRole, Route], method: Any, scale: int
) -> None:
    sides_px = 64 * scale
    params = replace(
        GENERATE, prompt="a red sphere", steps=2, scale=scale, method=method, width_px=sides_px, height_px=sides_px
    )
    whole, generating = FakeConsumer(pocket_claims(params)), FakeConsumer(pocket_claims(params))
    run_all(pocket[WorkerRole.ALL], whole, WorkerRole.ALL)
    run_all(pocket[WorkerRole.GENERATE], generating, WorkerRole.GENERATE)
    decoding = FakeConsumer(list(generating.transferred.values()))
    run_all(pocket[WorkerRole.DECODE], decoding, WorkerRole.DECODE)
    assert len(whole.finished) == 2 and decoding.finished == whole.finished
    assert decoding.stages.keys() == whole.stages.keys()
    assert set(decoding.stages["job-1"]) == set(whole.stages["job-1"])
