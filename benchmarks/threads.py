"""Compares the number of threads that commands choose with one thread, on the machine as it is and beside busy loops.

`python -m benchmarks.threads` runs `giantleap generate --scale 4` with both, run by run in turn, so that whatever else
the machine does slows both; `--demo` times the demo as well. It writes `benchmarks/results/threads.json`, and
`python -m benchmarks.readme_figures` writes the figures into `docs/operations.md`.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import read_machine
from benchmarks.readme_figures import RESULTS

REPORT = RESULTS / "threads.json"
BUSY_LOOPS = 2
RULES: Mapping[str, Mapping[str, str]] = {"chosen": {}, "one thread": {"OMP_NUM_THREADS": "1"}}
COMMANDS: Mapping[str, Sequence[str]] = {
    "generate": ("giantleap", "generate", "a red sphere on a green floor", "--scale", "4", "-o", "{out}/image.png"),
    "demo": ("giantleap.cli.demo", "--out", "{out}"),
}


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep so many processors busy with other processes."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


def time_command(words: Sequence[str], variables: Mapping[str, str]) -> float:
    """Seconds of one run, in an environment without any setting.

    Raises:
        CalledProcessError: The command failed.
    """
    unset = ("GIANTLEAP_", "OMP_", "MKL_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", *(word.format(out=out) for word in words)]
        started_s = time.perf_counter()
        subprocess.run(command, env=environment | dict(variables), check=True, capture_output=True)
        return time.perf_counter() - started_s


def measure(command: str, loops: int, runs: int) -> dict[str, Any]:
    """One row of the report: the median seconds with each rule, and their ratio."""
    times_s: dict[str, list[float]] = {rule: [] for rule in RULES}
    with busy_loops(loops):
        for _ in range(runs):
            for rule, variables in RULES.items():
                times_s[rule].append(time_command(COMMANDS[command], variables))
    medians_s = {rule: round(statistics.median(each), 2) for rule, each in times_s.items()}
    ratio = round(medians_s["chosen"] / medians_s["one thread"], 2)
    return {"command": command, "busy_loops": loops, "median_s": medians_s, "ratio": ratio}


def main(
    runs: Annotated[int, typer.Option(help="Runs of each kind.", min=1)] = 3,
    demo: Annotated[bool, typer.Option(help="Time the demo as well, which takes minutes.")] = False,
    out: Annotated[Path, typer.Option(help="The report.")] = REPORT,
) -> None:
    """Measure, write the report and print it."""
    commands = ("generate", "demo") if demo else ("generate",)
    time_command(COMMANDS["generate"], {})  # warms the file cache
    machine = read_machine()
    rows = [measure(command, loops, runs) for command in commands for loops in (0, BUSY_LOOPS)]
    report = {"machine": machine, "runs": runs, "results": rows}
    out.write_text(json.dumps(report, indent=2) + "\n")
    typer.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
