"""Reads the headers Accept, Prefer and Cancel-After: whether to respond with a file or a job, and when.

Pure functions of header values; `giantleap.service.api.submission` acts on them.
"""

from dataclasses import dataclass

from giantleap.service.errors import MalformedRequest, NotAcceptable
from giantleap.service.jobs.media_types import JSON_TYPE

MAX_CANCEL_AFTER_S = 7 * 86_400


@dataclass(frozen=True, slots=True)
class Preference:
    """How long the client waits (RFC 7240). `wait_s` is None where it does not say; 0: respond at once."""

    wait_s: float | None = None

    @property
    def applied(self) -> str | None:
        """The value of Preference-Applied."""
        if self.wait_s is None:
            return None
        return "respond-async" if self.wait_s == 0 else f"wait={self.wait_s:.0f}"


def read_preference(prefer: str | None, max_wait_s: float) -> Preference:
    """The preferences respond-async and wait=N; others are ignored, as RFC 7240 asks.

    With both, `wait=N` is the time to wait before the asynchronous response; of several, the first counts (section 2).

    Raises:
        MalformedRequest: The value of wait is not a whole number of seconds.
    """
    wait_s: float | None = None
    respond_async = False
    for part in (prefer or "").split(","):
        name, _, value = part.partition(";")[0].partition("=")
        if name.strip().lower() == "respond-async":
            respond_async = True
        elif name.strip().lower() == "wait":
            digits = value.strip().strip('"')
            if not (digits.isascii() and digits.isdigit() and len(digits) <= 9):
                raise MalformedRequest("Prefer: wait needs a whole number of seconds, for example wait=10")
            wait_s = min(float(digits), max_wait_s) if wait_s is None else wait_s
    if wait_s is None and respond_async:
        wait_s = 0.0
    return Preference(wait_s)


def prefers_bytes(prefer: str | None) -> bool:
    """Whether a client prefers `return=representation` (RFC 7240, 4.2): the file in the response, not a redirect."""
    return any(part.replace(" ", "").lower() == "return=representation" for part in (prefer or "").split(","))


def read_cancel_after(header: str | None) -> float | None:
    """The deadline of a job in seconds, from Cancel-After; None where there is no such header.

    Raises:
        MalformedRequest: It is not a whole number of seconds, or out of range.
    """
    if header is None:
        return None
    digits = header.strip()
    if digits.isascii() and digits.isdigit() and len(digits) <= 9 and 1 <= int(digits) <= MAX_CANCEL_AFTER_S:
        return float(digits)
    raise MalformedRequest(f"Cancel-After must be a whole number of seconds from 1 to {MAX_CANCEL_AFTER_S}")


def choose_media_type(accept: str | None, file_types: tuple[str, ...]) -> str:
    """The media type to respond with: JSON for the job, or one of the types of its file.

    The highest quality wins; on a tie JSON does, then the order of `file_types`.

    Raises:
        NotAcceptable: The client accepts none of them.
    """
    ranges = _read_ranges(accept or "*/*")
    offers = (JSON_TYPE, *file_types)
    best = max(offers, key=lambda offer: _quality(ranges, offer))
    if _quality(ranges, best) <= 0.0:
        raise NotAcceptable(f"Accept allows none of the available types; they are {', '.join(offers)}")
    return best


def _read_ranges(accept: str) -> list[tuple[str, float]]:
    """Media ranges with their quality; an unreadable quality counts as 0."""
    ranges = []
    for part in accept.split(","):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                quality = _read_quality(value)
        ranges.append((name, quality))
    return ranges


def _read_quality(value: str) -> float:
    try:
        quality = float(value)
    except ValueError:
        return 0.0
    return quality if 0.0 <= quality <= 1.0 else 0.0


def _quality(ranges: list[tuple[str, float]], offer: str) -> float:
    """Quality of the most specific range that covers the offer; 0 where none does."""
    family = offer.partition("/")[0] + "/*"
    for wanted in (offer, family, "*/*"):
        matches = [quality for name, quality in ranges if name == wanted]
        if matches:
            return max(matches)
    return 0.0
