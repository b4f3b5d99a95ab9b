"""The loop of one process of a batch job: claim a shard, run its rows, record them in its manifest, repeat."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, Final

from giantleap.batch.claims import Claim, Claims, State
from giantleap.batch.engine import RowEngine
from giantleap.batch.inputs import Source
from giantleap.batch.manifest import Entry, Manifest, read_entries
from giantleap.batch.rows import BatchOptions
from giantleap.batch.store import BatchError, Store

JOB: Final = "_batch/job.json"
_ENDED: Final = (State.DONE, State.FAILED)


class Runner:
    """One process of a job. Others, on any machine, may run the same job at the same time.

    Args:
        source: The input.
        store: The output.
        engine: Draws rows.
        options: Of the job.
        lease_s: After so long without a sign of life the shard of another process is free.
        stop: Set by a signal.
    """

    def __init__(
        self,
        source: Source,
        store: Store,
        engine: RowEngine,
        options: BatchOptions,
        lease_s: float,
        stop: threading.Event,
    ) -> None:
        self._source, self._store, self._engine, self._options = source, store, engine, options
        self._stop = stop
        self._poll_s = min(1.0, lease_s / 4)
        self._shards = {shard.name: shard for shard in source.list_shards(options.shard_rows)}
        self._claims = Claims(store, lease_s)
        self._done = _done_keys(store)

    def count_rows(self) -> int | None:
        """Rows of the input that are not done; None if that takes reading it."""
        sizes = [len(shard.keys) if shard.rows is None else len(shard.rows) for shard in self._shards.values()]
        return None if self._source.has_tars else max(0, sum(sizes) - len(self._done))

    def run(self) -> Iterator[list[Entry]]:
        """Yield the results of the rows that this process runs, then wait until the shards of others are done."""
        while not self._stop.is_set():
            claim = self._claims.take(list(self._shards))
            if claim is not None:
                yield from self._run_shard(claim)
            elif all(state in _ENDED for state in self._claims.states(self._shards).values()):
                return
            else:
                self._stop.wait(self._poll_s)

    def has_failed(self) -> bool:
        """Whether a row of the job failed, here or elsewhere."""
        return State.FAILED in self._claims.states(self._shards).values()

    def _run_shard(self, claim: Claim) -> Iterator[list[Entry]]:
        is_held, state, failed = partial(self._claims.is_held, claim), State.FREE, False
        done = self._done | _done_keys(self._store, f"{claim.shard}.")
        manifest, rows = Manifest(self._store, claim.name), self._source.read(self._shards[claim.shard])
        try:
            with self._claims.renewing(claim):
                while window := list(islice(rows, self._options.shard_rows)):
                    for entries in self._engine.run(window, done, is_held):
                        manifest.add(entries)
                        failed |= any(entry.error is not None for entry in entries)
                        yield entries
                    if self._stop.is_set() or not is_held():
                        return
            state = State.FAILED if failed else State.DONE
        finally:
            self._claims.end(claim, state)


def open_job(store: Store, job: dict[str, Any]) -> None:
    """Record the options in the output.

    Raises:
        BatchError: It holds outputs of other options.
    """
    if (found := store.read(JOB)) is None:
        store.write(JOB, json.dumps(job, indent=1).encode())
        found = store.read(JOB)
    before = json.loads(found or b"{}")
    if others := [name for name in job if before.get(name) != job[name]]:
        values = ", ".join(f"{name} {before.get(name)}" for name in others)
        raise BatchError(f"{store.url}: holds the outputs of a job with {values}; give the same, or another output")


def _done_keys(store: Store, prefix: str = "") -> set[str]:
    return {key for key, entry in read_entries(store, prefix).items() if entry.error is None}
