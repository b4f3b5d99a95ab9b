"""`python -m benchmarks.engines`: measure LUA on this CPU, print the table, write the JSON and docs/engines.md."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmarks.engines.report import CASES, MARKS, PAGE, PRECISIONS, RESULTS, write_page


def main(
    runs: Annotated[int, typer.Option(help="Counted runs per variant.", min=1)] = 9,
    warmups: Annotated[int, typer.Option(help="Runs per variant that are thrown away first.", min=0)] = 2,
    case: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(CASES)}; may be repeated.")] = None,
    precision: Annotated[
        Literal["float32", "bfloat16", "both"], typer.Option(help="Of what is compared with the baseline.")
    ] = "both",
    onnx: Annotated[bool, typer.Option(help="Export and run ONNX graphs at full depth, which takes minutes.")] = True,
    pocket: Annotated[bool, typer.Option(help="Compare images of the pocket bundle, too.")] = True,
    out: Annotated[
        Path, typer.Option(help="Where the figures go; a report of docs/engines.md also updates its page.")
    ] = RESULTS,
) -> None:
    """Measure every variant of LUA on this CPU; status 1 when a target is missed."""
    from benchmarks.engines.run import measure  # imports torch, which `--help` does not need

    precisions = PRECISIONS if precision == "both" else (precision,)
    record = measure(case or list(CASES), precisions, runs, warmups, onnx, pocket, typer.echo)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")
    if out in MARKS:
        write_page(record, PAGE, MARKS[out])
    if any(row["met"] is False for row in record["rows"]) or not all(image["met"] for image in record["pocket"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
