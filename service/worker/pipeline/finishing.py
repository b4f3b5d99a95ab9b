"""Encodes, stores and ends batches on a few threads, while the device goes on with the next ones.

`giantleap.service.worker.batch_runner` leaves pixels and latents on the CPU. Nothing here touches a model or a device.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass

from giantleap.models.provenance.marker import ImageMarker
from giantleap.service.errors import NotReady
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobs.grid import count_items
from giantleap.service.jobs.job import JobError
from giantleap.service.telemetry.logs import log_fields
from giantleap.service.telemetry.metrics import Metrics
from giantleap.service.telemetry.tracing import BatchTrace, trace_id_of
from giantleap.service.worker.items import Item, Outcome, RawOutput, encode, to_job_error
from giantleap.service.worker.progress import BatchObserver
from giantleap.service.worker.settlement import BatchSummary, JobSettler
from giantleap.service.worker.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RanBatch:
    """A batch that has left the device.

    Args:
        claims: Its jobs.
        items: Their images.
        results: The result of each item; encoding replaces raw outputs, so that their memory is free.
        warnings: For the client of each job.
        load_s: Seconds that its bundle took to load for it.
        observer: Sees the encoding; it has the seconds of each stage.
        trace: Of the run; it ends with the encoding.
        engine: What ran the network.
    """

    claims: Sequence[Claim]
    items: Sequence[Item]
    results: list[Outcome | RawOutput]
    warnings: Sequence[Sequence[str]]
    load_s: float
    observer: BatchObserver
    trace: BatchTrace
    engine: str


class BatchFinisher:
    """Ends batches in the background; one thread calls its methods.

    Args:
        settler: Ends each job.
        metrics: Where work is counted.
        watchdog: What ends the process if encoding hangs.
        marker: Encodes the images.
        max_batches: Batches that may wait or be encoded while the device goes on; with 0 each ends before the next.
        pool: Its threads.
    """

    def __init__(
        self,
        settler: JobSettler,
        metrics: Metrics,
        watchdog: Watchdog,
        marker: ImageMarker,
        max_batches: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._settler = settler
        self._metrics = metrics
        self._watchdog = watchdog
        self._marker = marker
        self._max_batches = max_batches
        self._pool = pool
        self._running: set[Future[None]] = set()

    def submit(self, batch: RanBatch) -> None:
        """Encode and end a batch. Effects: waits while more than `max_batches` have not ended; raises as `wait`."""
        if self._max_batches == 0:
            self._finish(batch)
            return
        self._running.add(self._pool.submit(self._finish, batch))
        self._wait_for(self._max_batches)

    def check(self) -> None:
        """Notice what went wrong meanwhile; raises as `wait`."""
        self._wait_for(len(self._running))

    def wait(self) -> None:
        """Wait until every batch has ended.

        Raises:
            Exception: What no end of a job can hold, of any batch since the last call: the process is to end.
        """
        self._wait_for(0)

    def _wait_for(self, max_running: int) -> None:
        ended = {each for each in self._running if each.done()}
        while len(self._running - ended) > max_running:
            ended |= wait(self._running - ended, return_when=FIRST_COMPLETED).done
        self._running -= ended
        for each in ended:
            each.result()

    def _finish(self, batch: RanBatch) -> None:
        outcomes = self._encode(batch)
        stages_s, job = batch.observer.stages_s, batch.claims[0].job
        self._metrics.observe_stages(job.bundle, job.params.method, job.params.scale, batch.engine, stages_s)
        load_s = {"load": batch.load_s} if batch.load_s else {}
        summary = BatchSummary(load_s | stages_s, len(batch.items), len(batch.claims))
        try:
            for (claim, ended), warnings in zip(_by_claim(batch.claims, outcomes), batch.warnings, strict=True):
                self._settler.settle(claim, ended, summary, warnings)
        except NotReady as error:
            self._settler.drop(batch.claims, error)

    def _encode(self, batch: RanBatch) -> Sequence[Outcome]:
        """The outcome of each item. Effects: ends the trace."""
        with log_fields(**batch_fields(batch.claims)):
            try:
                outcomes = self._encode_items(batch)
                for claim, ended in _by_claim(batch.claims, outcomes):
                    code = next((each.code for each in ended if isinstance(each, JobError)), None)
                    batch.trace.end(claim.job.id, code)
            finally:
                batch.trace.close()
                self._watchdog.pause()
        return outcomes

    def _encode_items(self, batch: RanBatch) -> Sequence[Outcome]:
        any_raw = any(isinstance(each, RawOutput) for each in batch.results)
        with batch.observer.measure("encode") if any_raw else nullcontext():
            for index, each in enumerate(batch.results):
                if isinstance(each, RawOutput):
                    batch.results[index] = self._encode_item(batch.items[index], each)
        return [each for each in batch.results if not isinstance(each, RawOutput)]

    def _encode_item(self, item: Item, raw: RawOutput) -> Outcome:
        try:
            return encode(item, raw, self._marker)
        except Exception as error:
            log.warning("an image of job %s was not encoded", item.claim.job.id, exc_info=error)
            return to_job_error(error)


def batch_fields(claims: Sequence[Claim]) -> dict[str, list[str]]:
    """What every log record of a batch has."""
    traces = {trace_id for claim in claims if (trace_id := trace_id_of(claim.job.traceparent))}
    return {"job_ids": [claim.job.id for claim in claims], "trace_ids": sorted(traces)}


def _by_claim(claims: Sequence[Claim], outcomes: Sequence[Outcome]) -> Iterator[tuple[Claim, Sequence[Outcome]]]:
    """Each job with the outcomes of its own images, which are in the order of `to_items`."""
    start = 0
    for claim in claims:
        end = start + count_items(claim.job.params)
        yield claim, outcomes[start:end]
        start = end
