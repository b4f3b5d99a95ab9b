"""`python -m benchmarks.methods`: the options; `run.py`, beside it, loads torch."""

from pathlib import Path
from typing import Annotated

import typer


def main(
    directory: Annotated[Path, typer.Option("--bundle", help="Bundle directory.")] = Path("bundles/pocket"),
    out: Annotated[Path, typer.Option(help="Where the times go.")] = Path("benchmarks/results/methods.json"),
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    warmups: Annotated[int, typer.Option(help="Uncounted runs.")] = 2,
    runs: Annotated[int, typer.Option(help="Counted runs.")] = 7,
) -> None:
    """Time, print the table, write the JSON."""
    from benchmarks.methods.run import run

    run(directory, out, threads, warmups, runs)


if __name__ == "__main__":
    typer.run(main)
