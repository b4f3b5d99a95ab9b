"""`python -m benchmarks.pocket_quality`: the options; `run.py`, beside it, loads torch."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.pocket_quality import Part


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle directory.")] = Path("bundles/pocket"),
    lua: Annotated[Path | None, typer.Option(help="Other weights of LUA.")] = None,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/pocket_quality.json"),
    part: Annotated[Part, typer.Option(help="Measure one part again and keep the other of the file.")] = "all",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Measure, print, write the JSON; exit status 1 when a floor is missed."""
    from benchmarks.pocket_quality.run import run

    run(bundle, lua, out, part, threads)


if __name__ == "__main__":
    typer.run(main)
