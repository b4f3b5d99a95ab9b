"""Runs the items of one batch through a route on the device; one item never fails another.

Its output stays on the CPU: `giantleap.service.worker.pipeline.finishing` encodes it.
"""

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from giantleap.models.device import StageClock, is_out_of_memory
from giantleap.models.filters.chain import FilterChain
from giantleap.models.generation.items import GenerationItem
from giantleap.models.route import Route
from giantleap.service.jobs.job import UpscaleParams
from giantleap.service.telemetry.tracing import BatchTrace
from giantleap.service.worker.drain import Drain
from giantleap.service.worker.items import (
    Item,
    Latent,
    Outcome,
    RawOutput,
    check_image,
    has_input_image,
    read_latent,
    read_pixels,
    to_generation_item,
    to_job_error,
    wants_image,
)
from giantleap.service.worker.outputs.previews import PreviewSender
from giantleap.service.worker.progress import BatchObserver, BatchStopped, Reports, StopFlags
from giantleap.service.worker.watchdog import Watchdog

log = logging.getLogger(__name__)


class BatchRun:
    """One batch on one route; `clock` holds its stage times afterwards.

    Args:
        route: The loaded bundle.
        consumer: Where progress goes and cancel flags come from.
        drain: When to give up.
        trace: Where each stage is recorded.
        watchdog: Where progress is recorded.
        filters: See the images.
        to_latents: Results are latents, also those of jobs that ask for images.
    """

    def __init__(
        self,
        route: Route,
        consumer: Reports,
        drain: Drain,
        trace: BatchTrace,
        watchdog: Watchdog,
        filters: FilterChain,
        to_latents: bool = False,
    ) -> None:
        self.clock: StageClock = route.clock()
        self._route = route
        self._consumer = consumer
        self._flags = StopFlags(consumer, drain)
        self._trace = trace
        self._watchdog = watchdog
        self._filters = filters
        self._to_latents = to_latents

    def run(self, items: Sequence[Item], slice_size: int) -> list[Outcome | RawOutput]:
        """The outcome of each item, in order; at most `slice_size` of them are on the device at once."""
        slices = [items[start : start + slice_size] for start in range(0, len(items), slice_size)]
        return [outcome for part in slices for outcome in self._run_isolated(part)]

    def observe_encoding(self, items: Sequence[Item]) -> BatchObserver:
        """What sees the items encoded, in another thread: its clock must not wait for the device."""
        return self._observe(items, StageClock(torch.device("cpu"), self.clock.stages_s))

    def _run_isolated(self, items: Sequence[Item]) -> list[Outcome | RawOutput]:
        """Run items together; after a failure in halves if memory ran out, else one by one."""
        try:
            return self._run_together(items)
        except BatchStopped:
            return [self._flags.stop_of(item) for item in items]
        except torch.AcceleratorError:
            raise  # this process has lost its device context: end it, the leases bring the jobs to another worker
        except Exception as error:
            fields = {"job_ids": sorted({item.claim.job.id for item in items})}
            log.warning("a batch of %d items failed", len(items), exc_info=error, extra={"fields": fields})
            failure, halve = to_job_error(error), is_out_of_memory(error)
        self._route.free_cache()  # after the handler: the exception's frames kept the batch's tensors alive
        if len(items) == 1:
            return [failure]
        return self.run(items, (len(items) + 1) // 2 if halve else 1)

    def _run_together(self, items: Sequence[Item]) -> list[Outcome | RawOutput]:
        self._observe(items).poll()
        running = [index for index, item in enumerate(items) if not self._flags.is_stopped(item)]
        outcomes: dict[int, Outcome | RawOutput] = {}
        if running and has_input_image(items[0].claim.job.params):
            outcomes = dict(zip(running, self._upscale_images([items[index] for index in running]), strict=True))
        elif running:
            base_latents = self._base_latents([items[index] for index in running])
            latents = {index: latent for index, latent in zip(running, base_latents, strict=True) if latent is not None}
            if latents:
                ended = self._decode([items[index] for index in latents], list(latents.values()))
                outcomes = dict(zip(latents, ended, strict=True))
        return [outcomes.get(index) or self._flags.stop_of(item) for index, item in enumerate(items)]

    def _base_latents(self, items: Sequence[Item]) -> list[Tensor | None]:
        """The base latent of each item: generated, or read from the job's input or from another worker's output."""
        params = items[0].claim.job.params
        if isinstance(params, UpscaleParams) or items[0].claim.base_latents is not None:
            return [read_latent(item) for item in items]
        observer = self._observe(items)
        with observer.measure("generate"):
            return self._route.generate(
                [to_generation_item(item) for item in items],
                params.method,
                params.scale,
                on_step=observer.report_step,
                is_canceled=lambda index: self._flags.is_stopped(items[index]),
                on_part=partial(observer.report_part, "generate"),
                on_preview=PreviewSender(items, self._route.previewer, self._filters, self._consumer).send,
            )

    def _decode(self, items: Sequence[Item], latents: list[Tensor]) -> Sequence[Outcome | RawOutput]:
        """From base latents to pixels by the stages of the batch's method, or to latents for a worker that decodes."""
        if not self._route.role.loads_decoder:
            return [Latent(latent.float().cpu()) for latent in latents]
        params, observer = items[0].claim.job.params, self._observe(items)
        decode = params.decode if self._wants_images(items) else None
        refine = _refine_items(items)
        upscaled, images = self._route.upscale_and_decode(
            latents, params.scale, params.method, decode, observer, refine
        )
        return self._take(items, upscaled, images)

    def _upscale_images(self, items: Sequence[Item]) -> Sequence[Outcome | RawOutput]:
        """From clients' images to pixels."""
        params, observer = items[0].claim.job.params, self._observe(items)
        decode = params.decode if self._wants_images(items) else None
        pixels = [read_pixels(item) for item in items]
        refine = _refine_items(items)
        upscaled, images = self._route.upscale_images(pixels, params.scale, params.method, decode, observer, refine)
        return self._take(items, upscaled, images)

    def _take(
        self, items: Sequence[Item], latents: Sequence[Tensor], images: Sequence[Tensor | None]
    ) -> Sequence[Outcome | RawOutput]:
        """What is to be encoded, off the device. Filters, which may use it, see the images here: a part of `encode`."""
        self._watchdog.progress("encode", [item.claim.job.id for item in items])
        with self.clock.measure("encode"):
            if self._wants_images(items):
                return [check_image(item, image, self._filters) for item, image in zip(items, images, strict=True)]
            return [RawOutput(latent.cpu()) for latent in latents]

    def _wants_images(self, items: Sequence[Item]) -> bool:
        return not self._to_latents and wants_image(items[0].claim.job.params)

    def _observe(self, items: Sequence[Item], clock: StageClock | None = None) -> BatchObserver:
        return BatchObserver(items, clock or self.clock, self._trace, self._consumer, self._flags, self._watchdog)


def _refine_items(items: Sequence[Item]) -> list[GenerationItem]:
    """What the refine pass of a batch takes; empty if its jobs have none."""
    return [] if items[0].claim.job.params.refine is None else [to_generation_item(item) for item in items]
