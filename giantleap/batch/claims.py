"""Claims of shards by marker files in the output, so that processes need no coordinator.

The marker `SHARD.0003` is the fourth claim of a shard. Creating it is atomic, so that one process gets it. Its owner
writes it again each quarter of the lease; where it is older than the lease, the owner is dead, and another process
creates `SHARD.0004`. No marker is ever taken away, so a frozen owner that wakes up sees the newer one and stops. Ages
are by the clock of the store alone. `SHARD.0003.done` and so on say how a claim ended.
"""

import contextlib
import os
import platform
import re
import secrets
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from giantleap.batch.store import Store

FOLDER: Final = "_batch/claims"
_NAME: Final = re.compile(r"(?P<shard>.+)\.(?P<number>\d{4,})(\.(?P<state>done|failed|free))?")


class State(StrEnum):
    """How a claim ended; `HELD`: it did not."""

    HELD = "held"
    FREE = "free"
    FAILED = "failed"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Claim:
    """The `number`-th claim of a shard."""

    shard: str
    number: int

    @property
    def name(self) -> str:
        """The name of the claim and of its manifest."""
        return f"{self.shard}.{self.number:04d}"


class Claims:
    """The claims of a job.

    Args:
        store: The output.
        lease_s: A claim that was not renewed for so long is free.
    """

    def __init__(self, store: Store, lease_s: float) -> None:
        self._store = store
        self._lease_s = lease_s
        self._owner = f"{platform.node()} {os.getpid()}\n".encode()
        self._failed_before = {claim for claim, state in self._read().values() if state is State.FAILED}

    def states(self, shards: Collection[str]) -> dict[str, State]:
        """How the last claim of each shard ended; shards without a claim, and old failed ones, are free."""
        newest = self._read()
        return {shard: self._state_of(newest.get(shard)) for shard in shards}

    def take(self, shards: Sequence[str]) -> Claim | None:
        """Claim the first shard that is neither claimed nor finished; None if there is none."""
        newest, now_s = self._read(), None
        for shard in shards:
            last, state = newest.get(shard), self._state_of(newest.get(shard))
            if last is not None and state is State.HELD:
                now_s = self._now_s() if now_s is None else now_s
                state = State.FREE if self._is_stale(last[0], now_s) else State.HELD
            claim = Claim(shard, 0 if last is None else last[0].number + 1)
            if state is State.FREE and self._store.create(f"{FOLDER}/{claim.name}", self._owner):
                return claim
        return None

    def is_held(self, claim: Claim) -> bool:
        """Whether no other process has taken the shard since."""
        return self._store.modified_s(f"{FOLDER}/{Claim(claim.shard, claim.number + 1).name}") is None

    def end(self, claim: Claim, state: State) -> None:
        """Say how a claim ended."""
        self._store.write(f"{FOLDER}/{claim.name}.{state}", b"")

    @contextmanager
    def renewing(self, claim: Claim) -> Iterator[None]:
        """Renew a claim while the block runs."""
        done = threading.Event()
        thread = threading.Thread(target=self._renew, args=(claim, done), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _renew(self, claim: Claim, done: threading.Event) -> None:
        while not done.wait(self._lease_s / 4):
            with contextlib.suppress(OSError):  # the next renewal may succeed; if none does, another process takes over
                self._store.write(f"{FOLDER}/{claim.name}", self._owner)

    def _read(self) -> Mapping[str, tuple[Claim, State]]:
        """The newest claim of each shard."""
        newest: dict[str, tuple[Claim, State]] = {}
        for name in sorted(self._store.names(FOLDER), key=len):  # how a claim ended comes after the claim
            if match := _NAME.fullmatch(name):
                claim, state = Claim(match["shard"], int(match["number"])), State(match["state"] or State.HELD)
                if claim.shard not in newest or claim.number >= newest[claim.shard][0].number:
                    newest[claim.shard] = claim, state
        return newest

    def _state_of(self, last: tuple[Claim, State] | None) -> State:
        if last is None or (last[1] is State.FAILED and last[0] in self._failed_before):
            return State.FREE
        return last[1]

    def _is_stale(self, claim: Claim, now_s: float) -> bool:
        renewed_s = self._store.modified_s(f"{FOLDER}/{claim.name}")
        return renewed_s is not None and now_s - renewed_s > self._lease_s

    def _now_s(self) -> float:
        """The time by the clock of the store, from a file that is written for it."""
        name = f"{FOLDER}/{secrets.token_hex(8)}.clock"
        self._store.write(name, b"")
        now_s = self._store.modified_s(name)
        self._store.delete(name)
        assert now_s is not None, "the file was just written"
        return now_s
