"""`python -m benchmarks.pipeline`: the options; `run.py`, beside it, loads torch."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.pipeline.report import BEFORE_RESULTS, MARKS, PAGE, RESULTS, put_report


def main(
    jobs: Annotated[int, typer.Option(help="Jobs of a run.", min=3)] = 16,
    batch_s: Annotated[float, typer.Option(help="Seconds that a batch sleeps there.", min=0.1)] = 2.0,
    rounds: Annotated[int, typer.Option(help="Runs of each order on the pocket bundle.", min=1)] = 5,
    before: Annotated[
        Path | None, typer.Option(help="An older checkout whose service is compared, and nothing else measured.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The report; none: that of docs/lab/worker.md, which is updated.")
    ] = None,
) -> None:
    """Measure, print, write the JSON."""
    if before is None:
        from benchmarks.pipeline.run import run

        path = out or RESULTS
        run(jobs, batch_s, rounds, path)
    else:
        from benchmarks.pipeline.before import run_before

        path = out or BEFORE_RESULTS
        run_before(before, jobs, rounds, path)
    if path in MARKS:
        PAGE.write_text(put_report(PAGE.read_text(), path))


if __name__ == "__main__":
    typer.run(main)
