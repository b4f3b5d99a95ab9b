"""`python -m benchmarks.pocket_pictures`: the options; `run.py`, beside it, loads torch."""

from pathlib import Path
from typing import Annotated

import typer

PROMPT_COUNT = 30


def main(
    directory: Annotated[Path, typer.Option("--bundle", help="Bundle directory.")] = Path("bundles/pocket"),
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("docs"),
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    prompts: Annotated[int, typer.Option(help="Pictures on the sheet of prompts.")] = PROMPT_COUNT,
) -> None:
    """Generate, enlarge, write the three pictures."""
    from benchmarks.pocket_pictures.run import run

    run(directory, out, threads, prompts)


if __name__ == "__main__":
    typer.run(main)
