"""The table of `giantleap bench paper`: our seconds and the paper's, each also over those of LUA.

Ref: arXiv 2511.10629, Table 1: SDXL on one H100 at 2048 and 4096 px, which are scales 2 and 4.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from giantleap.models.bundle.descriptor import METHODS, Method

PAPER_S: Mapping[float, Mapping[Method, float]] = {
    2: {"hidiffusion": 4.97, "demofusion": 28.99, "lsrna": 20.77, "direct": 7.23, "swinir": 6.29, "lua": 3.52},
    4: {"hidiffusion": 122.62, "demofusion": 225.77, "lsrna": 91.64, "direct": 148.71, "swinir": 7.29, "lua": 6.87},
}
_COLUMNS = (
    *("scale", "method", "image px", "generate s", "upscale s", "decode s"),
    *("total s", "over lua", "paper s", "over lua", "peak MB"),
)


def to_markdown(cells: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """The measured cells as a page: conditions, one table, what is not comparable.

    Args:
        cells: Records of `giantleap.cli.paper.measure.measure_cell`.
        conditions: What all of them share.
        machine: Device and versions.
    """
    ordered = sorted(cells, key=lambda cell: (cell["scale"], METHODS.index(cell["method"])))
    totals = {(cell["scale"], cell["method"]): cell["median_s"]["total"] for cell in ordered}
    lines = [
        f"# Methods of bundle {conditions['bundle']}",
        "",
        f"Batch 1, {conditions['steps']} steps, guidance {conditions['guidance_scale']:g}, {conditions['warmups']} "
        f"warm-ups, then the median of {conditions['runs']} runs; {', '.join(f'{k} {v}' for k, v in machine.items())}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
        *(_row(cell, totals) for cell in ordered),
        "",
        "`paper s` is Table 1 of arXiv 2511.10629: SDXL on one H100. Compare the two columns `over lua`, not seconds. "
        "`lsrna` has LUA in place of its own enlarger. FID, KID and CLIP are not measured here. The peak of a process "
        "(process_rss) counts all that ran before.",
        "",
    ]
    return "\n".join(lines)


def _row(cell: Mapping[str, Any], totals: Mapping[tuple[float, str], float]) -> str:
    scale, method, stages_s = cell["scale"], cell["method"], cell["median_s"]
    paper_s = PAPER_S.get(scale, {})
    values = [
        f"x{scale:g}",
        method,
        cell["image_px"],
        *(
            f"{stages_s[stage]:.3f}" if stage in stages_s else ""
            for stage in ("generate", "upscale", "decode", "total")
        ),
        _ratio(stages_s["total"], totals.get((scale, "lua"))),
        f"{paper_s[method]:.2f}" if method in paper_s else "",
        _ratio(paper_s.get(method), paper_s.get("lua")),
        f"{cell['peak_bytes'] / 1e6:.0f} {cell['peak_source']}",
    ]
    return f"| {' | '.join(values)} |"


def _ratio(value_s: float | None, lua_s: float | None) -> str:
    return "" if value_s is None or not lua_s else f"{value_s / lua_s:.2f}"
