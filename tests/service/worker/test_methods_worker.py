"""Methods that draw again in the worker, on random weights: in batches, canceled in the middle, and what they leave."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.bundle.descriptor import REDIFFUSION, Rediffusion
from giantleap.models.methods.sampling import count_steps
from giantleap.models.route import Route
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.settings import read_settings
from tests.service.fakes import GENERATE, FakeConsumer, make_claim, open_worker

PLAIN = replace(GENERATE, width_px=128, height_px=128)
EVERY = pytest.mark.parametrize("method", REDIFFUSION)


@pytest.fixture(scope="module")
def bundle(tiny_bundle_dir: Path) -> Bundle:
    return read_bundle(tiny_bundle_dir)


@pytest.fixture(scope="module")
def route(bundle: Bundle) -> Route:
    return Route.open(bundle, torch.device("cpu"), torch.float32)


def run(route: Route, bundle: Bundle, *claims: Claim, **consumer_fields: dict[str, int]) -> FakeConsumer:
    stop = threading.Event()
    consumer = FakeConsumer(list(claims), on_empty=stop.set, **consumer_fields)  # type: ignore[arg-type]
    worker, _ = open_worker(route, consumer, read_settings(), stop=stop, bundle=bundle)
    worker.run()
    return consumer


def content(consumer: FakeConsumer, name: str) -> list[bytes]:
    return [file for _, file in consumer.finished[name]]


@EVERY
def test_a_plain_job_after_a_method_is_the_same_and_a_batch_is_its_jobs(
    route: Route, bundle: Bundle, method: Rediffusion
) -> None:
    job = replace(PLAIN, method=method)
    claims = [make_claim("two", replace(job, num_images=2)), make_claim("other", replace(job, seed=2))]
    done = run(route, bundle, make_claim("before", PLAIN), *claims, make_claim("after", PLAIN))
    assert done.batch_jobs == {"before": 2, "after": 2, "two": 2, "other": 2} and not done.failed
    alone = run(route, bundle, make_claim("before", PLAIN), make_claim("alone", job))
    last = run(route, bundle, make_claim("last", PLAIN))
    assert content(last, "last") == content(alone, "before")
    assert content(done, "two") == content(alone, "alone") + content(done, "other")
    assert set(done.stages["two"]) == {"generate", "decode", "encode"}
    steps = [event[2] for event in done.events if event[0] == "two" and event[1] == "step"]
    total = 3 * count_steps(method, 2, 3)
    assert steps == [{"step": step, "steps": total} for step in range(1, total + 1)]


@EVERY
def test_a_method_that_is_canceled_in_the_middle_leaves_the_next_job_alone(
    route: Route, bundle: Bundle, method: Rediffusion
) -> None:
    plain = content(run(route, bundle, make_claim("plain", PLAIN)), "plain")
    canceled = run(route, bundle, make_claim("gone", replace(PLAIN, method=method)), cancel_after_polls={"gone": 2})
    assert canceled.canceled_ids == ["gone"] and not canceled.finished
    steps = [event[2]["step"] for event in canceled.events if event[1] == "step"]
    assert steps == [1, 2], "it ends with the step after whose report it was wanted no more"
    assert content(run(route, bundle, make_claim("plain", PLAIN)), "plain") == plain
