"""Measure what the worker's pipeline gives, against a worker that does everything in turn, in one run.

`python -m benchmarks.pipeline` prints the share of time in which the device is busy, on a device whose stages sleep and
give 4096-px images (`giantleap_device_busy_seconds_total` from its first to its last batch, with jobs waiting), and
images per second of 16 queued jobs on the pocket bundle at 512 px, in turns. Every write goes to a real Redis and to
disk, files to a directory. It writes `benchmarks/results/pipeline.json`.
"""

import asyncio
import json
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import typer
from prometheus_client import CollectorRegistry
from torch import Tensor

from benchmarks.machine import read_machine
from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.bundle.descriptor import DecodeName, Method
from giantleap.models.bundle.modes import PLAIN
from giantleap.models.device import PeakMemory, StageClock, StageObserver
from giantleap.models.filters.chain import FilterChain
from giantleap.models.generation.items import GenerationItem, StepCallback
from giantleap.models.provenance.marker import ImageMarker
from giantleap.models.route import Route
from giantleap.models.worker_role import WorkerRole
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.client import open_async_redis, open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.producer import JobProducer
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.grid import LatentGrid
from giantleap.service.jobs.job import GenerateParams, Job, JobState, Priority
from giantleap.service.results.jobs import open_files
from giantleap.service.settings import POCKET_BUNDLE, Settings, read_settings
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.telemetry.tracing import Tracing
from giantleap.service.worker.bundles import BundleCache
from giantleap.service.worker.drain import Drain
from giantleap.service.worker.loop import MAX_FINISHING, Worker
from giantleap.service.worker.process import open_bundles
from giantleap.service.worker.watchdog import Watchdog

ORDERS = {"in_turn": 0, "pipeline": MAX_FINISHING}
FAKE_SIDE_PX, POCKET_SIDE_PX, POCKET_JOBS = 4096, 512, 16
STEPS = 4
GRAIN = 4.0  # deviation, in levels of 255
PROMPT = "a large green cone on a purple floor under an orange sky, in the centre"


class BusyMetrics(Metrics):
    """Notes when the counter of busy seconds changes, and its value."""

    def __init__(self) -> None:
        super().__init__(CollectorRegistry())
        self.marks: list[tuple[float, float]] = []

    def count_busy(self, device: str, busy_s: float) -> None:
        """Counts, and reads the counter."""
        super().count_busy(device, busy_s)
        value = self.registry.get_sample_value("giantleap_device_busy_seconds_total", {"device": device})
        assert value is not None
        self.marks.append((time.perf_counter(), value))

    def busy_share(self) -> float:
        """The share of the time from the end of the first batch to that of the last."""
        (start_s, before_s), (end_s, after_s) = self.marks[0], self.marks[-1]
        return (after_s - before_s) / (end_s - start_s)


class CountingConsumer(JobConsumer):
    """Stops its worker after so many ends of jobs; `last_end_s` is when the last one was written."""

    jobs = 0
    last_end_s = 0.0

    def expect(self, jobs: int, stop: threading.Event) -> None:
        """Count these."""
        self.jobs, self._done, self._counting = jobs, stop, threading.Lock()

    def complete(self, claim: Claim, *ended: Any) -> JobState | None:
        """Completes, and counts."""
        state = super().complete(claim, *ended)
        if state is not JobState.SUCCEEDED:
            raise RuntimeError(f"a job ended as {state}")
        with self._counting:
            self.jobs -= 1
            self.last_end_s = time.perf_counter()
        if self.jobs == 0:
            self._done.set()
        return state


class SleepingRoute:
    """A route whose stages sleep; each image is the same picture with grain."""

    name, engine, window = "fake", "fake", 4
    role, previewer, device = WorkerRole.ALL, None, torch.device("cpu")
    generator = SimpleNamespace(modes=PLAIN, truncated_tokens=lambda text: 0)
    vae = SimpleNamespace()

    def __init__(self, batch_s: float) -> None:
        self._batch_s = batch_s
        side = np.linspace(0, 200, FAKE_SIDE_PX, dtype=np.float32)
        noise = np.random.default_rng(0).normal(20.0, GRAIN, (FAKE_SIDE_PX, FAKE_SIDE_PX, 3))
        self._image = torch.from_numpy((noise + side[:, None]).clip(0, 255).astype(np.uint8))

    def clock(self) -> StageClock:
        """Of one batch."""
        return StageClock(self.device)

    def generate(
        self, items: Sequence[GenerationItem], method: Method, scale: float, *, on_step: StepCallback, **_: object
    ) -> list[Tensor | None]:
        """A quarter of the time."""
        for step in range(1, STEPS + 1):
            time.sleep(self._batch_s / 4 / STEPS)
            on_step(step, STEPS)
        return [torch.zeros(4, 8, 8) for _ in items]

    def upscale_and_decode(
        self, latents: list[Tensor], scale: float, method: Method, decode: DecodeName | None, observer: StageObserver,
        refine: Sequence[GenerationItem] = (),
    ) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
        """A quarter and a half of the time."""
        with observer.measure("upscale"):
            time.sleep(self._batch_s / 4)
        with observer.measure("decode"):
            time.sleep(self._batch_s / 2)
        return latents, [self._image for _ in latents]

    def reset_peak_memory(self) -> None:
        """Nothing."""

    def peak_memory(self) -> PeakMemory:
        """Nothing was measured."""
        return PeakMemory(0, "process_rss")

    def free_cache(self) -> None:
        """Nothing."""


def make_jobs(number: int, side_px: int, bundle: Bundle) -> list[Job]:
    """Jobs of one image, with seeds of their own."""
    defaults = bundle.defaults
    return [
        Job(
            str(uuid.uuid4()),
            bundle.name,
            priority=Priority.HIGH,
            created_at_s=time.time(),
            params=GenerateParams(
                PROMPT, "", 4, side_px, side_px, defaults.steps, defaults.guidance_scale, seed, 1, "png"
            ),
        )
        for seed in range(number)
    ]


async def enqueue(settings: Settings, jobs: Sequence[Job]) -> None:
    """Put jobs in the queue."""
    assert settings.redis_url is not None
    async with open_async_redis(settings.redis_url) as client:
        producer = JobProducer(client, settings)
        for job in jobs:
            await producer.enqueue(job)


def run_jobs(
    settings: Settings, bundles: BundleCache, device: Device, jobs: Sequence[Job], max_finishing: int, metrics: Metrics
) -> float:
    """Seconds in which one worker ends jobs that all wait when it starts."""
    asyncio.run(enqueue(settings, jobs))
    assert settings.redis_url is not None
    stop = threading.Event()
    names, files = tuple(bundles.bundles), open_files(settings)
    with open_redis(settings.redis_url) as client:
        consumer = CountingConsumer(client, settings, names, "bench", device, settings.role, stop, files)
        consumer.expect(len(jobs), stop)
        consumer.open()
        worker = Worker(
            bundles=bundles,
            device=device,
            consumer=consumer,
            metrics=metrics,
            tracing=Tracing(),
            watchdog=Watchdog(settings.step_timeout_s),
            drain=Drain(stop, settings.drain_grace_s),
            settings=settings,
            marker=ImageMarker(),
            filters=FilterChain(),
            max_finishing=max_finishing,
        )
        start_s = time.perf_counter()
        worker.run()
        consumer.close()
    return consumer.last_end_s - start_s


def measure_fake(settings: Settings, jobs: int, batch_s: float) -> dict[str, float]:
    """The busy share of each order."""
    bundle, shares = read_bundle(POCKET_BUNDLE), {}
    for order, max_finishing in ORDERS.items():
        metrics = BusyMetrics()
        route = cast(Route, SleepingRoute(batch_s))
        cache = BundleCache({bundle.name: bundle}, lambda _, opened=route: opened, route.device, None, metrics)  # type: ignore[misc]
        cache.grids[bundle.name] = LatentGrid(bundle.latent_space.stride_px, cache.load(bundle.name).window)
        device = Device("cpu", 1, 0, {bundle.name: {}})
        run_jobs(settings, cache, device, make_jobs(jobs, FAKE_SIDE_PX, bundle), max_finishing, metrics)
        shares[order] = round(metrics.busy_share(), 4)
        typer.echo(f"device busy, {order}: {shares[order]:.2%}")
    return shares


def measure_pocket(settings: Settings, rounds: int) -> Mapping[str, object]:
    """Images per second of each order, in turns, the ratio of the medians, and the most that it could be."""
    cache, device = open_bundles(settings, Metrics(CollectorRegistry()), threading.Event())
    [bundle] = cache.bundles.values()
    rates: dict[str, list[float]] = {order: [] for order in ORDERS}
    busy_shares: dict[str, list[float]] = {order: [] for order in ORDERS}
    for _ in range(rounds):
        for order, max_finishing in ORDERS.items():
            jobs, metrics = make_jobs(POCKET_JOBS, POCKET_SIDE_PX, bundle), BusyMetrics()
            seconds = run_jobs(settings, cache, device, jobs, max_finishing, metrics)
            rates[order].append(round(POCKET_JOBS / seconds, 3))
            busy_shares[order].append(round(metrics.marks[-1][1] / seconds, 4))
            typer.echo(f"pocket, {order}: {rates[order][-1]} images/s, device busy {busy_shares[order][-1]:.2%}")
    ratio = statistics.median(rates["pipeline"]) / statistics.median(rates["in_turn"])
    limit = 1 / statistics.median(busy_shares["in_turn"])
    typer.echo(
        f"pocket: {ratio:.3f} times the images per second of the order in turn; a busy device: {limit:.3f} times"
    )
    return {"images_per_s": rates, "busy_share": busy_shares, "ratio": round(ratio, 3), "limit": round(limit, 3)}


@contextmanager
def open_queue() -> Iterator[Settings]:
    """A Redis of its own, and a directory of results."""
    redis = EmbeddedRedis(appendfsync="always")
    with tempfile.TemporaryDirectory(prefix="giantleap-pipeline-") as directory:
        root = Path(directory)
        (root / "files").mkdir()
        try:
            url = redis.start(root)
            yield read_settings(
                redis_url=url, key_prefix="bench", result_store=f"file://{root}/files", device="cpu", job_ttl_s=3600
            )
        finally:
            redis.stop()


def run(jobs: int, batch_s: float, rounds: int, out: Path) -> None:
    """Measure, print, write the JSON."""
    with open_queue() as settings:
        fake = measure_fake(settings, jobs, batch_s)
        pocket = measure_pocket(settings, rounds)
    report = {
        "machine": read_machine(("torch", "isal", "redis")),
        "fake_device": {"jobs": jobs, "batch_s": batch_s, "image_px": FAKE_SIDE_PX, "busy_share": fake},
        "pocket": {"jobs": POCKET_JOBS, "image_px": POCKET_SIDE_PX, **pocket},
    }
    out.write_text(json.dumps(report, indent=1) + "\n")
