"""The worker's loop and one batch's run, on a fake route and a queue in memory: isolation, cancel, memory, drain."""

import io
import json
import logging
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image

from giantleap.models.filters.chain import FilterChain
from giantleap.models.filters.image_filter import ImageContext
from giantleap.models.generation.items import image_seed
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.job import JobParams
from giantleap.service.jobs.verification import verify_image
from giantleap.service.settings import read_settings
from giantleap.service.telemetry.logs import JsonFormatter
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.worker.process import choose_gpu, run_worker
from tests.service.fakes import GENERATE, UPSCALE, FakeConsumer, FakeRoute, make_claim, open_worker


def run_all(
    route: FakeRoute,
    consumer: FakeConsumer,
    filters: FilterChain | None = None,
    device: Device | None = None,
    **changes: Any,
) -> Metrics:
    stop = threading.Event()
    consumer.on_empty = stop.set
    worker, metrics = open_worker(route, consumer, read_settings(**changes), stop=stop, filters=filters, device=device)
    worker.run()
    return metrics


def named(name: str, prompt: str = "a red sphere", **changes: Any) -> JobParams:
    return replace(GENERATE, prompt=prompt, **changes)


def pixel(content: bytes) -> int:
    """The value of a fake image's pixels, which is its seed."""
    image = Image.open(io.BytesIO(content))
    assert image.size == (64, 64)
    value = image.getpixel((0, 0))
    assert isinstance(value, tuple)
    return value[0]


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_jobs_of_one_kind_run_together_and_each_gets_its_own_images() -> None:
    consumer = FakeConsumer([make_claim(f"job-{n}", replace(GENERATE, seed=n, num_images=2)) for n in (10, 20, 30)])
    route = FakeRoute()
    metrics = run_all(route, consumer)
    assert route.batches == [6]
    assert consumer.batch_jobs == {"job-10": 3, "job-20": 3, "job-30": 3}, "jobs, not images"
    found = {name: [pixel(content) for _, content in files] for name, files in consumer.finished.items()}
    assert found == {"job-10": [10, 11], "job-20": [20, 21], "job-30": [30, 31]}
    assert [file.seed for file, _ in consumer.finished["job-20"]] == [20, 21]
    assert sample(metrics, "giantleap_images_total", bundle="tiny", scale="2") == 6
    assert sample(metrics, "giantleap_pixels_total", bundle="tiny", scale="2") == 6 * 64 * 64


def test_files_say_that_they_are_generated_and_name_the_prompt_only_where_the_request_asks() -> None:
    claims = [make_claim("plain", GENERATE), make_claim("named", replace(GENERATE, embed_parameters=True, seed=5))]
    consumer = FakeConsumer(claims)
    run_all(FakeRoute(), consumer)
    marks = {name: verify_image(files[0][1], None, 64 * 64) for name, files in consumer.finished.items()}
    assert all(each.generated for each in marks.values()) and marks["plain"].xmp.parameters is None
    parameters = json.loads(str(marks["named"].xmp.parameters))
    assert (parameters["prompt"], parameters["seed"], parameters["bundle"]) == ("a red sphere", 5, "tiny")


class Dark:
    """Refuses images that are dark; the fake route's are as bright as their seed. Cannot judge black ones."""

    def refuses(self, pixels: NDArray[np.uint8], context: ImageContext) -> bool:
        assert context == ImageContext("generate", "tiny", 64, 64)
        if pixels.max() == 0:
            raise RuntimeError("too dark to say")
        return bool(pixels.max() < 10)


def test_a_filter_fails_the_job_of_the_image_that_it_refuses_and_no_other() -> None:
    seeds = {"bright": 50, "dark": 5, "black": 0, "half": 9}  # `half` has two images, of which the first is dark
    jobs = {name: replace(GENERATE, seed=seed, num_images=1 + (name == "half")) for name, seed in seeds.items()}
    consumer, route = FakeConsumer([make_claim(name, params) for name, params in jobs.items()]), FakeRoute()
    metrics = run_all(route, consumer, filters=FilterChain({"dark": Dark()}))
    assert route.batches == [5], "nothing is run again"
    assert list(consumer.finished) == ["bright"]
    errors = {name: (error.code, error.retryable) for name, error in consumer.failed.items()}
    refused, failed = ("blocked_by_filter", False), ("filter_failed", False)
    assert errors == {"dark": refused, "black": failed, "half": refused}
    assert sample(metrics, "giantleap_job_failures_total", bundle="tiny", code="blocked_by_filter") == 2


@pytest.mark.parametrize(("batch_items", "batches"), [(4, [1, 1, 1]), (3, [3])])
def test_a_cpu_runs_jobs_together_only_where_a_full_claim_waits(batch_items: int, batches: list[int]) -> None:
    consumer, route = FakeConsumer([make_claim(name) for name in "abc"]), FakeRoute()
    run_all(route, consumer, device=Device("cpu", 1, 0, {"pocket": {}, "tiny": {}}), batch_items=batch_items)
    assert route.batches == batches
    assert sorted(consumer.finished) == ["a", "b", "c"], "batches that finish at once end in any order"


def test_every_stage_is_timed_and_reported() -> None:
    consumer = FakeConsumer([make_claim("job")])
    metrics = run_all(FakeRoute(), consumer)
    assert set(consumer.stages["job"]) == {"generate", "upscale", "decode", "encode"}
    assert [e[2]["step"] for e in consumer.events if e[1] == "step"] == [1, 2, 3]
    assert [e[2]["stage"] for e in consumer.events if e[1] == "stage"] == ["generate", "upscale", "decode", "encode"]
    for stage in consumer.stages["job"]:
        labels = {"stage": stage, "bundle": "tiny", "method": "lua", "scale": "2", "engine": "fake", "warmup": "false"}
        assert sample(metrics, "giantleap_stage_duration_seconds_count", **labels) == 1
    assert sample(metrics, "giantleap_peak_memory_bytes", device="cpu", source="process_rss") == 1000


def test_scale_one_is_not_upscaled() -> None:
    consumer = FakeConsumer([make_claim("job", replace(GENERATE, scale=1))])
    run_all(FakeRoute(), consumer)
    assert set(consumer.stages["job"]) == {"generate", "decode", "encode"}
    assert pixel(consumer.finished["job"][0][1]) == 1


def test_a_job_that_crashes_its_batch_fails_alone() -> None:
    prompts = ["a", "b", "crash", "d"]
    consumer = FakeConsumer([make_claim(p, replace(GENERATE, prompt=p, seed=n)) for n, p in enumerate(prompts)])
    route = FakeRoute()
    metrics = run_all(route, consumer)
    assert route.batches == [4, 1, 1, 1, 1]
    assert {name: pixel(files[0][1]) for name, files in consumer.finished.items()} == {"a": 0, "b": 1, "d": 3}
    assert consumer.failed["crash"].code == "engine_error" and not consumer.failed["crash"].retryable
    assert "bad prompt" not in consumer.failed["crash"].detail, "the text of an unforeseen error may quote the input"
    jobs = {"kind": "generate", "bundle": "tiny"}
    assert sample(metrics, "giantleap_jobs_total", **jobs, status="succeeded") == 3
    assert sample(metrics, "giantleap_jobs_total", **jobs, status="failed") == 1


def test_an_image_that_is_not_finite_fails_its_job_and_no_other() -> None:
    consumer = FakeConsumer([make_claim("good"), make_claim("bad", named("bad", "nan"))])
    route = FakeRoute()
    run_all(route, consumer)
    assert route.batches == [2], "nothing is run again"
    assert set(consumer.finished) == {"good"} and set(consumer.failed) == {"bad"}
    assert "not finite" in consumer.failed["bad"].detail


def test_one_bad_image_fails_its_whole_job_with_no_partial_result() -> None:
    latents = torch.ones(2, 4, 4, 4)
    latents[1] = float("nan")
    body = safetensors.torch.save({"latent": latents})
    consumer = FakeConsumer([make_claim("job", replace(UPSCALE, batch_items=2), body)])
    run_all(FakeRoute(), consumer)
    assert not consumer.finished and "not finite" in consumer.failed["job"].detail


def test_a_batch_too_large_for_the_memory_is_halved_until_it_fits() -> None:
    consumer = FakeConsumer([make_claim(f"job-{n}", replace(GENERATE, seed=n)) for n in range(8)])
    route = FakeRoute(fits=2)
    run_all(route, consumer)
    assert route.batches == [8, 4, 2, 2, 4, 2, 2]
    assert [pixel(consumer.finished[f"job-{n}"][0][1]) for n in range(8)] == list(range(8))
    assert route.freed == 3, "the cache is given back after each failure"


def test_a_job_that_never_fits_fails_retryably_and_its_neighbors_succeed() -> None:
    consumer = FakeConsumer([make_claim("a"), make_claim("huge", named("huge", "huge")), make_claim("c")])
    metrics = run_all(FakeRoute(), consumer)
    assert set(consumer.finished) == {"a", "c"}
    assert consumer.failed["huge"].code == "engine_fault" and consumer.failed["huge"].retryable
    assert sample(metrics, "giantleap_retries_total", bundle="tiny") == 1
    assert sample(metrics, "giantleap_jobs_total", kind="generate", bundle="tiny", status="failed") is None


def test_the_last_attempt_of_a_retryable_failure_counts_as_failed() -> None:
    claim = replace(make_claim("huge", named("huge", "huge")), delivery=3)
    metrics = run_all(FakeRoute(), FakeConsumer([claim]), max_deliveries=3)
    assert sample(metrics, "giantleap_jobs_total", kind="generate", bundle="tiny", status="failed") == 1


def test_a_job_that_was_started_before_runs_alone_for_it_may_be_what_ended_its_worker() -> None:
    """Else each end of the worker would count against all that it had claimed, and they would be given up with it."""
    first, again, other = (make_claim(name, named(name)) for name in ("first", "again", "other"))
    consumer = FakeConsumer([first, replace(again, delivery=2), replace(other, delivery=2)])
    run_all(FakeRoute(), consumer)
    assert list(consumer.finished) == ["again"] and consumer.batch_jobs == {"again": 1}
    assert consumer.released_ids == ["first", "other"], "the next claim has them, and this start is not counted"


def test_a_lost_device_ends_the_process_rather_than_fail_the_jobs() -> None:
    def lose(step: int) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access", 700)

    consumer = FakeConsumer([make_claim("a"), make_claim("b")])
    with pytest.raises(torch.AcceleratorError):
        run_all(FakeRoute(on_step=lose), consumer)
    assert not consumer.failed and not consumer.finished, "the leases bring the jobs to another worker"


def test_a_job_larger_than_the_budget_runs_in_slices() -> None:
    consumer = FakeConsumer([make_claim("job", replace(GENERATE, num_images=4, seed=5))])
    route = FakeRoute()
    run_all(route, consumer, batch_budget_latent_px=100)
    assert route.batches == [1, 1, 1, 1]
    assert [pixel(content) for _, content in consumer.finished["job"]] == [5, 6, 7, 8]


def test_a_canceled_job_stops_after_the_step_at_which_it_was_seen() -> None:
    consumer = FakeConsumer([make_claim("job", replace(GENERATE, steps=50))], cancel_after_polls={"job": 3})
    route = FakeRoute()
    metrics = run_all(route, consumer)
    assert route.steps_run == 3, "one poll before the batch, one after each step"
    assert consumer.canceled_ids == ["job"] and not consumer.finished
    assert sample(metrics, "giantleap_jobs_total", kind="generate", bundle="tiny", status="canceled") == 1


def test_a_canceled_job_does_not_disturb_its_neighbors() -> None:
    both = [make_claim("gone"), make_claim("stays", replace(GENERATE, seed=7))]
    consumer = FakeConsumer(both, cancel_after_polls={"gone": 1})
    route = FakeRoute()
    run_all(route, consumer)
    assert consumer.canceled_ids == ["gone"] and pixel(consumer.finished["stays"][0][1]) == 7
    assert route.steps_run == 3


def test_a_job_canceled_before_its_batch_costs_nothing() -> None:
    consumer = FakeConsumer([make_claim("gone")], cancel_after_polls={"gone": 0})
    route = FakeRoute()
    run_all(route, consumer)
    assert route.batches == [] and consumer.canceled_ids == ["gone"]


def test_a_lost_lease_is_counted_and_not_recorded_as_success() -> None:
    consumer = FakeConsumer([make_claim("lost"), make_claim("kept")], lost_ids={"lost"})
    metrics = run_all(FakeRoute(), consumer)
    assert set(consumer.finished) == {"kept"}
    assert sample(metrics, "giantleap_fenced_total") == 1
    assert sample(metrics, "giantleap_jobs_total", kind="generate", bundle="tiny", status="succeeded") == 1
    assert sample(metrics, "giantleap_images_total", bundle="tiny", scale="2") == 1


def test_results_that_do_not_fit_fail_retryably() -> None:
    consumer = FakeConsumer([make_claim("job")], full_ids={"job"})
    run_all(FakeRoute(), consumer)
    assert consumer.failed["job"].code == "storage_full" and consumer.failed["job"].retryable


def test_a_stop_finishes_what_runs_and_releases_what_waits() -> None:
    stop = threading.Event()
    consumer = FakeConsumer([make_claim("runs"), make_claim("waits", replace(GENERATE, steps=4))])
    route = FakeRoute(on_step=lambda step: stop.set())
    worker, _ = open_worker(route, consumer, read_settings(), stop=stop)
    worker.run()
    assert set(consumer.finished) == {"runs"} and consumer.released_ids == ["waits"]


def test_a_stop_past_its_grace_releases_what_runs() -> None:
    stop = threading.Event()
    consumer = FakeConsumer([make_claim("runs", replace(GENERATE, steps=50))])
    route = FakeRoute(on_step=lambda step: stop.set())
    worker, metrics = open_worker(route, consumer, read_settings(drain_grace_s=0), stop=stop)
    worker.run()
    assert route.steps_run == 1 and consumer.released_ids == ["runs"]
    assert not consumer.finished and not consumer.failed and not consumer.canceled_ids
    assert sample(metrics, "giantleap_fenced_total") == 0


def test_nothing_is_claimed_after_a_stop() -> None:
    stop = threading.Event()
    stop.set()
    consumer = FakeConsumer([make_claim("job")])
    worker, _ = open_worker(FakeRoute(), consumer, read_settings(), stop=stop)
    worker.run()
    assert len(consumer.waiting) == 1


def test_a_latent_result_is_not_decoded() -> None:
    body = safetensors.torch.save({"latent": torch.full((2, 4, 3, 4), 5.0)})
    params = replace(UPSCALE, batch_items=2, latent_height=3, output="latent")
    consumer = FakeConsumer([make_claim("job", params, body)])
    run_all(FakeRoute(), consumer)
    assert set(consumer.stages["job"]) == {"upscale", "encode"}
    files = consumer.finished["job"]
    assert [file.content_type for file, _ in files] == ["application/x-safetensors"] * 2
    for file, content in files:
        enlarged = safetensors.torch.load(content)["latent"]
        assert enlarged.shape == (4, 6, 8) and (enlarged == 5).all()
        assert file.size_bytes == len(content)


def test_an_input_that_cannot_be_read_fails_alone() -> None:
    good = safetensors.torch.save({"latent": torch.full((1, 4, 4, 4), 9.0)})
    consumer = FakeConsumer([make_claim("good", UPSCALE, good), make_claim("bad", UPSCALE, b"no tensor")])
    run_all(FakeRoute(), consumer)
    assert pixel(consumer.finished["good"][0][1]) == 9
    assert set(consumer.failed) == {"bad"}


def test_a_prompt_that_is_cut_off_is_warned_of() -> None:
    consumer = FakeConsumer([make_claim("long", named("long", "zeppelin " * 33)), make_claim("short")])
    run_all(FakeRoute(), consumer)
    assert consumer.warnings["short"] == []
    (warning,) = consumer.warnings["long"]
    assert "3 tokens" in warning and "zeppelin" not in warning


def test_one_log_line_per_job_holds_its_times_and_never_its_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    prompts = {"fine": "a purple zeppelin", "bad": "crash"}
    consumer = FakeConsumer([make_claim(name, named(name, prompt)) for name, prompt in prompts.items()])
    run_all(FakeRoute(), consumer)
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    ended = [line for line in lines if line["message"] == "job ended"]
    assert {line["job_id"]: line["status"] for line in ended} == {"fine": "succeeded", "bad": "failed"}
    assert all(set(line["stages_s"]) == {"generate", "upscale", "decode", "encode"} for line in ended)
    assert "zeppelin" not in json.dumps(lines)


def test_seeds_count_on_and_stay_in_range() -> None:
    assert [image_seed(5, index) for index in range(3)] == [5, 6, 7]
    assert image_seed(2**63 - 1, 1) == 0


def test_a_worker_without_redis_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="redis_url"):
        run_worker(read_settings(redis_url=None), threading.Event())


def test_each_worker_of_a_machine_takes_a_gpu_of_its_own() -> None:
    assert [choose_gpu("auto", number, 2) for number in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert choose_gpu("auto", 3, 0) == "auto"
    assert [choose_gpu(device, 1, 2) for device in ("cpu", "cuda", "cuda:0")] == ["cpu", "cuda", "cuda:0"]
