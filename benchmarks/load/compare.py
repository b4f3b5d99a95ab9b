"""What a change does to the service's own cost: two checkouts side by side, each request run on one after the other.

`python -m benchmarks.load.compare BEFORE AFTER` starts the service of both directories, with this interpreter, and
takes turns between them for `--rounds` rounds. Printed are medians of the rounds and of the ratios after / before
within a round. On a busy machine the processor time for a request is worth reading, the times are hardly.
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
    """The service of a checkout until the block ends: its port, and the process above all of its processes."""
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
    """The figures of both checkouts: for each run one of every round, the two in turn first."""
    system = our_system()
    wanted = {f"no-op, {clients}": (system.noop, clients) for clients in (1, 8, 64)}
    wanted |= {name: (request, 1) for name, request in system.blobs.items()}
    found: tuple[Runs, Runs] = ({name: [] for name in wanted}, {name: [] for name in wanted})
    with serve(before) as first, serve(after) as second:
        for number in range(rounds):
            for name, (request, clients) in wanted.items():
                for which in (0, 1) if number % 2 == 0 else (1, 0):
                    port, root = (first, second)[which]
                    found[which][name].append(measure_run(port, request, clients, 20, seconds, root))
    return found


def format_errors(before: Runs, after: Runs) -> list[str]:
    """A table in Markdown: of each run the figures before and after, and the median ratio."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the code as it was")
    parser.add_argument("after", type=Path, help="a checkout of the code as it is")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each run")
    options = parser.parse_args()
    before, after = measure(options.before, options.after, options.rounds, options.seconds)
    print("\n".join(format_errors(before, after)))


if __name__ == "__main__":
    main()
