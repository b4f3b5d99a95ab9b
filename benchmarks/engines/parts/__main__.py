"""`python -m benchmarks.engines.parts`: the options; `run.py`, beside it, loads torch."""

import typer


def main(threads: int = 1) -> None:
    """Print the minimum time of every part."""
    from benchmarks.engines.parts.run import run

    run(threads)


if __name__ == "__main__":
    typer.run(main)
