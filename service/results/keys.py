"""Names of the objects of a store: `<key prefix>/<expiry>/<job>.<kind>-<token>-<index>`.

The expiry is a UTC time, so that lifetimes go by prefix: whatever lies below a time that has passed may be deleted
unless a job still names it. The token is random, so that no two deliveries of a job ever write the same object.
"""

import re
import secrets
from datetime import UTC, datetime
from typing import Literal

PART_SUFFIX = ".part"
"""End of the name of a file that is being written."""

_KEY = re.compile(
    r"(?P<prefix>[a-z0-9-]{1,32})/(?P<expiry>[0-9]{8}T[0-9]{6}Z)/"
    r"(?P<job>[0-9A-Za-z-]{1,64})\.(result|input)-[0-9a-f]{16}-[0-9]{1,4}(?P<part>\.part)?"
)
_EXPIRY = "%Y%m%dT%H%M%SZ"
_PREFIXES_ALIVE = 60
_MAX_STEP_S = 3600


def new_keys(
    prefix: str, job_id: str, kind: Literal["result", "input"], number: int, lifetime_s: float, now_s: float
) -> list[str]:
    """The keys of the files of one upload, which live for `lifetime_s` and up to a sixtieth longer.

    Raises:
        ValueError: The job has an id that may not be a part of a key.
    """
    step_s = min(_MAX_STEP_S, max(1, int(lifetime_s) // _PREFIXES_ALIVE))
    expiry_s = (int(now_s + lifetime_s) // step_s + 1) * step_s
    start = f"{prefix}/{datetime.fromtimestamp(expiry_s, UTC):{_EXPIRY}}/{job_id}.{kind}-{secrets.token_hex(8)}"
    return [check_key(f"{start}-{index}") for index in range(number)]


def check_key(key: str) -> str:
    """The key, if it is one of a whole object.

    Raises:
        ValueError: It is not: nothing else may become a path.
    """
    match = _KEY.fullmatch(key)
    if match is None or match["part"]:
        raise ValueError("this is no key of a stored object")
    return key


def job_of(key: str) -> str | None:
    """The job that an object, also a half-written one, was written for; None if the name is no key of ours."""
    match = _KEY.fullmatch(key)
    return match["job"] if match else None


def is_expired(expiry: str, now_s: float) -> bool:
    """Whether a part `<expiry>` of a key has passed; False for any other name."""
    try:
        return datetime.strptime(expiry, _EXPIRY).replace(tzinfo=UTC).timestamp() <= now_s
    except ValueError:
        return False
