"""Time 200 latents of the pocket bundle: two processes of `giantleap batch` and two actors of Ray Data, in turns.

`python benchmarks/batch/install.py`, then `python -m benchmarks.batch` prints the images per second and writes
`benchmarks/results/batch.json`: of the whole run, and from the first output to the last, without start and load.
"""

import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.batch.install import ENVIRONMENT
from benchmarks.machine import read_machine
from benchmarks.processes import run_process

RESULTS = Path("benchmarks/results/batch.json")
SHAPE = (24, 8, 8)  # a latent of the pocket bundle, of 32 px
PROCESSES = 2
BATCH_SIZE = 8
OPTIONS = ("--bundle", "pocket", "--scale", "2", "--batch-size", str(BATCH_SIZE))


def commands(tool: str, source: Path, output: Path) -> list[list[str]]:
    """The command lines that run side by side."""
    if tool == "giantleap batch":
        command = [sys.executable, "-m", "giantleap", "batch", str(source), str(output), *OPTIONS, "--device", "cpu"]
        return [[*command, "--shard-rows", "16"]] * PROCESSES
    python = str(ENVIRONMENT / "bin" / "python")
    return [[python, "examples/ray_batch.py", str(source), str(output), *OPTIONS, "--actors", str(PROCESSES)]]


def measure(tool: str, source: Path, output: Path, rows: int) -> dict[str, float]:
    """Images per second of one run.

    Raises:
        RuntimeError: A process failed, or an image is missing; the message has the end of what was printed.
    """
    started_s = time.time()
    with ExitStack() as stack:
        printed = stack.enter_context(tempfile.TemporaryFile())
        running = [
            stack.enter_context(run_process(line, output=printed.fileno())) for line in commands(tool, source, output)
        ]
        codes = [process.wait() for process in running]
        printed.seek(0)
        end = printed.read()[-2000:].decode(errors="replace")
    written_s = sorted(path.stat().st_mtime for path in output.glob("*.png"))
    if any(codes) or len(written_s) != rows:
        raise RuntimeError(f"{tool}: exit codes {codes}, {len(written_s)} of {rows} images; it printed:\n{end}")
    whole, steady = rows / (written_s[-1] - started_s), (rows - BATCH_SIZE) / (written_s[-1] - written_s[0])
    return {"images_per_s": round(whole, 3), "images_per_s_without_start": round(steady, 3)}


def main(
    rows: Annotated[int, typer.Option(help="Latents.", min=BATCH_SIZE + 1)] = 200,
    runs: Annotated[int, typer.Option(help="Runs of each.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="The report.")] = RESULTS,
) -> None:
    """Measure, print, write the JSON."""
    tools = ("giantleap batch", "ray data")
    measured: dict[str, list[dict[str, float]]] = {tool: [] for tool in tools}
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "latents")
        source.mkdir()
        drawn = np.random.default_rng(0)
        for index in range(rows):
            np.save(source / f"{index:04d}.npy", drawn.standard_normal(SHAPE).astype(np.float32))
        for run in range(runs):
            for tool in tools:
                row = measure(tool, source, Path(directory, f"{run}-{tool}"), rows)
                measured[tool].append(row)
                typer.echo(f"{tool}: {row}")
    report: dict[str, Any] = {"machine": read_machine(), "rows": rows, "processes": PROCESSES, "runs": measured}
    report["median"] = {
        tool: {name: statistics.median(each[name] for each in each_run) for name in each_run[0]}
        for tool, each_run in measured.items()
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
