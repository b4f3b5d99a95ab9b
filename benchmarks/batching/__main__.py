"""`python -m benchmarks.batching`: images per second by batch size, and the worker's policy simulated with them.

Prints the tables, writes `benchmarks/results/batching.json` and the block of `docs/operations.md`.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.batching.report import to_markdown
from benchmarks.readme_figures import OPERATIONS, RESULTS, put_blocks, to_operations_blocks

REPORT = RESULTS / "batching.json"


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle directory.")] = Path("bundles/pocket"),
    sizes: Annotated[list[int] | None, typer.Option(help="Batch size beside 1; repeatable; none: 2, 4 and 8.")] = None,
    runs: Annotated[int, typer.Option(help="Rounds through all sizes.", min=1)] = 9,
    out: Annotated[Path, typer.Option(help="The report; the default also updates docs/operations.md.")] = REPORT,
) -> None:
    """Measure batches of every stage and simulate the policy."""
    from benchmarks.batching.run import measure  # imports torch, which `--help` does not need

    record = measure(bundle, sorted({1, *(sizes or (2, 4, 8))}), runs)
    out.write_text(json.dumps(record, indent=2) + "\n")
    typer.echo(to_markdown(record))
    if out == REPORT:
        OPERATIONS.write_text(put_blocks(OPERATIONS.read_text(), to_operations_blocks(RESULTS)))


if __name__ == "__main__":
    typer.run(main)
