"""`python -m benchmarks.mode_memory`: the options; `run.py`, beside it, loads torch."""

import typer


def main() -> None:
    """Print the bytes that the weights of FLUX.1 take on the device by mode."""
    from benchmarks.mode_memory.run import run

    run()


if __name__ == "__main__":
    typer.run(main)
