"""What an error of Redis means: its name for logs and clients, and whether the configuration is wrong.

Every error of the server or of the connection may pass: a script of another client ends, memory is freed, an operator
grants a permission. So a running process waits (`REDIS_UNAVAILABLE`); only a start ends with `to_bad_configuration`.
"""

import re
from collections.abc import Iterator

import redis
from redis.exceptions import RedisClusterException

from giantleap.service.errors import BadConfiguration, NotReady

REDIS_UNAVAILABLE = (redis.RedisError, RedisClusterException)
"""Any error of the server or of the connection to it. A cluster without a reachable node has a class of its own."""

_CODE = re.compile(r"[A-Z]{3,}\b")
_RETRY_S = 1
# What a server says, and what to do; the first match counts.
_WRONG = (
    ("NOPERM", "lacks a permission; grant the rule of deploy/redis/giantleap.acl"),
    ("WRONGPASS|NOAUTH|AUTH ", "refuses the login; set user and password in the Redis URL"),
    ("DB index|SELECT is not allowed", "has no database of this number; correct the end of the Redis URL"),
    ("unknown command", "does not know a command; use Redis 7.0 or newer, or Valkey"),
    ("CERTIFICATE_VERIFY_FAILED", "has a certificate of an unknown authority; name its file: ?ssl_ca_certs=FILE"),
    ("WRONGTYPE", "has keys of other programs under this prefix; change GIANTLEAP_KEY_PREFIX"),
    ("InvalidResponse", "does not speak its protocol; the address may be another server's"),
)


def name_fault(error: Exception) -> str:
    """The server's word for an error, such as BUSY or NOPERM, else the class of the error. Holds no data."""
    text = str(error)
    if "ACL failure" in text:
        return "NOPERM"
    code = getattr(error, "status_code", None)
    if code and code != "ERR":
        return str(code)
    found = _CODE.match(text)
    return found.group() if found and isinstance(error, redis.ResponseError) else type(error).__name__


def to_not_ready(error: Exception) -> NotReady:
    """The 503 of a request that met an error of Redis."""
    name = name_fault(error)
    if isinstance(error, redis.ResponseError):
        return NotReady(f"Redis refuses commands at the moment ({name}); try again.", retry_after_s=5 * _RETRY_S)
    return NotReady(
        f"Redis does not answer ({name}); it must be reachable and loaded: try again soon.", retry_after_s=_RETRY_S
    )


def to_bad_configuration(error: Exception) -> BadConfiguration | None:
    """The end of a start that met an error of Redis; None where a retry may help."""
    for each in _causes(error):
        text = f"{name_fault(each)} {each}"
        for pattern, advice in _WRONG:
            if re.search(pattern, text):
                return BadConfiguration(f"Redis {advice} ({_first_words(each)})")
    return None


def _causes(error: BaseException) -> Iterator[Exception]:
    """The error and those that led to it: redis-py hides the refusals of a cluster's nodes behind its own."""
    seen: BaseException | None = error
    while isinstance(seen, Exception):
        yield seen
        seen = seen.__cause__ or seen.__context__


def _first_words(error: Exception) -> str:
    """The server's text, without the arguments of a command: they may hold a prompt."""
    words = re.split(r",? with args| script: ", str(error))[0]
    return f"{name_fault(error)}: {words}"[:160]
