"""Runs the items of one batch through a route and says for each what became of it; one item never fails another.

`giantleap.service.worker.loop` claims and plans, hands the claims of a batch in here and ends each job with what comes
out.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from enum import Enum

import safetensors.torch
import torch
from torch import Tensor

from giantleap.models.device import StageClock, StageName, is_out_of_memory
from giantleap.models.generator import GenerationItem, image_seed
from giantleap.models.image_formats import CONTENT_TYPES
from giantleap.models.images import to_image_bytes, to_signed
from giantleap.models.route import Route, finite_items
from giantleap.service.errors import EngineFault, GiantleapError, JobFailed
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.grid import count_items
from giantleap.service.jobs.images import Pixels, read_image
from giantleap.service.jobs.job import GenerateParams, JobError, JobParams, ResultFile, UpscaleParams
from giantleap.service.jobs.latents import LATENT_TENSOR
from giantleap.service.jobs.media_types import SAFETENSORS_TYPE
from giantleap.service.telemetry.tracing import BatchTrace
from giantleap.service.worker.watchdog import Watchdog

log = logging.getLogger(__name__)


class Drain:
    """Whether the worker shall stop, and whether the time that running work was given for that is over.

    Args:
        stop: Set by a signal.
        grace_s: How long running work may go on once the stop is seen.
    """

    def __init__(self, stop: threading.Event, grace_s: float) -> None:
        self._stop = stop
        self._grace_s = grace_s
        self._seen_at_s: float | None = None

    def is_asked(self) -> bool:
        """Whether to start nothing new."""
        if self._stop.is_set() and self._seen_at_s is None:
            self._seen_at_s = time.monotonic()
        return self._stop.is_set()

    def is_over(self) -> bool:
        """Whether to give up what runs."""
        return self.is_asked() and time.monotonic() >= (self._seen_at_s or 0.0) + self._grace_s


class Stop(Enum):
    """Why an item was not run to its end though nothing was wrong with it."""

    CANCELED = "canceled"
    RELEASED = "released"


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a job in a batch."""

    claim: Claim
    index: int


@dataclass(frozen=True, slots=True)
class Output:
    """What one item gave: a file, and what is known of it."""

    file: ResultFile
    content: bytes


@dataclass(frozen=True, slots=True)
class Latent:
    """What an item is where another worker finishes it: a raw latent, [channels, h, w], float32, on the CPU."""

    values: Tensor


Outcome = Output | Latent | JobError | Stop


def to_items(claims: Sequence[Claim]) -> list[Item]:
    """The images that the jobs of a batch ask for."""
    return [Item(claim, index) for claim in claims for index in range(count_items(claim.job.params))]


def to_job_error(error: Exception) -> JobError:
    """What the caller of a job may know of an exception; an unforeseen one only by its type, for its text may quote."""
    if is_out_of_memory(error):
        error = EngineFault("the device ran out of memory for this job alone; ask for fewer or smaller images")
    if isinstance(error, GiantleapError):
        return JobError(error.code, error.detail, error.retryable)
    return JobError("engine_error", f"the engine raised {type(error).__name__}; the worker's log has the traceback")


class BatchRun:
    """One batch on one route; `clock` holds its stage times afterwards.

    Args:
        route: The loaded bundle.
        consumer: Where progress goes and cancel flags come from.
        drain: When to give up.
        trace: Where each stage is written.
        watchdog: Where progress is marked: each stage and each denoising step.
        finishes: Whether drawn latents go on to images here; else they are what comes out.
    """

    def __init__(
        self,
        route: Route,
        consumer: JobConsumer,
        drain: Drain,
        trace: BatchTrace,
        watchdog: Watchdog | None = None,
        finishes: bool = True,
    ) -> None:
        self._finishes = finishes
        self._watchdog = watchdog
        self.clock: StageClock = route.clock()
        self._trace = trace
        self._route = route
        self._consumer = consumer
        self._drain = drain
        self._canceled_ids: set[str] = set()

    def run(self, items: Sequence[Item], slice_size: int) -> list[Outcome]:
        """What became of each item, in order; at most `slice_size` of them are on the device at once."""
        slices = [items[start : start + slice_size] for start in range(0, len(items), slice_size)]
        return [outcome for part in slices for outcome in self._run_isolated(part)]

    def _run_isolated(self, items: Sequence[Item]) -> list[Outcome]:
        """Run items together; if that fails, apart: in halves where memory ran out, else one by one."""
        try:
            return self._run_together(items)
        except torch.AcceleratorError:
            raise  # the device context is lost for this process: end it, the leases bring the jobs to another
        except Exception as error:
            log.warning("a batch of %d items failed", len(items), exc_info=error, extra=_batch_fields(items))
            failure, halve = to_job_error(error), is_out_of_memory(error)
        self._route.free_cache()  # after the handler: the exception's frames kept the batch's tensors alive
        if len(items) == 1:
            return [failure]
        size = (len(items) + 1) // 2 if halve else 1
        return self.run(items, size)

    def _run_together(self, items: Sequence[Item]) -> list[Outcome]:
        self._poll_canceled(items)
        outcomes: dict[int, Outcome] = {}
        latents: dict[int, Tensor] = {}
        live = [index for index, item in enumerate(items) if not self._is_stopped(item)]
        if live and _holds_images(items[0].claim.job.params):
            ended = self._enlarge_images([items[index] for index in live])
            outcomes = dict(zip(live, ended, strict=True))
        elif live:
            drawn = self._latents([items[index] for index in live])
            latents = {index: latent for index, latent in zip(live, drawn, strict=True) if latent is not None}
        if not self._finishes:
            outcomes = {index: Latent(latent.float().cpu()) for index, latent in latents.items()}
        elif latents:
            ended = self._enlarge([items[index] for index in latents], list(latents.values()))
            outcomes = dict(zip(latents, ended, strict=True))
        return [outcomes.get(index) or self._stop_of(item) for index, item in enumerate(items)]

    def _latents(self, items: Sequence[Item]) -> list[Tensor | None]:
        """The raw latent of each item: drawn, or read from the job's input or from what another worker drew."""
        if isinstance(items[0].claim.job.params, UpscaleParams) or items[0].claim.base_latents is not None:
            return [_read_latent(item) for item in items]

        def on_step(step: int, steps: int) -> None:
            self._mark("generate", items)
            self._emit(items, "step", {"step": step, "steps": steps})
            self._poll_canceled(items)

        with self.measure_items("generate", items):
            return self._route.generate(
                [_draw_item(item) for item in items],
                on_step=on_step,
                is_canceled=lambda index: self._is_stopped(items[index]),
            )

    def _enlarge(self, items: Sequence[Item], latents: Sequence[Tensor]) -> list[Outcome]:
        """From raw latents to files, by the stages of the batch's method."""
        params = items[0].claim.job.params
        decode = params.decode if _wants_images(params) else None
        observer = _BatchObserver(self, items)
        return self._encode(
            items,
            *self._route.upscale_and_decode(list(latents), params.scale, params.method, decode, observer),
        )

    def _enlarge_images(self, items: Sequence[Item]) -> list[Outcome]:
        """From images of clients to files."""
        params = items[0].claim.job.params
        decode = params.decode if _wants_images(params) else None
        observer = _BatchObserver(self, items)
        given = [_read_pixels(item) for item in items]
        return self._encode(items, *self._route.upscale_images(given, params.scale, params.method, decode, observer))

    def _encode(
        self, items: Sequence[Item], latents: Sequence[Tensor], images: Sequence[Tensor | None]
    ) -> list[Outcome]:
        with self.measure_items("encode", items):
            if _wants_images(items[0].claim.job.params):
                return [_image_output(item, image) for item, image in zip(items, images, strict=True)]
            return [_latent_output(item, latent) for item, latent in zip(items, latents, strict=True)]

    @contextmanager
    def measure_items(self, name: StageName, items: Sequence[Item]) -> Iterator[None]:
        """Time one stage of some items, trace it and report it to the clients."""
        self._mark(name, items)
        with self._trace.stage(name, [item.claim.job.id for item in items]), self.clock.measure(name):
            yield
        self._emit(items, "stage", {"stage": name, "seconds": round(self.clock.stages_s[name], 6)})

    def _touch(self) -> None:
        if self._watchdog is not None:
            self._watchdog.touch()

    def _mark(self, stage: str, items: Sequence[Item]) -> None:
        if self._watchdog is not None:
            self._watchdog.mark(stage, [item.claim.job.id for item in items])

    def _emit(self, items: Sequence[Item], name: str, data: dict[str, object]) -> None:
        for claim in {item.claim.job.id: item.claim for item in items}.values():
            self._consumer.emit(claim, name, data)
            self._touch()

    def _poll_canceled(self, items: Sequence[Item]) -> None:
        self._canceled_ids |= self._consumer.find_canceled(
            list({item.claim.job.id: item.claim for item in items}.values())
        )
        self._touch()

    def _is_stopped(self, item: Item) -> bool:
        return item.claim.job.id in self._canceled_ids or self._drain.is_over()

    def _stop_of(self, item: Item) -> Stop:
        return Stop.CANCELED if item.claim.job.id in self._canceled_ids else Stop.RELEASED


@dataclass(frozen=True, slots=True)
class _BatchObserver:
    """The `StageObserver` of the items that the route runs together."""

    run: BatchRun
    items: Sequence[Item]

    def measure(self, stage: StageName) -> AbstractContextManager[None]:
        return self.run.measure_items(stage, self.items)


def _draw_item(item: Item) -> GenerationItem:
    params = item.claim.job.params
    assert isinstance(params, GenerateParams)
    width_px, height_px = params.base_size_px
    drawn = GenerationItem(
        prompt=params.prompt,
        negative_prompt=params.negative_prompt,
        seed=image_seed(params.seed, item.index),
        width_px=width_px,
        height_px=height_px,
        steps=params.steps,
        guidance_scale=params.guidance_scale,
    )
    if params.strength is None:
        return drawn
    start = to_signed(torch.from_numpy(read_image(item.claim.body or b"", width_px * height_px)))
    return replace(drawn, init_image=start, strength=params.strength)


def _read_latent(item: Item) -> Tensor:
    # float16 where that is exact (`giantleap.service.jobs.latents.to_blob`); jobs of both kinds may share a batch.
    return safetensors.torch.load(item.claim.body or b"")[LATENT_TENSOR][item.index].float()


def to_latents_blob(latents: Sequence[Latent]) -> bytes:
    """The latents of a job in the form of an input blob, to hand over; `_read_latent` reads them to the bit."""
    return safetensors.torch.save({LATENT_TENSOR: torch.stack([latent.values for latent in latents]).contiguous()})


def _read_pixels(item: Item) -> Pixels:
    params = item.claim.job.params
    assert isinstance(params, UpscaleParams) and params.image_width_px and params.image_height_px
    return read_image(item.claim.body or b"", params.image_width_px * params.image_height_px)


def _holds_images(params: JobParams) -> bool:
    return isinstance(params, UpscaleParams) and params.image_width_px is not None


def _wants_images(params: JobParams) -> bool:
    return isinstance(params, GenerateParams) or params.output == "image"


def _image_output(item: Item, pixels: Tensor | None) -> Output | JobError:
    if pixels is None:
        return to_job_error(JobFailed("the decoded image has values that are not finite; try another seed or input"))
    params = item.claim.job.params
    content = to_image_bytes(pixels, params.output_format)
    height_px, width_px = pixels.shape[:2]
    seed = image_seed(params.seed, item.index) if isinstance(params, GenerateParams) else None
    return Output(ResultFile(CONTENT_TYPES[params.output_format], len(content), seed, width_px, height_px), content)


def _latent_output(item: Item, latent: Tensor) -> Output | JobError:
    params = item.claim.job.params
    if not finite_items(latent[None])[0]:
        return to_job_error(JobFailed("the enlarged latent has values that are not finite; check the input"))
    shaped = latent[:, None] if isinstance(params, UpscaleParams) and params.one_frame else latent
    content = safetensors.torch.save({LATENT_TENSOR: shaped.float().cpu().contiguous()})
    return Output(ResultFile(SAFETENSORS_TYPE, len(content)), content)


def _batch_fields(items: Sequence[Item]) -> dict[str, object]:
    return {"fields": {"job_ids": sorted({item.claim.job.id for item in items})}}
