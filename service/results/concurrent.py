"""A store for asyncio: each call runs in a thread of the store's own, so that a slow store holds up nothing else."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from giantleap.service.errors import StoreUnavailable
from giantleap.service.results.store import ResultStore

_THREADS = 16
_CALL_S = 5.0
_TRANSFER_BYTES_PER_S = 10e6
_RETRY_S = 5

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


def require_files(files: "AsyncResultStore | None") -> "AsyncResultStore":
    """The store in which a file lies that a record names.

    Raises:
        StoreUnavailable: This process has none.
    """
    if files is None:
        raise StoreUnavailable(
            "the file lies in a result store that this process does not know; GIANTLEAP_RESULT_STORE must be as it "
            "was when the job ended"
        )
    return files


class AsyncResultStore:
    """A store whose calls may be awaited. Safe to share between all tasks of one event loop.

    Args:
        store: What it calls.
        max_bytes: Size of the largest object, which bounds how long a transfer may take.
    """

    def __init__(self, store: ResultStore, max_bytes: int) -> None:
        self.store = store
        self.large_input_bytes = store.large_input_bytes
        self._transfer_s = 2 * _CALL_S + max_bytes / _TRANSFER_BYTES_PER_S
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="result-store")

    def close(self) -> None:
        """Ends the threads, without waiting for a store that hangs."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def put(self, key: str, content: bytes, content_type: str) -> None:
        """As `ResultStore.put`."""
        await self.call(self._transfer_s, self.store.put, key, content, content_type)

    async def get(self, key: str) -> bytes | None:
        """As `ResultStore.get`."""
        return await self.call(self._transfer_s, self.store.get, key)

    async def delete(self, keys: Sequence[str]) -> None:
        """As `ResultStore.delete`."""
        await self.call(self._transfer_s, self.store.delete, keys)

    async def ping(self, within_s: float) -> None:
        """As `ResultStore.ping`."""
        await self.call(within_s, self.store.ping)

    async def call(
        self,
        within_s: float,
        function: Callable[Arguments, Value],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Value:
        """What a method of the store returns.

        Raises:
            StoreUnavailable: It has not returned in time, or as the method.
        """
        run = asyncio.get_running_loop().run_in_executor(self._pool, lambda: function(*args, **kwargs))
        try:
            async with asyncio.timeout(within_s):
                return await run
        except TimeoutError as error:
            raise StoreUnavailable(
                f"the result store has not answered for {within_s:.0f} s; it hangs or is overloaded: try again soon",
                retry_after_s=_RETRY_S,
            ) from error
