"""`python -m benchmarks.quality.clamp`: the options; `run.py`, beside it, loads torch."""

from pathlib import Path
from typing import Annotated

import typer


def main(
    directory: Annotated[Path, typer.Option("--bundle", help="Bundle directory.")] = Path("bundles/pocket"),
    lua: Annotated[Path | None, typer.Option(help="Other weights than the bundle's own.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/clamp.json"),
    pictures: Annotated[int, typer.Option(min=1, help="Procedural pictures for the statistics.")] = 96,
    sigmas: Annotated[list[float] | None, typer.Option(help="Clamp widths to compare; may be repeated.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure, print, write the JSON."""
    from benchmarks.quality.clamp.run import run

    run(directory, lua, out, pictures, sigmas, threads)


if __name__ == "__main__":
    typer.run(main)
