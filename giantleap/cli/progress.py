"""Shows on standard error that long work moves, where it has no steps to count: loading, decoding, exporting."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_FIRST_S: Final = 2.0  # shorter work shows nothing
_LINE_EVERY_S: Final = 30.0  # where standard error is no terminal
_UPDATE_EVERY_S: Final = 1.0


@contextmanager
def working(what: str) -> Iterator[None]:
    """Name the work of the block with its seconds: a line that is rewritten at a terminal, one per 30 s elsewhere."""
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(what, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show(what: str, done: threading.Event) -> None:
    started_s, at_terminal = time.monotonic(), sys.stderr.isatty()
    if done.wait(_FIRST_S):
        return
    while True:
        line = f"{what}: {time.monotonic() - started_s:.0f} s"
        print(f"\r\x1b[K{line}" if at_terminal else line, end="" if at_terminal else "\n", file=sys.stderr, flush=True)
        if done.wait(_UPDATE_EVERY_S if at_terminal else _LINE_EVERY_S):
            break
    if at_terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
