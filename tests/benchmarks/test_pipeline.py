"""The comparison of an older service with that of today: what is counted, its bundle, and what the page shows."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pipeline.before import BUNDLE, Run, copy_bundle, summarize, to_run
from benchmarks.pipeline.report import MARKS, PAGE, put_report, to_before_markdown
from giantleap.models.bundle.bundle import check_files, read_bundle

MACHINE = {
    "model": "a processor", "cpu_capability": "AVX2", "cores": 2, "load_1min": 0.1, "versions": {"torch": "2.13.0"},
    "measured_at": "2026-11-30T18:00:00+00:00",
}  # fmt: skip


def record(end_s: int, **stages: float) -> dict[str, Any]:
    return {"finished_at": f"2026-11-30T18:00:{end_s:02}.000Z", "stages": {"queue": 9.0, **stages}}


def test_the_time_is_that_from_the_end_of_the_first_job_which_is_not_counted() -> None:
    run = to_run([record(10, generate=2.0, encode=1.0), record(13), record(15), record(14)])
    assert run.images_per_s == pytest.approx(3 / 5)
    assert run.stages_alone_s == {"generate": 2.0, "encode": 1.0}


def test_ratios_are_taken_round_by_round_and_judged_on_the_page() -> None:
    rounds = [
        {"before": Run(before, {"encode": 0.04}), "now": Run(now, {"encode": 0.002})}
        for before, now in ((1.0, 1.2), (0.1, 0.12), (2.0, 2.2))  # the machine was busy in the second
    ]
    row = {"jobs": "generate at 128 px, x4 to 512 px", "threads": "1", **summarize(rounds)}
    assert row["ratio"] == 1.2
    report = {"machine": MACHINE, "before": "e6f7636", "jobs": 16, "rounds": 3, "results": [row]}
    assert "| 1 | 1.00 | 1.20 | 1.20 | >= 1.15, met | encode 40 -> 2 |" in to_before_markdown(report)
    row["ratio"] = 1.1
    assert ">= 1.15, missed" in to_before_markdown(report)


def test_the_copied_bundle_is_whole_and_says_nothing_of_previews(tmp_path: Path) -> None:
    bundle = read_bundle(copy_bundle(BUNDLE, tmp_path / "pocket"))
    check_files(bundle)
    copied, whole = (tomllib.loads((each / "bundle.toml").read_text()) for each in (bundle.directory, BUNDLE))
    del whole["preview"], whole["files"]["preview.safetensors"]
    assert copied == whole


@pytest.mark.parametrize("report", [path for path in MARKS if path.exists()])
def test_the_page_has_the_figures_of_the_stored_reports(report: Path) -> None:
    page = PAGE.read_text()
    assert page == put_report(page, report)
