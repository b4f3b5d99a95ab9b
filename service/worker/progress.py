"""What a running batch tells others and hears from them: stage times, progress events, and whether to go on.

`giantleap.service.worker.batch_runner` runs the batch inside a `BatchObserver`, which looks at the cancel flags after
each stage and, at most every half second, after each part of one: a tile, a strip, a layer.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Protocol

from giantleap.models.device import StageClock, StageName
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.telemetry.tracing import BatchTrace
from giantleap.service.worker.drain import Drain
from giantleap.service.worker.items import Item, Stop
from giantleap.service.worker.watchdog import Watchdog

_POLL_S = 0.5
_PROGRESS_S = 1.0


class Reports(Protocol):
    """Publishes the progress of jobs and knows which of them are canceled: the queue's `JobConsumer`."""

    def emit(self, claim: Claim, name: str, data: Mapping[str, object], image: bytes | None = None) -> None:
        """Add a progress event, of a preview with its image."""

    def find_canceled(self, claims: Sequence[Claim]) -> Set[str]:
        """Ids of the jobs that shall not run on."""


class BatchStopped(Exception):
    """Raised inside a stage when no item of the batch is wanted any more."""


class StopFlags:
    """Which jobs shall not run on: those that were canceled or are overdue, and all once the drain's grace is over."""

    def __init__(self, consumer: Reports, drain: Drain) -> None:
        self._consumer = consumer
        self._drain = drain
        self._canceled_ids: set[str] = set()

    def poll(self, claims: Sequence[Claim]) -> None:
        """Read the flags of these jobs: one round trip."""
        self._canceled_ids |= self._consumer.find_canceled(claims)

    def is_stopped(self, item: Item) -> bool:
        """Whether an item shall not run on."""
        return item.claim.job.id in self._canceled_ids or self._drain.is_expired()

    def stop_of(self, item: Item) -> Stop:
        """How a stopped item ends."""
        return Stop.CANCELED if item.claim.job.id in self._canceled_ids else Stop.RELEASED


class BatchObserver:
    """The `StageObserver` of items that run together: times and traces stages, reports progress, stops the batch.

    Args:
        items: Items that run together.
        stage_clock: Adds up the seconds of each stage.
        trace: Where each stage is recorded.
        consumer: Where events go.
        flags: Which items shall not run on.
        watchdog: Where progress is recorded.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        items: Sequence[Item],
        stage_clock: StageClock,
        trace: BatchTrace,
        consumer: Reports,
        flags: StopFlags,
        watchdog: Watchdog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._items = items
        self._claims = list({item.claim.job.id: item.claim for item in items}.values())
        self._stage_clock = stage_clock
        self._trace = trace
        self._consumer = consumer
        self._flags = flags
        self._watchdog = watchdog
        self._clock = clock
        self._started_s = self._polled_s = self._emitted_s = clock()

    @property
    def stages_s(self) -> dict[str, float]:
        """Seconds of each stage of the batch so far."""
        return self._stage_clock.stages_s

    @contextmanager
    def measure(self, stage: StageName) -> Iterator[None]:
        """Time one stage, trace it and report it.

        Raises:
            BatchStopped: At its end no item shall run on, unless it was the last stage.
        """
        self._record(stage)
        self._started_s = self._emitted_s = self._clock()
        job_ids = [item.claim.job.id for item in self._items]
        with self._trace.stage(stage, job_ids), self._stage_clock.measure(stage):
            yield
        self._emit("stage", {"stage": stage, "seconds": round(self._stage_clock.stages_s[stage], 6)})
        if stage != "encode":  # the results are there: the script that writes them looks at the flag itself
            self.poll()
            self._stop_if_unwanted()

    def report_step(self, step: int, steps: int) -> None:
        """Report one denoising step, and read the flags."""
        self._record("generate")
        self._emit("step", {"step": step, "steps": steps})
        self.poll()

    def report_part(self, stage: StageName, fraction: float | None) -> None:
        """Report a part of a stage that is done, each second, and read the flags, each half second.

        Raises:
            BatchStopped: No item shall run on.
        """
        self._record(stage)
        now_s = self._clock()
        if now_s - self._emitted_s >= _PROGRESS_S:
            self._emitted_s = now_s
            known = {} if fraction is None else {"fraction": round(fraction, 4)}
            self._emit("progress", {"stage": stage, "seconds": round(now_s - self._started_s, 3), **known})
        if now_s - self._polled_s >= _POLL_S:
            self.poll()
            self._stop_if_unwanted()

    def poll(self) -> None:
        """Read the flags of all jobs of the batch."""
        self._flags.poll(self._claims)
        self._watchdog.keepalive()
        self._polled_s = self._clock()

    def _stop_if_unwanted(self) -> None:
        if all(map(self._flags.is_stopped, self._items)):
            raise BatchStopped

    def _record(self, stage: str) -> None:
        self._watchdog.progress(stage, [item.claim.job.id for item in self._items])

    def _emit(self, name: str, data: dict[str, object]) -> None:
        for claim in self._claims:
            self._consumer.emit(claim, name, data)
            self._watchdog.keepalive()
