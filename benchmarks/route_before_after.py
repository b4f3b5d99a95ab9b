"""Time the route of this checkout and of another one in turns, so that a busy machine slows both alike.

`python -m benchmarks.route_before_after --before DIR` runs `giantleap bench protocol` of both checkouts with the pocket
bundle that each contains, and writes `benchmarks/results/route_before_after.json`. Medians over all rounds count.
"""

import json
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.machine import read_machine
from benchmarks.startup import Checkout

RESULTS = Path("benchmarks/results/route_before_after.json")
STAGES = ("generate", "upscale", "decode", "total")


def measure_route(checkout: Checkout, scale: int, runs: int) -> dict[str, float]:
    """Median seconds of each stage of one process, after a warm-up.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    options = ("--bundle", "bundles/pocket", "--device", "cpu", "--method", "lua", "--scale", str(scale))
    command = checkout.command("bench", "protocol", *options, "--warmups", "1", "--runs", str(runs), "--json", "-")
    environment = checkout.environment("redis://unused") | {"OMP_NUM_THREADS": "1"}
    printed = subprocess.run(
        command, cwd=checkout.directory, env=environment, check=True, capture_output=True, text=True
    ).stdout
    stages: dict[str, Any] = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))["stages"]
    return {stage: stages[stage]["median_s"] for stage in STAGES}


def summarize(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds, the ratio of the totals (after over before, per round) and LUA's share of the route."""
    medians = {
        name: {stage: statistics.median(each[name][stage] for each in rounds) for stage in STAGES} for name in rounds[0]
    }
    return {
        "seconds": medians,
        "ratio": statistics.median(each["now"]["total"] / each["before"]["total"] for each in rounds),
        "lua_share": medians["now"]["upscale"] / medians["now"]["total"],
    }


def main(
    before: Annotated[Path, typer.Option(help="Another checkout to compare with.")],
    rounds: Annotated[int, typer.Option(help="Times that both are measured.", min=1)] = 5,
    runs: Annotated[int, typer.Option(help="Runs that count in each process.", min=1)] = 5,
    scale: Annotated[int, typer.Option(help="2 or 4; a base is 128 px.")] = 4,
    out: Annotated[Path, typer.Option(help="The report.")] = RESULTS,
) -> None:
    """Measure, write the report and print it."""
    checkouts = (Checkout("before", before.resolve(), "giantleap"), Checkout("now", Path.cwd(), "giantleap"))
    measured = [{each.name: measure_route(each, scale, runs) for each in checkouts} for _ in range(rounds)]
    report = {"machine": read_machine(), "scale": scale, "rounds": rounds, "runs": runs, **summarize(measured)}
    out.write_text(json.dumps(report, indent=2) + "\n")
    typer.echo(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
