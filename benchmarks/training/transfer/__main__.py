"""`python -m benchmarks.training.transfer`: the options; `run.py`, beside it, loads torch."""

from pathlib import Path
from typing import Annotated

import typer


def main(
    source: Annotated[Path, typer.Option(help="Bundle whose adapter is transferred.")] = Path("bundles/pocket"),
    folder: Annotated[Path, typer.Option(help="Where pictures, pairs and runs go.")] = Path("runs/transfer"),
    pool: Annotated[Path, typer.Option(help="Pool of procedural pictures; filled when empty.")] = Path("runs/pool"),
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/transfer.json"),
    pictures: Annotated[int, typer.Option(help="Number of training pictures.")] = 1600,
    steps: Annotated[int, typer.Option(help="Steps of a transfer; from scratch ten times as many.")] = 250,
    rate: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    batch: Annotated[int, typer.Option(help="Pictures per update.")] = 8,
    only: Annotated[str | None, typer.Option(help="Train this variant, then stop.")] = None,
) -> None:
    """Train, measure, write the JSON; exit status 1 when the transfer is more than 0.3 dB behind."""
    from benchmarks.training.transfer.run import run

    run(source, folder, pool, out, pictures, steps, rate, batch, only)


if __name__ == "__main__":
    typer.run(main)
