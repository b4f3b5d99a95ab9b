"""Logs on standard error, one JSON object or one line of text per record, without any content of a request.

A record takes values as `extra={"fields": {...}}`; `log_fields` adds values, such as ids, to every record of a request
or a batch. No caller of either passes a prompt, a latent or a header.
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
    """Adds `fields` to all records of this task or thread inside the context; fields of a record take precedence."""
    token = _FIELDS.set({**_FIELDS.get(), **fields})
    try:
        yield
    finally:
        _FIELDS.reset(token)


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON, with the traceback of an exception as a string."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
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
    """A log record as a line for a terminal: local time, level, message, fields.

    It leaves out the ids of request and trace, by which tools join the JSON lines of several processes.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        fields = {**_FIELDS.get(), **getattr(record, "fields", {})}
        pairs = "".join(f" {name}={_to_text(value)}" for name, value in fields.items() if name not in _ONLY_IN_JSON)
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        line = f"{time} {record.levelname.lower():<8}{_escape(record.getMessage())}{pairs}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _to_text(value: object) -> str:
    """Words unquoted, lists separated by commas, other values as JSON without spaces."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_to_text, value))
    if isinstance(value, str) and value.isprintable() and not set(value) & set(' "='):
        return value
    return json.dumps(value, default=str, separators=(",", ":"))


def _escape(text: str) -> str:
    """Escapes control characters, so that no client can add lines or control a terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def configure_logging(level: str, layout: Literal["auto", "json", "text"] = "json") -> None:
    """Sends the logs of the process to standard error.

    Effects: replaces the handlers of the root logger. Libraries that log each request (httpx, urllib3) log warnings
    only, because their lines hold URLs; so does uvicorn, because the process itself logs when it listens.

    Args:
        level: The lowest level that is written.
        layout: The format of a line; auto: text if standard error is a terminal, else JSON.
    """
    as_text = layout == "text" or (layout == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "PIL", "asyncio", "uvicorn"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
