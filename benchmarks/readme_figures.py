"""Write the figures of the README, the operations and methods pages and the logs from `benchmarks/results/`.

Run `python -m benchmarks.readme_figures` after a report has changed: it replaces the blocks between the marks. A test
compares pages and reports.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from benchmarks.batching.report import to_markdown
from benchmarks.images import encode
from giantleap.cli.paper.report import PAPER_S
from giantleap.models.bundle.descriptor import METHODS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
OPERATIONS = ROOT / "docs" / "operations.md"
METHODS_PAGE = ROOT / "docs" / "methods.md"
ADAPTER_LOG = ROOT / "docs" / "lab" / "lua-training.md"
ENCODE_LOG = ROOT / "docs" / "lab" / "encode.md"
_END = "<!-- end -->\n"


def to_blocks(results: Path) -> dict[str, str]:
    """Return the Markdown block for each mark of the README.

    Args:
        results: Directory with `methods.json`, `load.json`, `chaos.json` and `pocket_quality.json`.
    """
    reports = {name: _read(results / f"{name}.json") for name in ("methods", "load", "chaos", "pocket_quality")}
    return {
        "figures": to_summary(reports["methods"], reports["load"], reports["chaos"], reports["pocket_quality"]),
        "pocket_quality": to_quality_table(reports["pocket_quality"]),
    }


def to_operations_blocks(results: Path) -> dict[str, str]:
    """Return the blocks of `docs/operations.md`: the chosen number of threads compared with one, and batch sizes.

    Args:
        results: Directory with `threads.json` and `batching.json`.
    """
    batching = to_markdown(_read(results / "batching.json"))
    return {"threads": to_thread_line(_read(results / "threads.json")), "batching": batching}


def to_thread_line(report: Mapping[str, Any]) -> str:
    """Return the line that compares the chosen number of threads with one."""
    parts = []
    for row in report["results"]:
        where = f" beside {row['busy_loops']} busy loops" if row["busy_loops"] else ""
        chosen_s, one_s = (row["median_s"][rule] for rule in ("chosen", "one thread"))
        parts.append(f"`{row['command']}`{where} {chosen_s:.1f} s, with one thread {one_s:.1f} s")
    machine = report["machine"]
    where = f"On {machine['cores']} cores at load {machine['load_1min']:.0f}"
    return f"{where} (`python -m benchmarks.threads`): {'; '.join(parts)}.\n"


def to_method_blocks(results: Path) -> dict[str, str]:
    """Return the block of `docs/lab/lua-training.md`: the methods by three metrics.

    Args:
        results: Directory with `pocket_quality.json`.
    """
    return {"pocket_methods": to_method_table(_read(results / "pocket_quality.json"))}


def to_paper_blocks(results: Path) -> dict[str, str]:
    """Return the block of `docs/methods.md`: `giantleap bench paper` beside the paper.

    Args:
        results: Directory with `paper.json`.
    """
    return {"paper": to_paper_table(_read(results / "paper.json"))}


def to_encode_blocks(results: Path) -> dict[str, str]:
    """Return the block of `docs/lab/encode.md`: how image files are written.

    Args:
        results: Directory with `encode.json`.
    """
    return {"encode": encode.to_markdown(_read(results / "encode.json"))}


def to_summary(
    methods: Mapping[str, Any], load: Mapping[str, Any], chaos: Mapping[str, Any], quality: Mapping[str, Any]
) -> str:
    """Return the table of the main figures, each with its command or report."""
    lua, direct = (_stages_s(methods, method, 4) for method in ("lua", "direct"))
    cores = methods["machine"]["cores"]
    gains_db = {floor["name"]: floor["value"] for floor in quality["floors"] if floor["unit"] == "dB"}
    service = load["medians"]["giantleap"]
    kills = sum(number for run in chaos.values() for what, number in run["harm_done"].items() if "kills" in what)
    lost = sum(run["faults"]["lost"] + run["faults"]["accepted_twice"] for run in chaos.values())
    over_resizing = " and ".join(
        f"{gains_db[f'photographs x{scale}: LUA over resizing']:+.2f} dB (x{scale})" for scale in (2, 4)
    )
    jobs = sum(run["jobs_accepted"] for run in chaos.values())
    rows = [
        (
            "generate at 128 px, upscale to 512 px, decode",
            f"{lua['total']:.2f} s, adapter {1000 * lua['upscale']:.0f} ms of it; base model at 512 px: "
            f"{direct['total']:.2f} s",
            f"pocket bundle, {cores} CPU cores, `python -m benchmarks.methods`",
        ),
        (
            "pocket adapter on photographs",
            f"{over_resizing} over decoding and resizing (bicubic), at a compression of 2:1",
            "PSNR, `make quality`, [below](#the-pocket-bundle)",
        ),
        (
            "overhead of the service per request",
            f"{service['no-op, 1']['p50_ms']:.1f} ms (median) with a durable write; "
            f"{service['no-op, 8']['per_s']:.0f} requests/s from 8 clients",
            "[docs/load.md](docs/load.md), beside LitServe, BentoML and Ray Serve",
        ),
        (
            f"{jobs:,} jobs through {kills} kills of workers, Redis and S3",
            f"{lost} lost or ended twice",
            "`make chaos`",
        ),
    ]
    return _table(("figure", "measured", "how"), rows)


def to_quality_table(report: Mapping[str, Any]) -> str:
    """Return the table of the pocket bundle's figures and targets."""
    rows = [
        (
            f"{floor['name']}, {floor['unit']}",
            f"{floor['value']:.{_DIGITS[floor['unit']]}f}" + ("" if floor["is_met"] else " **missed**"),
            f"{floor['floor']:g}",
        )
        for floor in report["floors"]
    ]
    return _table(("figure", "reached", "target"), rows)


def to_method_table(report: Mapping[str, Any]) -> str:
    """Return the table that compares the methods by three metrics, and JOD where it was measured."""
    photos, scenes = report["photos"]["mean"], report["scenes"]
    sets = {f"photographs x{scale}": photos[f"x{scale}"] for scale in (2, 4)}
    sets |= {f"{kind} x{scale}": scenes[kind][f"x{scale}"]["mean"] for kind in scenes for scale in (2, 4)}
    digits = {"psnr_db": 2, "ms_ssim": 4, "flip": 4, "jod": 2}
    titles = {"psnr_db": "PSNR in dB", "ms_ssim": "MS-SSIM", "flip": "FLIP", "jod": "JOD"}
    measured = [name for name in titles if name in photos["x2"]["lua"]]
    rows = [
        (name, *(" / ".join(f"{row[metric]:.{digits[metric]}f}" for metric in measured) for row in each))
        for name, scores in sets.items()
        for each in [[scores[method] for method in ("lua", "resized", "swinir")]]
    ]
    return _table((" / ".join(titles[name] for name in measured), "`lua`", "decode, then bicubic", "`swinir`"), rows)


def to_paper_table(report: Mapping[str, Any]) -> str:
    """Return a row per method: its time over that of LUA, ours and the paper's, and what it keeps of the base image."""
    cells = {(cell["method"], cell["scale"], cell["is_refined"]): cell for cell in report["cells"]}
    methods = [method for method in METHODS if (method, 2, False) in cells]
    columns = {"method": [f"`{method}`" for method in methods]}
    for scale, paper_s in PAPER_S.items():
        lua_s = cells["lua", scale, False]["median_s"]["total"]
        for title, is_refined in (("", False), (" refined", True)):
            found = [cells.get((method, scale, is_refined)) for method in methods]
            ratios = [None if cell is None else cell["median_s"]["total"] / lua_s for cell in found]
            columns[f"x{scale:g}{title}"] = [_number(ratio, 2) for ratio in ratios]
        published = [paper_s[method] / paper_s["lua"] if method in paper_s else None for method in methods]
        columns[f"x{scale:g} paper"] = [_number(ratio, 2) for ratio in published]
    rows = [cells[method, 2, False]["scores"] for method in methods]
    columns["x2 PSNR/FLIP/JOD"] = [
        "/".join(_number(scores[f"base_{name}"], digits) for name, digits in _TO_BASE.items()) for scores in rows
    ]
    return _table(tuple(columns), list(zip(*columns.values(), strict=True)))


def _number(value: float | str | None, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else "-"


_TO_BASE = {"psnr_db": 1, "flip": 3, "jod": 1}
_DIGITS = {"dB": 2, "%": 1}


def _stages_s(methods: Mapping[str, Any], method: str, scale: int) -> dict[str, float]:
    """Return the median seconds of each stage."""
    (result,) = (row for row in methods["results"] if (row["method"], row["scale"]) == (method, scale))
    return {name: times["median_s"] for name, times in result["stages"].items()}


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(line)} |\n" for line in (head, *rows)]
    return "".join([lines[0], "|---" * len(head) + "|\n", *lines[1:]])


def _read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def put_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """Replace each block between its mark and the next end."""
    for name, block in blocks.items():
        mark = f"<!-- benchmarks.readme_figures: {name} -->\n"
        before, rest = text.split(mark)
        text = before + mark + block + _END + rest.split(_END, 1)[1]
    return text


def main() -> None:
    """Update the pages."""
    README.write_text(put_blocks(README.read_text(), to_blocks(RESULTS)))
    OPERATIONS.write_text(put_blocks(OPERATIONS.read_text(), to_operations_blocks(RESULTS)))
    METHODS_PAGE.write_text(put_blocks(METHODS_PAGE.read_text(), to_paper_blocks(RESULTS)))
    ADAPTER_LOG.write_text(put_blocks(ADAPTER_LOG.read_text(), to_method_blocks(RESULTS)))
    ENCODE_LOG.write_text(put_blocks(ENCODE_LOG.read_text(), to_encode_blocks(RESULTS)))


if __name__ == "__main__":
    typer.run(main)  # so that --help measures and writes nothing
