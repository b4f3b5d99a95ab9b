"""Logs as one JSON object per line on standard error: what happened, never what was asked for.

Values beside the message go in as `extra={"fields": {...}}`; what holds for everything that is logged within a request
or a batch (its ids) is given once, by `log_fields`. No caller of either passes a prompt, a latent or a header.
"""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType

_NO_FIELDS: Mapping[str, object] = MappingProxyType({})
_FIELDS: ContextVar[Mapping[str, object]] = ContextVar("log_fields", default=_NO_FIELDS)


@contextmanager
def log_fields(**fields: object) -> Iterator[None]:
    """Adds `fields` to every line logged within, by any library, in this task or thread; a line's own fields win."""
    token = _FIELDS.set({**_FIELDS.get(), **fields})
    try:
        yield
    finally:
        _FIELDS.reset(token)


class JsonFormatter(logging.Formatter):
    """One log record as one line of JSON; an exception's traceback is one string in it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **_FIELDS.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def configure_logging(level: str) -> None:
    """Send every log of the process to standard error as JSON, from `level` on.

    Effects: replaces the handlers of the root logger. Libraries that tell of each request (httpx, urllib3) are only
    heard from warnings on, because their lines hold URLs.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "PIL", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
