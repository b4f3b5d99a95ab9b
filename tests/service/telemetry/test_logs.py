"""Lines of the log: JSON for machines, text for a terminal, and nothing of a client that breaks either."""

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from giantleap.service.telemetry.logs import JsonFormatter, TextFormatter, configure_logging, log_fields


class Terminal(io.StringIO):
    """A stream that says it is a terminal, or is not."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, which gets back its handlers and level."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture(scope="module")
def earlier_command() -> None:
    """What a fixture of several tests does when it calls a command of `giantleap`."""
    logging.getLogger().setLevel(logging.DEBUG)


def test_a_test_starts_with_the_default_level(earlier_command: None) -> None:
    assert logging.getLogger().level == logging.WARNING


def _line(formatter: logging.Formatter, message: str, **fields: object) -> str:
    record = logging.LogRecord("giantleap.service.worker.loop", logging.INFO, __file__, 1, message, None, None)
    record.fields = fields
    return formatter.format(record)


def test_text_holds_message_and_fields_without_the_ids_that_join_lines() -> None:
    with log_fields(request_id="r", trace_id="t", route="/generate"):
        line = _line(TextFormatter(), "request ended", status=200, bundles=["pocket", "a b"], stages_s={"decode": 0.5})
    assert line[8:] == (
        ' info    request ended route=/generate status=200 bundles=pocket,"a b" stages_s={"decode":0.5}'
    )


def test_a_line_of_text_stays_one_line_whatever_a_field_holds() -> None:
    line = _line(TextFormatter(), "met\na\x1b[2Jcode", name="a\nb", other="x=1")
    assert line[8:] == ' info    met\\na\\x1b[2Jcode name="a\\nb" other="x=1"'


@pytest.mark.parametrize(
    ("layout", "is_terminal", "as_text"),
    [("auto", True, True), ("auto", False, False), ("json", True, False), ("text", False, True)],
)
def test_a_terminal_gets_text_and_a_file_json(
    root: logging.Logger, monkeypatch: pytest.MonkeyPatch, layout: str, is_terminal: bool, as_text: bool
) -> None:
    stream = Terminal(is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging("info", layout)  # type: ignore[arg-type]
    logging.getLogger("giantleap.service.worker.loop").info("worker ready")
    written = stream.getvalue()
    assert written.endswith(" info    worker ready\n") if as_text else json.loads(written)["message"] == "worker ready"


def test_json_has_what_text_leaves_out() -> None:
    with log_fields(request_id="r", trace_id="t"):
        assert {"request_id": "r", "trace_id": "t"}.items() <= json.loads(_line(JsonFormatter(), "x")).items()
