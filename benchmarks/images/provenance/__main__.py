"""`python -m benchmarks.images.provenance`: the options; `run.py`, beside it, loads torch."""

import typer


def main() -> None:
    """Measure every format and size, print the rows and store them."""
    from benchmarks.images.provenance.run import run

    run()


if __name__ == "__main__":
    typer.run(main)
