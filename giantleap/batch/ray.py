"""Bulk work on a Ray cluster: a class for `ray.data.Dataset.map_batches`, which needs no package of Ray itself.

`examples/ray_batch.py` uses it. Outputs and manifests are those of `giantleap batch`; Ray takes the place of claims.
"""

import secrets
import threading
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from giantleap.batch.containers import to_row
from giantleap.batch.engine import RowEngine
from giantleap.batch.manifest import Entry, Manifest, read_entries
from giantleap.batch.rows import BatchOptions, Row
from giantleap.batch.runner import open_job
from giantleap.batch.store import BatchError, Store
from giantleap.service.jobs.bundles import read_in_modes
from giantleap.service.settings import read_settings
from giantleap.service.worker.engines import open_local_route

Columns = dict[str, NDArray[Any]]
_MANIFEST_ROWS: Final = 1000


class RowActor:
    """Runs batches of rows; the bundle is loaded once, when the actor starts.

    A batch has a column `key`, and `prompt`, `latent` or `image` (files as bytes), and may have those of
    `giantleap.batch.rows.PROMPT_FIELDS`. The answer has a row for each with the fields of a manifest's entry. Rows that
    a manifest of the output names as done when the actor starts are not run again.

    Args:
        output: Folder or s3:// URL that every node reaches.
        options: What the rows have in common; None for the defaults.
        settings: Of the service, by name: `bundle`, `device` and so on.

    Raises:
        BatchError: As `RowEngine`, or the output holds those of other options.
    """

    def __init__(self, output: str, options: BatchOptions | None = None, **settings: object) -> None:
        options, read, self._store = options or BatchOptions(), read_settings(**settings), Store(output)
        bundle = read_in_modes(read.bundle[0], read.modes)
        open_job(self._store, options.to_job(bundle))
        route = open_local_route(bundle, read)
        self._engine = RowEngine(route, bundle, read, options, self._store, threading.Event())
        self._done = {key: entry for key, entry in read_entries(self._store).items() if entry.error is None}
        self._manifest = self._open_manifest()

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> Columns:
        """The entries of a batch, in the order of their keys."""
        rows = [_read_row(batch, index) for index in range(len(next(iter(batch.values()))))]
        new = [entry for entries in self._engine.run(rows, self._done) for entry in entries]
        if len(self._manifest.entries) >= _MANIFEST_ROWS:
            self._manifest = self._open_manifest()
        if new:
            self._manifest.add(new)
        done = [self._done[row.key] for row in rows if row.key in self._done]
        entries = sorted([*done, *new], key=lambda entry: entry.key)
        return {field.name: _to_column(entries, field.name) for field in fields(Entry)}

    def _open_manifest(self) -> Manifest:
        return Manifest(self._store, f"ray-{secrets.token_hex(8)}")


def _read_row(batch: Mapping[str, NDArray[Any]], index: int) -> Row:
    if "key" not in batch:
        raise BatchError("the batch has no column key; give each row a unique one, such as the name of its file")
    values = {name: _to_value(column[index]) for name, column in batch.items()}
    return to_row(str(values["key"]), values)


def _to_value(value: Any) -> Any:
    """A value of an array as Python has it; NaN, which stands for a missing number, as None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if value != value else value


def _to_column(entries: list[Entry], name: str) -> NDArray[Any]:
    return np.array([getattr(entry, name) for entry in entries], dtype=object)
