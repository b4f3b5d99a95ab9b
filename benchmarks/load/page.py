"""Write `docs/load.md` from the report of `benchmarks.load`."""

from collections.abc import Iterator
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

Overhead of the service without the work of its models, measured by `python -m benchmarks.load` ({command}) on
{machine}, Python {python}, Redis {redis_server}, {date}. Client and server share the cores. Load average before and
after: {load}. Medians of {rounds} rounds of {seconds:g} s, after {warm_up} warm-up requests. Generated from
`benchmarks/results/load.json`.

A **durable no-op** is a waiting `POST /generate`: parsed, written with `appendfsync always`, claimed and completed by a
worker process, returned. A latent is `POST /upscale` in float16 with as many bytes back{store}. CPU is the
processor time per request of all server processes, Redis and worker included.

## Targets

Ratios of one run, since machines differ. Beside a peer, above 1 Giantleap is faster. Missed by: the distance to
the target, as a part of it.

{aims}

## Giantleap

{ours}

## Overload

{refusals}{overload}
{peers}"""
_PEERS = """
## Beside other servers

Same client, same machine, in turns: {versions}. They keep requests in memory, so an accepted request is lost when the
process dies; Giantleap has it on disk. Ratios above 1 mean that Giantleap is faster.

{table}
"""


def to_markdown(report: dict[str, Any]) -> str:
    """Return the page."""
    ours = report["medians"]["giantleap"]
    columns = {name: title for name, title in _COLUMNS.items() if name in next(iter(ours.values()))}
    rows = [[_run_name(run), *(figures[name] for name in columns)] for run, figures in ours.items()]
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
        store=", results and inputs from 512 KiB in files" if report.get("result_store") == "file" else "",
        command="with `--peers`" if report["peers"] else "without peers",
        aims=_table(["", "target", "reached", "missed by"], [_judge(*aim) for aim in _aims(report)]),
        ours=_table(["", *columns.values()], rows),
        refusals=_refusals(report["refusals"]) if "refusals" in report else "",
        overload=_overload(_overloads(report)),
        peers=_peers(report) if report["peers"] else "",
    )


def _aims(report: dict[str, Any]) -> Iterator[tuple[str, float, str, float]]:
    """The name, the reached value, the sign and the value of every target; none of what the report did not measure."""
    for name in report["peers"]:
        ratios = {run: _ratios(report, name, run) for run in report["medians"][name]}
        if name == "litserve":
            yield "p50 of a no-op at 1 client beside LitServe", ratios["no-op, 1"][0], ">=", 0.5
            yield "no-ops per second at 8 clients beside LitServe", ratios["no-op, 8"][1], ">=", 0.9
            yield "p50 of a 512 KiB latent beside LitServe", ratios["512 KiB"][0], ">=", 1.0
        else:
            run, which = min(((run, which) for run in ratios for which in (0, 1)), key=lambda at: ratios[at[0]][at[1]])
            figure = f"{('p50', 'per second')[which]}, {_run_name(run)}"
            yield f"smallest ratio beside {_NAMES[name]} ({figure})", ratios[run][which], ">=", 1.0
    if "refusals" in report:
        yield "processor time of a refused request over an accepted one, API", report["refusals"]["ratio"], "<=", 0.1
    for figures, where in _overloads(report):
        yield f"accepted p99 under overload over unloaded p99{where}", figures["p99_ratio"], "<=", 2.0


def _judge(name: str, reached: float, sign: str, aim: float) -> list[str]:
    missed = (reached - aim if sign == "<=" else aim - reached) / aim
    return [name, f"{sign} {aim:g}", f"{reached:.3g}", f"{100 * missed:.0f} %" if missed > 0 else "met"]


def _ratios(report: dict[str, Any], name: str, run: str) -> tuple[float, float]:
    """How many times as fast as a peer Giantleap is: by p50 and by requests per second."""
    peer, ours = report["medians"][name][run], report["medians"]["giantleap"][run]
    return peer["p50_ms"] / ours["p50_ms"], ours["per_s"] / peer["per_s"]


def _overloads(report: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    runs = [(report["overload"], "")]
    return runs + ([(report["overload_pinned"], ", all on one core")] if "overload_pinned" in report else [])


def _refusals(figures: dict[str, Any]) -> str:
    return (
        f"An accepted no-op takes {figures['accepted_api_ms']:.3f} ms of processor time of the API, a refused one "
        f"{figures['refused_api_ms']:.3f} ms: a ratio of {figures['ratio']:.3f}, both with {figures['clients']} "
        f"clients ({figures['accepted']} and {figures['refused']} requests).\n\n"
    )


def _overload(runs: list[tuple[dict[str, Any], str]]) -> str:
    figures = runs[0][0]
    times = f", medians of {figures['repetitions']} repetitions" if "repetitions" in figures else ""
    client_ms = max((each.get("client_ms", 0.0) for each, _ in runs), default=0.0)
    client = f"; the client takes {client_ms:.3f} ms of processor time per request" if client_ms else ""
    rows = [
        [
            f"{figures['workers']} workers{where}",
            *(figures[f"{kind}_{rank}_ms"] for kind in ("unloaded", "accepted") for rank in ("p50", "p99")),
            round(figures["p99_ratio"], 2),
            f"{100 * figures['refused_share']:.1f} %",
        ]
        for figures, where in runs
    ]
    heads = ["", "unloaded p50 ms", "p99 ms", "accepted p50 ms", "p99 ms", "p99 ratio", "refused"]
    return (
        f"Workers take {figures['work_ms']:g} ms per job, ± {100 * figures['work_spread']:.0f} %, and complete "
        f"{figures['capacity_per_s']:g} jobs/s; {figures['offered_per_s']:g} were offered, with a queue limit of "
        f"{figures['queue_limit']}{times}. Every refusal is a 429 with an integer `Retry-After`. A time starts when "
        f"its request was due{client}.\n\n{_table(heads, rows)}"
    )


def _peers(report: dict[str, Any]) -> str:
    medians = report["medians"]
    rows = []
    for name in report["peers"]:
        for run, figures in medians[name].items():
            ratio, faster = _ratios(report, name, run)
            figures = [figures["p50_ms"], figures["p99_ms"], figures["per_s"], figures["cpu_ms"]]
            rows.append([_NAMES[name], _run_name(run), *figures, f"{ratio:.2f}", f"{faster:.2f}"])
    versions = ", ".join(f"{_NAMES[name]} {version}" for name, version in report["peers"].items())
    header = ["", "", "p50 ms", "p99 ms", "per second", "CPU ms", "ratio of p50", "ratio per second"]
    return _PEERS.format(versions=versions, table=_table(header, rows))


def _run_name(run: str) -> str:
    what, _, clients = run.partition(", ")
    return f"{what}, {clients} client{'s' if clients != '1' else ''}" if clients else f"latent of {what}, 1 client"


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [
        "| " + " | ".join(f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in line) + " |"
        for line in (header, *rows)
    ]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])
