"""When to repeat a request. Each may be repeated: a job is made by PUT under an id of its own.

Pure functions of what went wrong; `giantleap_client.flows` acts on them.
"""

from typing import Final

from giantleap_client.errors import GiantleapError

MAX_ATTEMPTS: Final = 10
"""Attempts without a word from the service on when to come back: about 40 s."""
_FIRST_DELAY_S = 0.25
_MAX_DELAY_S = 8.0
# What a proxy answers while the service behind it restarts.
_PROXY_CODES = frozenset({"http_408", "http_429", "http_502", "http_503", "http_504"})


class Cut(Exception):
    """A connection that failed before the whole response was read. It holds the kind of the failure, no text."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def choose_delay_s(fault: Cut | GiantleapError, attempt: int, dice: float) -> float | None:
    """Seconds until the next attempt; None where none helps.

    Args:
        fault: What went wrong.
        attempt: Attempts that were made before this one.
        dice: From 0 to 1: spreads clients that failed together over half of the delay.
    """
    if isinstance(fault, GiantleapError):
        if fault.status not in (429, 503) and fault.code not in _PROXY_CODES:
            return None
        if fault.retry_after_s is not None:  # never earlier than that, and not all at once
            return fault.retry_after_s + dice * _FIRST_DELAY_S
    if attempt + 1 >= MAX_ATTEMPTS:
        return None
    return float(min(_MAX_DELAY_S, _FIRST_DELAY_S * 2**attempt)) * (0.5 + dice / 2)
