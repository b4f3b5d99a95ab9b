"""The page on engines says what the benchmark measured."""

import json
import subprocess
import sys

from benchmarks.engines.report import MARKS, PAGE, RESULTS, to_markdown


def test_the_page_holds_the_figures_of_the_last_measurement() -> None:
    table = to_markdown(json.loads(RESULTS.read_text()))
    assert MARKS[0] + table + MARKS[1] in PAGE.read_text()


def test_the_help_does_not_load_torch() -> None:
    program = "import sys, benchmarks.engines.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
