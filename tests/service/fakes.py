"""Fakes of our own for the worker's tests: jobs, a queue in memory and a route without a network."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from giantleap.models.bundle.bundle import Bundle, read_bundle
from giantleap.models.bundle.descriptor import DecodeName, Method
from giantleap.models.bundle.modes import PLAIN
from giantleap.models.device import PartCallback, PeakMemory, StageClock, StageObserver
from giantleap.models.filters.chain import FilterChain
from giantleap.models.generation.items import CancelCheck, GenerationItem, StepCallback
from giantleap.models.generation.previews import PreviewCallback
from giantleap.models.provenance.marker import ImageMarker
from giantleap.models.worker_role import WorkerRole
from giantleap.service.errors import StorageFull
from giantleap.service.jobqueue.claims import BaseLatents, Claim, LoadedBundles
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.grid import LatentGrid
from giantleap.service.jobs.job import (
    GenerateParams,
    Job,
    JobError,
    JobParams,
    JobState,
    Priority,
    ResultFile,
    UpscaleParams,
)
from giantleap.service.settings import POCKET_BUNDLE, Settings
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.telemetry.tracing import Tracing
from giantleap.service.worker.bundles import BundleCache
from giantleap.service.worker.drain import Drain
from giantleap.service.worker.loop import MAX_FINISHING, Worker
from giantleap.service.worker.watchdog import Watchdog

STRIDE_PX = 8
GENERATE = GenerateParams(
    prompt="a red sphere",
    negative_prompt="",
    scale=2,
    width_px=64,
    height_px=64,
    steps=3,
    guidance_scale=3.0,
    seed=1,
    num_images=1,
    output_format="png",
)
UPSCALE = UpscaleParams(
    scale=2,
    latent_space="tiny",
    batch_items=1,
    channels=4,
    latent_height=4,
    latent_width=4,
    output="image",
    output_format="png",
)


def make_claim(name: str, params: JobParams = GENERATE, body: bytes | None = None, **changes: Any) -> Claim:
    """A claim of a job called `name`; `changes` are fields of the job."""
    job = replace(Job(name, "tiny", priority=Priority.HIGH, created_at_s=0.0, params=params), **changes)
    return Claim(job=job, body=body, lane="tiny:high", message_id=f"{name}-0", delivery=1)


@dataclass
class FakeConsumer:
    """Hands out the given claims once and remembers what became of each, in the order of the calls."""

    waiting: list[Claim] = field(default_factory=list)
    cancel_after_polls: dict[str, int] = field(default_factory=dict)
    lost_ids: set[str] = field(default_factory=set)
    stale_ids: set[str] = field(default_factory=set)
    full_ids: set[str] = field(default_factory=set)
    on_empty: Callable[[], None] = lambda: None
    on_fail: Callable[[], None] = lambda: None

    finished: dict[str, list[tuple[ResultFile, bytes]]] = field(default_factory=dict)
    transferred: dict[str, Claim] = field(default_factory=dict)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, JobError] = field(default_factory=dict)
    canceled_ids: list[str] = field(default_factory=list)
    released_ids: list[str] = field(default_factory=list)
    announced: list[tuple[str, ...]] = field(default_factory=list)
    preferences: list[LoadedBundles | None] = field(default_factory=list)
    events: list[tuple[str, str, dict[str, object]]] = field(default_factory=list)
    previews: list[tuple[str, bytes]] = field(default_factory=list)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    batch_jobs: dict[str, int] = field(default_factory=dict)
    polls: int = 0

    def claim(self, max_jobs: int, block_s: float, loaded: LoadedBundles | None = None) -> list[Claim]:
        self.preferences.append(loaded)
        taken, self.waiting = self.waiting[:max_jobs], self.waiting[max_jobs:]
        if not taken:
            self.on_empty()
        return taken

    def claim_ahead(self, max_jobs: int, loaded: LoadedBundles | None = None) -> list[Claim]:
        taken = self.waiting[:max_jobs] if len(self.waiting) >= max_jobs else []
        self.waiting = self.waiting[len(taken) :]
        return taken

    def holds(self, claim: Claim) -> bool:
        return claim.job.id not in self.stale_ids

    def announce(self, device: Device) -> None:
        self.announced.append(device.loaded)

    def emit(self, claim: Claim, name: str, data: Mapping[str, object], image: bytes | None = None) -> None:
        self.events.append((claim.job.id, name, dict(data)))
        if image is not None:
            self.previews.append((claim.job.id, image))

    def find_canceled(self, claims: Sequence[Claim]) -> set[str]:
        self.polls += 1
        return {c.job.id for c in claims if self.polls > self.cancel_after_polls.get(c.job.id, 10**9)}

    def complete(
        self,
        claim: Claim,
        results: Sequence[tuple[ResultFile, bytes]],
        stages: Mapping[str, float],
        warnings: Sequence[str],
        batch_jobs: int = 1,
    ) -> JobState | None:
        self.batch_jobs[claim.job.id] = batch_jobs
        if claim.job.id in self.full_ids:
            raise StorageFull("no room")
        if claim.job.id in self.lost_ids:
            return None
        assert claim.job.id not in self.finished, "a job is finished once"
        self.finished[claim.job.id] = list(results)
        self.stages[claim.job.id] = dict(stages)
        self.warnings[claim.job.id] = list(warnings)
        return JobState.SUCCEEDED

    def transfer(
        self,
        claim: Claim,
        latents: bytes | None,
        stages: Mapping[str, float],
        warnings: Sequence[str],
        batch_jobs: int = 1,
    ) -> JobState | None:
        self.batch_jobs[claim.job.id] = batch_jobs
        if claim.job.id in self.full_ids:
            raise StorageFull("no room")
        if claim.job.id in self.lost_ids:
            return None
        assert claim.job.id not in self.transferred, "a job is transferred once"
        self.transferred[claim.job.id] = replace(
            claim, body=latents, base_latents=BaseLatents(dict(stages), tuple(warnings))
        )
        return JobState.QUEUED

    def fail(self, claim: Claim, error: JobError, stages: Mapping[str, float]) -> JobState | None:
        self.failed[claim.job.id] = error
        self.on_fail()
        if claim.job.id in self.lost_ids:
            return None
        return JobState.QUEUED if error.retryable and claim.delivery < 3 else JobState.FAILED

    def cancel(self, claim: Claim, stages: Mapping[str, float]) -> bool:
        self.canceled_ids.append(claim.job.id)
        return claim.job.id not in self.lost_ids

    def release(self, claims: Sequence[Claim]) -> None:
        self.released_ids += [claim.job.id for claim in claims]


@dataclass
class FakeRoute:
    """A route whose latents carry the seed of their item, so that a result shows which item it came from.

    A prompt makes it misbehave: `crash` raises whenever it is in a batch, `nan` decodes to nothing, `huge` never fits
    into memory. `fits` is how many items fit at once.
    """

    fits: int = 10**9
    on_step: Callable[[int], None] = lambda step: None
    batches: list[int] = field(default_factory=list)
    finished: list[tuple[Method, int, DecodeName | None]] = field(default_factory=list)
    steps_run: int = 0
    freed: int = 0
    name: str = "tiny"
    engine: str = "fake"
    window: int = 4
    role: WorkerRole = WorkerRole.ALL
    previewer: None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    vae: SimpleNamespace = field(default_factory=SimpleNamespace)
    generator: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            truncated_tokens=lambda text: max(0, len(text.split()) - 30), modes=PLAIN
        )
    )

    def clock(self) -> StageClock:
        return StageClock(self.device)

    def generate(
        self,
        items: Sequence[GenerationItem],
        method: Method,
        scale: float,
        *,
        on_step: StepCallback,
        is_canceled: CancelCheck,
        on_part: PartCallback,
        on_preview: PreviewCallback,
    ) -> list[Tensor | None]:
        self.batches.append(len(items))
        prompts = [item.prompt for item in items]
        if len(items) > self.fits or "huge" in prompts:
            raise torch.OutOfMemoryError("no memory left")
        if "crash" in prompts:
            raise RuntimeError("a bad prompt")
        gone: set[int] = set()
        for step in range(1, items[0].steps + 1):
            self.steps_run += 1
            self.on_step(step)
            on_step(step, items[0].steps)
            gone |= {index for index in range(len(items)) if is_canceled(index)}
            if len(gone) == len(items):
                break
        side = items[0].width_px // STRIDE_PX
        latents = [torch.full((4, side, side), float(i.seed if i.prompt != "nan" else "nan")) for i in items]
        return [None if index in gone else latent for index, latent in enumerate(latents)]

    def upscale_and_decode(
        self,
        latents: list[Tensor],
        scale: int,
        method: Method,
        decode: DecodeName | None,
        observer: StageObserver,
        refine: Sequence[GenerationItem] = (),
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        self.finished.append((method, scale, decode))
        images: list[Tensor | None] = []
        if scale > 1:
            with observer.measure("upscale"):
                latents = [latent.repeat_interleave(scale, 1).repeat_interleave(scale, 2) for latent in latents]
        if refine:
            with observer.measure("refine"):
                observer.report_part("refine", 0.5)
        if decode is not None:
            with observer.measure("decode"):
                images = [self._decode(latent) for latent in latents]
        return latents, images

    def _decode(self, latent: Tensor) -> Tensor | None:
        if not latent.isfinite().all():
            return None
        pixels = latent[:3].clamp(0, 255).to(torch.uint8)
        return pixels.repeat_interleave(STRIDE_PX, 1).repeat_interleave(STRIDE_PX, 2).permute(1, 2, 0).contiguous()

    def reset_peak_memory(self) -> None: ...

    def peak_memory(self) -> PeakMemory:
        return PeakMemory(1000, "process_rss")

    def free_cache(self) -> None:
        self.freed += 1


def open_worker(
    route: Any,
    consumer: Any,
    settings: Settings,
    *,
    name: str = "tiny",
    stop: threading.Event | None = None,
    bundle: Bundle | None = None,
    device: Device | None = None,
    tracing: Tracing | None = None,
    watchdog: Watchdog | None = None,
    filters: FilterChain | None = None,
    bundles: BundleCache | None = None,
    max_finishing: int = MAX_FINISHING,
    marker: ImageMarker | None = None,
) -> tuple[Worker, Metrics]:
    """A worker with one route under a name, on the grid of the pocket bundle.

    No job is too large for its device, which batches like a GPU.
    """
    bundle = bundle or read_bundle(POCKET_BUNDLE)
    metrics = Metrics(CollectorRegistry())
    if bundles is None:
        bundles = BundleCache({name: bundle}, lambda _: route, torch.device("cpu"), None, metrics)
        bundles.grids[name] = LatentGrid(bundle.latent_space.stride_px, bundles.load(name).window)
    worker = Worker(
        bundles=bundles,
        device=device or Device("cuda", 1, 0, {each: {} for each in (bundle.name, *bundles.bundles)}),
        consumer=consumer,
        metrics=metrics,
        tracing=tracing or Tracing(),
        watchdog=watchdog or Watchdog(3600.0),
        drain=Drain(stop or threading.Event(), settings.drain_grace_s),
        settings=settings,
        marker=marker or ImageMarker(),
        filters=filters or FilterChain(),
        max_finishing=max_finishing,
    )
    return worker, metrics
