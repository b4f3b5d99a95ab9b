"""The page on engines says what the benchmark measured."""

import json

from benchmarks.engines.report import MARKS, PAGE, RESULTS, to_markdown


def test_the_page_holds_the_figures_of_the_last_measurement() -> None:
    table = to_markdown(json.loads(RESULTS.read_text()))
    assert MARKS[0] + table + MARKS[1] in PAGE.read_text()
