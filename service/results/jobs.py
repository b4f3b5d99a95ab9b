"""What a worker stores of its jobs: results, latents for another worker, and the inputs that it reads."""

import dataclasses
import logging
import time
from collections.abc import Sequence

from giantleap.service.errors import StoreUnavailable
from giantleap.service.jobs.job import ResultFile
from giantleap.service.results.keys import new_keys
from giantleap.service.results.store import INPUT_GRACE_S, INPUT_TYPE, ResultStore, open_store
from giantleap.service.settings import Settings

_LOG = logging.getLogger(__name__)


class JobFiles:
    """The files of jobs in a store. Each upload has keys of its own; its methods may be called from several threads.

    Args:
        store: Where they lie.
        settings: The prefix of keys and the time to live.
    """

    def __init__(self, store: ResultStore, settings: Settings) -> None:
        self._store = store
        self.large_input_bytes = store.large_input_bytes
        self._prefix = settings.key_prefix
        self._ttl_s = settings.job_ttl_s

    def put_results(self, job_id: str, results: Sequence[tuple[ResultFile, bytes]]) -> list[ResultFile]:
        """Stores results; returns their records, which hold the keys. On return every byte is safe.

        Raises:
            StoreUnavailable: The store does not take one; then none stays.
        """
        keys = new_keys(self._prefix, job_id, "result", len(results), self._ttl_s, time.time())
        try:
            for key, (file, content) in zip(keys, results, strict=True):
                self._store.put(key, content, file.content_type)
        except StoreUnavailable:
            self.discard(keys)
            raise
        return [dataclasses.replace(file, key=key) for key, (file, _) in zip(keys, results, strict=True)]

    def put_input(self, job_id: str, content: bytes) -> str:
        """Stores what the next worker takes as the input of a job; returns its key.

        Raises:
            StoreUnavailable: The store does not take it.
        """
        [key] = new_keys(self._prefix, job_id, "input", 1, self._ttl_s + INPUT_GRACE_S, time.time())
        self._store.put(key, content, INPUT_TYPE)
        return key

    def get_input(self, key: str) -> bytes | None:
        """An input; None if it is gone.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        return self._store.get(key)

    def discard(self, keys: Sequence[str]) -> None:
        """Deletes what no record names. What cannot be deleted now is swept when its time has passed."""
        try:
            self._store.delete(keys)
        except StoreUnavailable as error:
            _LOG.warning("%d files are left to the sweeper: %s", len(keys), error.detail)


def open_files(settings: Settings) -> JobFiles | None:
    """The files of the store that the settings name; None: they lie in Redis.

    Raises:
        BadConfiguration: As `open_store`.
    """
    store = open_store(settings)
    return None if store is None else JobFiles(store, settings)
