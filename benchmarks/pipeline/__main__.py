"""`python -m benchmarks.pipeline`: the options; `run.py`, beside it, loads torch."""

from pathlib import Path
from typing import Annotated

import typer

RESULTS = Path("benchmarks/results/pipeline.json")


def main(
    jobs: Annotated[int, typer.Option(help="Jobs on the device that sleeps, for each order.", min=3)] = 16,
    batch_s: Annotated[float, typer.Option(help="Seconds that a batch sleeps there.", min=0.1)] = 2.0,
    rounds: Annotated[int, typer.Option(help="Runs of each order on the pocket bundle.", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="The report.")] = RESULTS,
) -> None:
    """Measure, print, write the JSON."""
    from benchmarks.pipeline.run import run

    run(jobs, batch_s, rounds, out)


if __name__ == "__main__":
    typer.run(main)
