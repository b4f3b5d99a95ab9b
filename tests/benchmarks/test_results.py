"""Reports go to the folder of results, wherever a benchmark lies and is started."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for path in (ROOT / "benchmarks").rglob("*.py")
    if re.search(r"^RESULTS?\b.* = ", path.read_text(), re.MULTILINE)
)


@pytest.mark.parametrize("name", MODULES)
def test_a_report_goes_to_the_folder_of_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(name)
    report = module.RESULT if hasattr(module, "RESULT") else module.RESULTS
    assert (report if report.is_dir() else report.parent).resolve() == ROOT / "benchmarks" / "results"


def test_the_modules_are_found() -> None:
    assert len(MODULES) > 5 and "benchmarks.images.provenance.run" in MODULES
