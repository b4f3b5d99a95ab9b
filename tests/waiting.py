"""Waiting for what another thread or process does: polled, with a deadline that a loaded machine keeps."""

import time
from collections.abc import Callable


def wait_until(holds: Callable[[], object], what: str = "what the test waits for", within_s: float = 60.0) -> None:
    """Returns once it holds. Raises: AssertionError: it never did, within the given time."""
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, f"never: {what}"
        time.sleep(0.02)
