"""Shows on standard error that long work moves, where it has no steps to count: loading, decoding, exporting."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from giantleap.models.device import StageClock, StageName

_FIRST_S: Final = 2.0  # shorter work shows nothing
_LINE_EVERY_S: Final = 30.0  # where standard error is no terminal
_UPDATE_EVERY_S: Final = 1.0


@dataclass
class Work:
    """Work that runs, and the part of it that is done; None: not known."""

    name: str
    fraction: float | None = None

    def to_line(self, spent_s: float) -> str:
        """The work in one line."""
        done = "" if self.fraction is None else f" {100 * self.fraction:.0f} %,"
        return f"{self.name}:{done} {spent_s:.0f} s"


@contextmanager
def working(name: str) -> Iterator[Work]:
    """Show the work of the block with its seconds: a line that is rewritten at a terminal, one per 30 s elsewhere."""
    work, done = Work(name), threading.Event()
    thread = threading.Thread(target=_show, args=(work, done), daemon=True)
    thread.start()
    try:
        yield work
    finally:
        done.set()
        thread.join()


def import_torch() -> None:
    """Import torch, which takes long on a busy machine, and show it."""
    with working("loading torch"):
        import torch  # noqa: F401


@dataclass
class ShownStages:
    """A `StageObserver` that times the stages of one image and shows each that takes long."""

    clock: "StageClock"
    work: Work | None = None

    @contextmanager
    def measure(self, stage: "StageName") -> Iterator[None]:
        """Time and show the block."""
        with working(stage) as self.work, self.clock.measure(stage):
            yield

    def report_part(self, stage: "StageName", fraction: float | None) -> None:
        """Note how much of the stage is done."""
        if self.work is not None and fraction is not None:
            self.work.fraction = fraction


def _show(work: Work, done: threading.Event) -> None:
    started_s, at_terminal = time.monotonic(), sys.stderr.isatty()
    if done.wait(_FIRST_S):
        return
    while True:
        line = work.to_line(time.monotonic() - started_s)
        print(f"\r\x1b[K{line}" if at_terminal else line, end="" if at_terminal else "\n", file=sys.stderr, flush=True)
        if done.wait(_UPDATE_EVERY_S if at_terminal else _LINE_EVERY_S):
            break
    if at_terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
