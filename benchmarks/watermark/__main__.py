"""`python -m benchmarks.watermark`: the options; `run.py`, beside it, loads torch."""

from typing import Annotated

import typer


def main(
    marked: Annotated[int, typer.Option(help="Marked pictures of each kind and size.")] = 20,
    unmarked: Annotated[int, typer.Option(help="Pictures without a mark.")] = 1000,
) -> None:
    """Measure marked and unmarked pictures, print the rows and store them."""
    from benchmarks.watermark.run import run

    run(marked, unmarked)


if __name__ == "__main__":
    typer.run(main)
