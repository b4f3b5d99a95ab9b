"""`python -m benchmarks.training.ablations`: the options; `run.py`, beside it, loads torch."""

from pathlib import Path
from typing import Annotated

import typer


def main(
    out: Annotated[Path, typer.Option(help="Where pictures, pairs and the current run go.")] = Path("runs/ablations"),
    bundle: Annotated[Path, typer.Option(help="The bundle whose VAE is used.")] = Path("bundles/pocket"),
    pool: Annotated[Path, typer.Option(help="Pool of procedural pictures; filled when empty.")] = Path("runs/pool"),
    results: Annotated[Path, typer.Option(help="The results file.")] = Path("benchmarks/results/ablations.json"),
    page: Annotated[Path, typer.Option(help="The table.")] = Path("docs/lab/ablations.md"),
    updates: Annotated[
        int, typer.Option(min=6, help="Updates of each variant over all stages; a multiple of 6.")
    ] = 300,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    pictures: Annotated[int, typer.Option(min=1, help="Number of training pictures.")] = 384,
) -> None:
    """Train the missing variants, store each result, write the page."""
    from benchmarks.training.ablations.run import run

    run(out, bundle, pool, results, page, updates, seeds, pictures)


if __name__ == "__main__":
    typer.run(main)
