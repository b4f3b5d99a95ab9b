"""Compare the service overhead of two checkouts, measured in turns.

`python -m benchmarks.load.compare BEFORE AFTER` starts the service of both directories with this interpreter and
alternates between them for `--rounds` rounds. It prints medians over the rounds, and medians of the ratios
after / before within a round. On a busy machine read the processor times, not the wall times. `--overload` compares
what a tenfold overload does to accepted jobs, and what a refusal costs; `--pin` runs all on one core.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.load.overload import (
    FULL,
    QUEUE_LIMIT,
    WORK_MS,
    WORKERS,
    measure_cpu,
    measure_pair,
    pinned_to_one_core,
    to_refusals,
)
from benchmarks.load.run import measure_run, our_system

_SERVE = """
import json, sys
from benchmarks.load.service import run_service
workers, work_ms, changes = json.loads(sys.argv[1])
with run_service(workers, work_ms, **changes) as port:
    print(port, flush=True)
    sys.stdin.read()
"""
Runs = dict[str, list[dict[str, float]]]


@contextlib.contextmanager
def serve(
    checkout: Path, workers: int = 1, work_ms: float = 0.0, **changes: object
) -> Iterator[tuple[int, psutil.Process]]:
    """Run the service of a checkout, as `run_service` does; yields its port and its root process."""
    pipe, arguments = subprocess.PIPE, json.dumps([workers, work_ms, changes])
    command = [sys.executable, "-c", _SERVE, arguments]
    with subprocess.Popen(command, cwd=checkout, stdin=pipe, stdout=pipe, text=True) as process:
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
                for which in _turns(number):
                    port, root = (first, second)[which]
                    runs[which][name].append(measure_run(port, request, clients, 20, seconds, root))
    return runs


def measure_overloads(before: Path, after: Path, rounds: int, seconds: float) -> tuple[Runs, Runs]:
    """Measure overload and refusals of both checkouts in alternating order."""
    request = our_system().noop
    runs: tuple[Runs, Runs] = ({"overload": []}, {"overload": []})
    with contextlib.ExitStack() as stack:
        served = [
            (
                stack.enter_context(serve(checkout, WORKERS, WORK_MS, queue_limit=QUEUE_LIMIT)),
                stack.enter_context(serve(checkout)),
                stack.enter_context(serve(checkout, *FULL[:2], queue_limit=FULL[2])),
            )
            for checkout in (before, after)
        ]
        for number in range(rounds):
            for which in _turns(number):
                (port, _), idle, full = served[which]
                calm, crowd = measure_pair(port, request, seconds, number)
                figures = {
                    "unloaded_p99_ms": calm.quantile_ms(0.99),
                    "accepted_p99_ms": crowd.quantile_ms(0.99),
                    "p99_ratio": crowd.quantile_ms(0.99) / calm.quantile_ms(0.99),
                    "accepted_per_s": crowd.per_s,
                    "client_ms": 1000 * crowd.cpu_s / crowd.offered,
                }
                costs = [measure_cpu(port, request, seconds / 3, root) for port, root in (idle, full)]
                runs[which]["overload"].append(figures | to_refusals(costs[0], costs[1]))
    return runs


def _turns(number: int) -> tuple[int, int]:
    return (0, 1) if number % 2 == 0 else (1, 0)


def format_errors(before: Runs, after: Runs) -> list[str]:
    """Format a Markdown table with the figures before and after, and the median ratio, per run."""
    lines = ["| | figure | before | after | after / before |", "|---|---|---|---|---|"]
    for name, old in before.items():
        for figure in old[0]:
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
    parser.add_argument("--overload", action="store_true", help="compare overload and refusals instead")
    parser.add_argument("--pin", action="store_true", help="run clients and services on one core")
    options = parser.parse_args()
    compare = measure_overloads if options.overload else measure
    with pinned_to_one_core() if options.pin else contextlib.nullcontext():
        before, after = compare(options.before, options.after, options.rounds, options.seconds)
    print("\n".join(format_errors(before, after)))


if __name__ == "__main__":
    main()
