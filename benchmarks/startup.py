"""Measures the processor time of starting: `giantleap --help`, an API process until ready, a worker until ready.

`python -m benchmarks.startup` measures this checkout and writes `benchmarks/results/startup.json`. `--before DIR` also
measures another checkout, run by run in turn with this one, so that a busy machine slows both; `--before-module` is
what runs its command. Processor time is user plus system time, also of child processes; the median of the runs counts.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer

from benchmarks.machine import read_machine
from benchmarks.processes import run_process
from giantleap.service.supervisor.embedded_redis import EmbeddedRedis
from giantleap.service.supervisor.supervisor import open_listener

RESULTS = Path("benchmarks/results/startup.json")
PACKAGES = ("torch", "diffusers", "transformers", "fastapi", "uvicorn", "typer")


@dataclass(frozen=True, slots=True)
class Checkout:
    """A source tree and the module that runs its `giantleap` command."""

    name: str
    directory: Path
    module: str

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of `giantleap` with these arguments."""
        return [sys.executable, "-m", self.module, *arguments]

    def environment(self, redis_url: str) -> dict[str, str]:
        """The environment without any setting but the queue; one key prefix per tree."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIANTLEAP_")}
        queue = {"GIANTLEAP_REDIS_URL": redis_url, "GIANTLEAP_KEY_PREFIX": f"startup-{self.name}"}
        return inherited | queue | {"PYTHONPATH": str(self.directory), "GIANTLEAP_LOG_LEVEL": "error"}


def measure_help(checkout: Checkout, environment: Mapping[str, str]) -> float:
    """CPU seconds of `giantleap --help`.

    Raises:
        RuntimeError: the command failed.
    """
    process = subprocess.Popen(
        checkout.command("--help"), cwd=checkout.directory, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{checkout.name}: --help ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def measure_until_ready(
    checkout: Checkout, environment: Mapping[str, str], arguments: Sequence[str], fds: Sequence[int] = ()
) -> float:
    """CPU seconds of one process until it reports that it is ready, as it does to the supervisor.

    Raises:
        RuntimeError: it ended before.
    """
    ready, report = os.pipe()
    command = checkout.command(*arguments, "--ready-fd", str(report))
    with (
        os.fdopen(ready, "rb", buffering=0) as pipe,
        run_process(command, environment=environment, directory=checkout.directory, pass_fds=[report, *fds]) as process,
    ):
        os.close(report)
        if not pipe.read(1):
            raise RuntimeError(f"{checkout.name}: {arguments[0]} ended before it was ready")
        times = psutil.Process(process.pid).cpu_times()
    used_s: float = times.user + times.system + times.children_user + times.children_system
    return used_s


def measure(checkout: Checkout, redis_url: str) -> dict[str, float]:
    """CPU seconds of each start, once."""
    environment = checkout.environment(redis_url)
    with open_listener("127.0.0.1", 0) as listener:
        fd = listener.fileno()
        return {
            "help_cpu_s": measure_help(checkout, environment),
            "api_cpu_s": measure_until_ready(checkout, environment, ("api", "--listen-fd", str(fd)), (fd,)),
            "worker_cpu_s": measure_until_ready(checkout, environment, ("worker",)),
        }


def to_medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def main(
    runs: Annotated[int, typer.Option(help="Runs that count, after one that warms the file cache.", min=1)] = 5,
    before: Annotated[Path | None, typer.Option(help="Another checkout to compare with.")] = None,
    before_module: Annotated[str, typer.Option(help="What runs its command.")] = "giantleap",
    out: Annotated[Path, typer.Option(help="The report.")] = RESULTS,
) -> None:
    """Measure, write the report and print it."""
    checkouts = [Checkout("now", Path.cwd(), "giantleap")]
    if before is not None:
        checkouts.insert(0, Checkout("before", before.resolve(), before_module))
    measured: dict[str, list[dict[str, float]]] = {checkout.name: [] for checkout in checkouts}
    redis = EmbeddedRedis(appendfsync="everysec")
    with ExitStack() as stack:
        url = redis.start(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.callback(redis.stop)
        for _ in range(runs + 1):
            for checkout in checkouts:
                measured[checkout.name].append(measure(checkout, url))
    report = {
        "machine": read_machine(PACKAGES),
        "runs": runs,
        "cpu_s": {name: to_medians(rows[1:]) for name, rows in measured.items()},
    }
    out.write_text(json.dumps(report, indent=2) + "\n")
    typer.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
