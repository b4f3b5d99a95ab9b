"""`docs/load.md` from the report of `benchmarks.load`: no figure on the page is typed by hand."""

from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "load.md"
_NAMES = {"giantleap": "Giantleap", "litserve": "LitServe", "bentoml": "BentoML", "ray": "Ray Serve"}
_COLUMNS = {
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "per_s": "per second",
    "cpu_ms": "CPU ms",
    "cpu_api_ms": "of the API",
    "cpu_worker_ms": "of the worker",
    "cpu_redis_ms": "of Redis",
}
_TEXT = """# Load

What the service itself costs, beside the work of its models: jobs whose worker does nothing, measured by
`python -m benchmarks.load` ({command}) on {machine}, Python {python}, Redis {redis_server}, {date}. Everything, the
client too, shares these cores. Load average before and after: {load}. Medians of {rounds} rounds of {seconds:g} s
each, after {warm_up} requests of warm-up. This page is written by the script from `benchmarks/results/load.json`.

A **durable no-op** is `POST /generate` that waits for its answer: read, checked, written to the append-only file with
`appendfsync always`, claimed by a worker process, ended, and its record answered. A latent is `POST /upscale` with
float16 values that come back as as many bytes. CPU is the processor time of all processes of the server, Redis and
worker included, for one request.

## Aims

{aims}

## Giantleap

{ours}

## Overload

{overload}
{peers}"""
_PEERS = """
## Beside other servers

The same client, the same machine, in turn in one run: {versions}. They keep a request in memory: one that was
accepted is lost when the process dies, where Giantleap has it on disk. The ratio of p50 is theirs over ours, that of
requests per second ours over theirs: above 1 Giantleap is ahead.

{table}
"""


def to_markdown(report: dict[str, Any]) -> str:
    """The page as Markdown."""
    ours = report["medians"]["giantleap"]
    columns = {name: title for name, title in _COLUMNS.items() if name in next(iter(ours.values()))}
    rows = [[_run_name(run), *(found[name] for name in columns)] for run, found in ours.items()]
    aims = [
        [name, each["aim"], each["reached"], "yes" if each["met"] else "no"] for name, each in report["aims"].items()
    ]
    before, after = (
        ", ".join(f"{value:.1f}" for value in report[f"load_average_{when}"]) for when in ("before", "after")
    )
    return _TEXT.format(
        machine=report["machine"],
        python=report["python"],
        redis_server=report["redis_server"],
        date=report["date"][:10],
        load=f"{before} and {after}",
        rounds=report["rounds"],
        seconds=report["seconds"],
        warm_up=report["warm_up"],
        command="with `--peers`" if report["peers"] else "without peers",
        aims=_table(["", "aim", "reached", "met"], aims),
        ours=_table(["", *columns.values()], rows),
        overload=_overload(report["overload"]),
        peers=_peers(report) if report["peers"] else "",
    )


def _overload(found: dict[str, Any]) -> str:
    return (
        f"{found['workers']} workers of {found['work_ms']:g} ms a job, give or take "
        f"{100 * found['work_spread']:.0f} %, end {found['capacity_per_s']:g} jobs a second; "
        f"{found['offered_per_s']:g} a second were offered, with a queue limit of {found['queue_limit']}.\n\n"
        + _table(
            ["", "p50 ms", "p99 ms"],
            [
                ["one client, no other load", found["unloaded_p50_ms"], found["unloaded_p99_ms"]],
                ["accepted under overload", found["accepted_p50_ms"], found["accepted_p99_ms"]],
            ],
        )
        + f"\n\nThe ratio of the two p99 is {found['p99_ratio']:.2f}. {100 * found['refused_share']:.1f} % were "
        f"refused with 429, all {found['refusals_with_retry_after']} of them with a whole number in `Retry-After`."
    )


def _peers(report: dict[str, Any]) -> str:
    medians = report["medians"]
    ours = medians["giantleap"]
    rows = []
    for name in report["peers"]:
        for run, found in medians[name].items():
            ratio, faster = found["p50_ms"] / ours[run]["p50_ms"], ours[run]["per_s"] / found["per_s"]
            figures = [found["p50_ms"], found["p99_ms"], found["per_s"], found["cpu_ms"]]
            rows.append([_NAMES[name], _run_name(run), *figures, f"{ratio:.2f}", f"{faster:.2f}"])
    versions = ", ".join(f"{_NAMES[name]} {version}" for name, version in report["peers"].items())
    header = ["", "", "p50 ms", "p99 ms", "per second", "CPU ms", "ratio of p50", "ratio per second"]
    return _PEERS.format(versions=versions, table=_table(header, rows))


def _run_name(run: str) -> str:
    what, _, clients = run.partition(", ")
    return f"{what}, {clients} client{'s' if clients != '1' else ''}" if clients else f"latent of {what}, 1 client"


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in line) + " |"
        for line in lines
    )
