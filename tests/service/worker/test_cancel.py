"""An acknowledged cancel ends a job as canceled, at whatever moment it comes: between stages, in one, at the end."""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import redis
import safetensors.torch
import torch

from giantleap.models.bundle.bundle import read_bundle
from giantleap.models.device import StageClock
from giantleap.models.generation.refinement import Refinement
from giantleap.models.route import Route
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.runner import ScriptRunner
from giantleap.service.jobs.job import Job, JobParams, JobState
from giantleap.service.settings import Settings, read_settings
from giantleap.service.telemetry.tracing import Tracing
from giantleap.service.worker import progress
from giantleap.service.worker.drain import Drain
from giantleap.service.worker.items import Stop, to_items
from giantleap.service.worker.progress import BatchObserver, BatchStopped, StopFlags
from giantleap.service.worker.watchdog import Watchdog
from tests.service.fakes import GENERATE, UPSCALE, FakeConsumer, FakeRoute, make_claim, open_worker

LATENT = safetensors.torch.save({"latent": torch.ones(1, 4, 4, 4)})
MOMENTS = [
    (GENERATE, {"step": 1}),
    (GENERATE, {"step": 3}),
    *((GENERATE, {"stage": stage}) for stage in ("generate", "upscale", "decode", "encode")),
    *((UPSCALE, {"stage": stage}) for stage in ("upscale", "decode", "encode")),
    (replace(GENERATE, refine=Refinement(0.2, 4)), {"stage": "refine"}),
    (replace(UPSCALE, refine=Refinement(0.2, 4), prompt="a red sphere", seed=1), {"stage": "refine"}),
]


class CancelingConsumer(JobConsumer):
    """Cancels a job, as a client does, at the moment when it reports the awaited event."""

    def __init__(self, settings: Settings, awaited: Mapping[str, object]) -> None:
        assert settings.redis_url is not None
        self.client = open_redis(settings.redis_url)
        super().__init__(self.client, settings, ("tiny",), "canceling")
        self.runner, self.awaited = ScriptRunner(self.client, settings), awaited

    def emit(self, claim: Claim, name: str, data: Mapping[str, object], image: bytes | None = None) -> None:
        super().emit(claim, name, data, image)
        if self.awaited.items() <= data.items():
            stored = self.runner.run(scripts.CANCEL_JOB, {"id": claim.job.id})
            assert stored is not None and stored.cancel and stored.state is JobState.PROCESSING, "acknowledged"


@pytest.mark.parametrize(("params", "moment"), MOMENTS, ids=str)
async def test_a_cancel_is_kept_at_every_moment_of_a_job(
    params: JobParams,
    moment: dict[str, object],
    settings: Settings,
    open_producer: Any,
    make_job: Any,
    redis_client: redis.Redis,
) -> None:
    made: Job = make_job(bundle="tiny")
    job = Job(made.id, "tiny", priority=made.priority, created_at_s=made.created_at_s, params=params)
    stop = threading.Event()
    consumer = CancelingConsumer(settings, moment)
    worker, metrics = open_worker(FakeRoute(), consumer, settings, stop=stop)
    async with open_producer() as producer:
        await producer.enqueue(job, None if params.kind == "generate" else LATENT)
        consumer.open()
        thread = threading.Thread(target=worker.run)
        thread.start()
        record = await producer.wait(job.id, 60.0)
        stop.set()
        await asyncio.to_thread(thread.join, 60.0)
        consumer.close()
        consumer.client.close()
        assert (record.state, record.results) == (JobState.CANCELED, ())
        assert await producer.read_result(job.id, 0) is None
        assert (await producer.stats()).blob_bytes == 0
        events = [event.data async for event in producer.events(job.id)]
    assert events[-1] == {"state": "canceled"} and events.count({"state": "succeeded"}) == 0
    assert list(redis_client.scan_iter(f"{Keys(settings.key_prefix).tag}:upload:*")) == []
    labels = {"kind": params.kind, "bundle": "tiny", "status": "canceled"}
    assert metrics.registry.get_sample_value("giantleap_jobs_total", labels) == 1


def observe(claims: list[Claim], consumer: FakeConsumer, clock: list[float], grace_s: float = 60.0) -> BatchObserver:
    stop = threading.Event()
    if grace_s == 0:
        stop.set()
    flags, stages = StopFlags(consumer, Drain(stop, grace_s)), StageClock(torch.device("cpu"))
    with Tracing().batch([claim.job for claim in claims], {}) as trace:
        items = to_items(claims)
        return BatchObserver(items, stages, trace, consumer, flags, Watchdog(60.0), lambda: clock[0])


def test_a_stage_reports_its_progress_each_second_and_reads_the_flags_each_half_second() -> None:
    clock, consumer = [0.0], FakeConsumer()
    observer = observe([make_claim("job")], consumer, clock)
    with observer.measure("decode"):
        for tenth in range(25):
            clock[0] = tenth / 10
            observer.report_part("decode", tenth / 25)
        observer.report_part("decode", None)
    assert [data for _, name, data in consumer.events if name == "progress"] == [
        {"stage": "decode", "seconds": 1.0, "fraction": 0.4},
        {"stage": "decode", "seconds": 2.0, "fraction": 0.8},
    ]
    assert consumer.polls == 5, "at 0.5, 1.0, 1.5 and 2.0 s, and at the end of the stage"


def test_a_batch_stops_inside_a_stage_once_none_of_its_jobs_is_wanted() -> None:
    clock, consumer = [0.0], FakeConsumer(cancel_after_polls={"first": 0, "second": 1})
    observer = observe([make_claim("first"), make_claim("second")], consumer, clock)
    with pytest.raises(BatchStopped), observer.measure("decode"):
        clock[0] = 1.0
        observer.report_part("decode", 0.1)  # the second job goes on
        clock[0] = 2.0
        observer.report_part("decode", 0.2)
        raise AssertionError("the stage went on")


def test_a_stop_past_its_grace_ends_a_stage_but_keeps_results_that_are_there() -> None:
    clock, consumer = [0.0], FakeConsumer()
    observer = observe([make_claim("job")], consumer, clock, grace_s=0)
    with observer.measure("encode"):
        pass
    with pytest.raises(BatchStopped), observer.measure("decode"):
        clock[0] = 1.0
        observer.report_part("decode", 0.1)


def test_a_stopped_item_is_canceled_or_released() -> None:
    flags = StopFlags(FakeConsumer(cancel_after_polls={"gone": 0}), Drain(threading.Event(), 1.0))
    gone, stays = to_items([make_claim("gone"), make_claim("stays")])
    flags.poll([gone.claim, stays.claim])
    assert [flags.stop_of(item) for item in (gone, stays)] == [Stop.CANCELED, Stop.RELEASED]
    assert [flags.is_stopped(item) for item in (gone, stays)] == [True, False]


@dataclass
class CancelsInRefine(FakeConsumer):
    """Cancels the job `gone` at its second look at the flags after the upscale, which is after the first step."""

    looks: int = 0

    def find_canceled(self, claims: Sequence[Claim]) -> set[str]:
        upscaled = any(name == "stage" and data["stage"] == "upscale" for _, name, data in self.events)
        self.looks += upscaled and claims[0].job.id == "gone"
        return {"gone"} if self.looks >= 3 else set()


def test_a_cancel_in_the_middle_of_a_refine_pass_leaves_nothing_behind(
    tiny_bundle_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(tiny_bundle_dir)
    route = Route.open(bundle, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(progress, "_POLL_S", 0.0)
    images = []
    for names in (["plain"], ["gone", "plain"]):
        stop, steps = threading.Event(), list[int]()
        refined = replace(GENERATE, refine=Refinement(0.5, 6), scale=2, width_px=128, height_px=128)
        plain = replace(refined, refine=None)
        claims = [make_claim(name, refined if name == "gone" else plain) for name in names]
        consumer = CancelsInRefine(claims, on_empty=stop.set)
        hook = route.generator.pipeline.unet.register_forward_pre_hook(lambda *_, steps=steps: steps.append(1))
        open_worker(route, consumer, read_settings(), stop=stop, bundle=bundle)[0].run()
        hook.remove()
        images.append(consumer.finished["plain"][0][1])
        assert consumer.canceled_ids == names[:-1]
        assert len(steps) == 3 * len(names) + (2 if "gone" in names else 0), "two of six steps of the pass"
    assert images[0] == images[1]
