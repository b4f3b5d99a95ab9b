"""Runs rows with the service's batch code, without a queue: plan, group, run, write, one entry per row."""

import hashlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set

from giantleap.batch.manifest import Entry
from giantleap.batch.rows import BatchOptions, Row, check_options, plan_row
from giantleap.batch.store import BatchError, Store
from giantleap.models.bundle.bundle import Bundle
from giantleap.models.filters.chain import FilterChain
from giantleap.models.provenance.marker import ImageMarker
from giantleap.models.route import Route
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobs.grid import LatentGrid, output_latent_px
from giantleap.service.jobs.job import Job, JobError, Priority
from giantleap.service.jobs.marking import open_manifest_signer
from giantleap.service.settings import Settings
from giantleap.service.telemetry.tracing import BatchTrace
from giantleap.service.worker.batch_runner import BatchRun
from giantleap.service.worker.batching import plan_batch
from giantleap.service.worker.drain import Drain
from giantleap.service.worker.items import (
    Item,
    Outcome,
    Output,
    RawOutput,
    encode,
    to_items,
    to_job_error,
    to_latent_output,
)
from giantleap.service.worker.outputs.filters import open_filters
from giantleap.service.worker.watchdog import Watchdog


class _NoReports:
    """Reports of a batch job, which cannot be followed or canceled (`giantleap.service.worker.progress.Reports`)."""

    def emit(self, claim: Claim, name: str, data: Mapping[str, object], image: bytes | None = None) -> None:
        """Nothing."""

    def find_canceled(self, claims: Sequence[Claim]) -> Set[str]:
        """None."""
        return frozenset()


class RowEngine:
    """A loaded bundle that turns rows into files.

    Args:
        route: The loaded bundle.
        bundle: Its descriptor.
        settings: Limits, filters and marks.
        options: Of the job.
        store: Where outputs go.
        stop: Once it is set, a running batch has the settings' grace period, and no other starts.

    Raises:
        BatchError: An option fits no row.
        BadConfiguration: A filter or a certificate of the settings cannot be used.
    """

    def __init__(
        self,
        route: Route,
        bundle: Bundle,
        settings: Settings,
        options: BatchOptions,
        store: Store,
        stop: threading.Event,
    ) -> None:
        check_options(options, bundle)
        self._route, self._bundle, self._settings, self._options, self._store = route, bundle, settings, options, store
        self._grid = LatentGrid(bundle.latent_space.stride_px, route.window)
        self._stop = stop
        self._drain = Drain(stop, settings.drain_grace_s)
        self._marker = ImageMarker(open_manifest_signer(settings), settings.watermark)
        self._filters: FilterChain = open_filters(settings.filters, lambda name, outcome: None)

    def run(
        self, rows: Sequence[Row], done: Collection[str] = (), may_write: Callable[[], bool] = lambda: True
    ) -> Iterator[list[Entry]]:
        """The entries of all rows whose keys are not `done`, batch by batch.

        Rows are sorted by size and grouped, those that are done included: a row runs with the same others whatever was
        done before, and so to the same bits. A batch that is done wholly is left out. Ends early after a stop, or where
        `may_write` says so after a batch.
        """
        claims, refused = self._plan(rows)
        if fresh := [entry for entry in refused if entry.key not in done]:
            yield fresh
        claims.sort(key=lambda claim: (-output_latent_px(claim.job.params, self._grid), claim.job.id))
        grids, budget_px = {self._bundle.name: self._grid}, self._settings.batch_budget_latent_px
        for batch in plan_batch(claims, grids, self._options.batch_size, budget_px):
            if all(claim.job.id in done for claim in batch):
                continue
            if self._stop.is_set():
                return
            started_s = time.monotonic()
            outcomes = self._run_batch(batch)
            seconds = round((time.monotonic() - started_s) / len(batch), 4)
            if not may_write():
                return
            pairs = [pair for pair in zip(batch, outcomes, strict=True) if pair[0].job.id not in done]
            if entries := [entry for pair in pairs if (entry := self._write(*pair, seconds)) is not None]:
                yield entries

    def _plan(self, rows: Sequence[Row]) -> tuple[list[Claim], list[Entry]]:
        """Convert rows to jobs; rows that are not valid become entries with an error."""
        claims: dict[str, Claim] = {}
        refused = []
        for number, row in enumerate(rows):
            try:
                if row.key in claims:
                    raise BatchError("another row has the same key; make the keys unique")
                params, body = plan_row(row, self._options, self._bundle, self._settings)
            except BatchError as error:
                key = f"{row.key} (row {number})" if row.key in claims else row.key
                refused.append(Entry(key, error=str(error)))
            else:
                job = Job(row.key, self._bundle.name, priority=Priority.LOW, created_at_s=0.0, params=params)
                claims[row.key] = Claim(job, body, lane="", message_id=row.key, delivery=1)
        return list(claims.values()), refused

    def _run_batch(self, batch: Sequence[Claim]) -> list[Outcome]:
        trace, watchdog = BatchTrace(None, [], {}), Watchdog(self._settings.step_timeout_s)
        to_latents = self._options.out == "latents"
        run = BatchRun(self._route, _NoReports(), self._drain, trace, watchdog, self._filters, to_latents)
        items = to_items(batch)
        return [self._encode(*pair) for pair in zip(items, run.run(items, len(batch)), strict=True)]

    def _encode(self, item: Item, result: Outcome | RawOutput) -> Outcome:
        if not isinstance(result, RawOutput):
            return result
        try:
            if self._options.out == "latents":
                return to_latent_output(item, result.values)
            return encode(item, result, self._marker)
        except (OSError, RuntimeError, ValueError) as error:
            return to_job_error(error)

    def _write(self, claim: Claim, outcome: Outcome, seconds: float) -> Entry | None:
        """Write the output of a row; None if it was stopped."""
        key, seed = claim.job.id, claim.job.params.seed
        if isinstance(outcome, JobError):
            return Entry(key, seed=seed, seconds=seconds, error=outcome.detail)
        if not isinstance(outcome, Output):
            return None
        name = f"{key}{self._options.suffix}"
        self._store.write(name, outcome.content)
        return Entry(key, name, seed, hashlib.sha256(outcome.content).hexdigest(), seconds)
