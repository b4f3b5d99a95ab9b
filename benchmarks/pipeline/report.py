"""Formats the figures of `python -m benchmarks.pipeline`; writes them into its page. Nothing here imports torch."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_cpu

RESULTS = Path("benchmarks/results/pipeline.json")
BEFORE_RESULTS = RESULTS.with_name("pipeline_before.json")
PAGE = Path("docs/lab/worker.md")
TARGETS = {("generate at 128 px, x4 to 512 px", "1"): 1.15}  # times the images per second of before
MARKS = {RESULTS: "<!-- benchmarks.pipeline -->\n", BEFORE_RESULTS: "<!-- benchmarks.pipeline before -->\n"}
_END = "<!-- end -->\n"


def _about(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    shown = f"{describe_cpu(machine)}, {machine['cores']} cores, load {machine['load_1min']:.1f}"
    return f"{shown}, torch {machine['versions']['torch']}, {machine['measured_at'][:10]}."


def to_markdown(report: Mapping[str, Any]) -> str:
    """The busy share of a device that sleeps, and images per second on the pocket bundle, of both orders."""
    fake, pocket = report["fake_device"], report["pocket"]
    lines = [
        _about(report),
        "",
        "| order | device that sleeps: busy | pocket bundle: busy | images/s |",
        "|---|---|---|---|",
    ]
    for order, title in (("in_turn", "in turn"), ("pipeline", "pipeline")):
        busy, rate = (statistics.median(pocket[name][order]) for name in ("busy_share", "images_per_s"))
        lines.append(f"| {title} | {fake['busy_share'][order]:.1%} | {busy:.1%} | {rate:.2f} |")
    lines += [
        "",
        f"On the pocket bundle {pocket['ratio']:.3f} times; a device that never waits: {pocket['limit']:.3f}.",
    ]
    return "\n".join(lines) + "\n"


def to_before_markdown(report: Mapping[str, Any]) -> str:
    """Images per second of both services, and the stages of a job alone."""
    lines = [
        _about(report),
        "",
        f"{report['jobs']} jobs wait; medians of {report['rounds']} rounds; before: commit `{report['before']}`.",
        "",
        "| jobs | threads | images/s before | now | times | target | stages of one job, ms, before -> now |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["results"]:
        rates = (statistics.median(row["images_per_s"][name]) for name in ("before", "now"))
        target = TARGETS.get((row["jobs"], row["threads"]))
        judged = "" if target is None else f">= {target:g}, {'met' if row['ratio'] >= target else 'missed'}"
        before_s, now_s = (row["stages_alone_s"][name] for name in ("before", "now"))
        stages = ", ".join(f"{stage} {1000 * before_s[stage]:.0f} -> {1000 * now_s[stage]:.0f}" for stage in before_s)
        cells = (row["jobs"], row["threads"], *(f"{rate:.2f}" for rate in rates), f"{row['ratio']:.2f}", judged, stages)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def put_report(page: str, path: Path) -> str:
    """The page with the figures of one stored report between its mark and the next end."""
    report = json.loads(path.read_text())
    shown = to_markdown(report) if path.name == RESULTS.name else to_before_markdown(report)
    before, rest = page.split(MARKS[path])
    return before + MARKS[path] + shown + _END + rest.split(_END, 1)[1]
