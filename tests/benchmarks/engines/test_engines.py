"""The page on engines says what the benchmark measured."""

import json
from pathlib import Path

import pytest

from benchmarks.engines.report import END, MARKS, PAGE, PRECISIONS, VARIANTS, choose_variants, to_markdown


@pytest.mark.parametrize(("report", "mark"), MARKS.items())
def test_the_page_holds_the_figures_of_the_last_measurement(report: Path, mark: str) -> None:
    assert mark + to_markdown(json.loads(report.read_text())) + END in PAGE.read_text()


def test_a_short_run_has_the_baseline_first_and_the_precision_that_was_chosen() -> None:
    assert choose_variants(PRECISIONS, has_graph=True) == list(VARIANTS)
    short = choose_variants(["float32"], has_graph=False)
    assert short == ["published float32", "module float32", "torch float32"]
    half = choose_variants(["bfloat16"], has_graph=True)
    assert half == ["published float32", "published bfloat16", "torch bfloat16"]
