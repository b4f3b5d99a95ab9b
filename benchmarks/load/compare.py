"""Compare the service overhead of two checkouts, measured in turns.

`python -m benchmarks.load.compare BEFORE AFTER` starts the service of both directories with this interpreter and
alternates between them for `--rounds` rounds. It prints medians over the rounds, and medians of the ratios
after / before within a round. On a busy machine read the processor times, not the wall times.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.load.run import FIGURES, measure_run, our_system

_SERVE = """
import sys
from benchmarks.load.service import run_service
with run_service() as port:
    print(port, flush=True)
    sys.stdin.read()
"""
Runs = dict[str, list[dict[str, float]]]


@contextlib.contextmanager
def serve(checkout: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Run the service of a checkout; yields its port and its root process."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _SERVE], cwd=checkout, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        port = process.stdout.readline()
        if not port:
            raise RuntimeError(f"the service of {checkout} did not start")
        try:
            yield int(port), psutil.Process(process.pid)
        finally:
            process.stdin.close()
            process.wait()


def measure(before: Path, after: Path, rounds: int, seconds: float) -> tuple[Runs, Runs]:
    """Measure both checkouts in alternating order; per run one entry per round."""
    system = our_system()
    requests = {f"no-op, {clients}": (system.noop, clients) for clients in (1, 8, 64)}
    requests |= {name: (request, 1) for name, request in system.blobs.items()}
    runs: tuple[Runs, Runs] = ({name: [] for name in requests}, {name: [] for name in requests})
    with serve(before) as first, serve(after) as second:
        for number in range(rounds):
            for name, (request, clients) in requests.items():
                for which in (0, 1) if number % 2 == 0 else (1, 0):
                    port, root = (first, second)[which]
                    runs[which][name].append(measure_run(port, request, clients, 20, seconds, root))
    return runs


def format_errors(before: Runs, after: Runs) -> list[str]:
    """Format a Markdown table with the figures before and after, and the median ratio, per run."""
    lines = ["| | figure | before | after | after / before |", "|---|---|---|---|---|"]
    for name, old in before.items():
        for figure in FIGURES:
            pairs = [(a[figure], b[figure]) for a, b in zip(old, after[name], strict=True)]
            medians = [statistics.median(values) for values in zip(*pairs, strict=True)]
            ratios = [b / a for a, b in pairs if a > 0]
            ratio = f"{statistics.median(ratios):.2f}" if ratios else "-"
            lines.append(f"| {name} | {figure} | {medians[0]:.2f} | {medians[1]:.2f} | {ratio} |")
    return lines


def main() -> None:
    """Measure both checkouts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the old code")
    parser.add_argument("after", type=Path, help="checkout of the new code")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each run")
    options = parser.parse_args()
    before, after = measure(options.before, options.after, options.rounds, options.seconds)
    print("\n".join(format_errors(before, after)))


if __name__ == "__main__":
    main()
