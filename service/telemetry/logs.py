"""Logs on standard error, one JSON object or one line of text each: what happened, never what was asked for.

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
from typing import Literal

_NO_FIELDS: Mapping[str, object] = MappingProxyType({})
_ONLY_IN_JSON = frozenset({"request_id", "trace_id", "trace_ids"})
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


class TextFormatter(logging.Formatter):
    """One log record as a line to read on a terminal: local time, level, message, fields.

    The ids of request and trace, which join lines of several processes, are left to JSON.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = {**_FIELDS.get(), **getattr(record, "fields", {})}
        told = "".join(f" {name}={_to_text(value)}" for name, value in fields.items() if name not in _ONLY_IN_JSON)
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        line = f"{time} {record.levelname.lower():<8}{_escape(record.getMessage())}{told}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _to_text(value: object) -> str:
    """Words as they are, lists by commas, the rest as JSON without spaces."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_to_text, value))
    if isinstance(value, str) and value.isprintable() and not set(value) & set(' "='):
        return value
    return json.dumps(value, default=str, separators=(",", ":"))


def _escape(text: str) -> str:
    """Control characters written out: a line stays one line, and a terminal is told nothing by a client's bytes."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def configure_logging(level: str, layout: Literal["auto", "json", "text"] = "json") -> None:
    """Send every log of the process to standard error, from `level` on.

    Effects: replaces the handlers of the root logger. Libraries that tell of each request (httpx, urllib3) are only
    heard from warnings on, because their lines hold URLs; uvicorn too, for the process itself says when it listens.

    Args:
        level: The lowest level that is written.
        layout: How a line looks; auto: text where standard error is a terminal, else JSON.
    """
    as_text = layout == "text" or (layout == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "PIL", "asyncio", "uvicorn"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
