"""`python -m benchmarks.previews`: the options; `run.py`, beside it, loads torch."""

from pathlib import Path
from typing import Annotated

import typer


def main(out: Annotated[Path | None, typer.Option(help="Where the previews go; None keeps none.")] = None) -> None:
    """Measure, print and store."""
    from benchmarks.previews.run import run

    run(out)


if __name__ == "__main__":
    typer.run(main)
