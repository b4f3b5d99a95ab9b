"""The tables of `giantleap bench paper`: our figures and the paper's, seconds also over those of LUA.

Ref: arXiv 2511.10629, Table 1: SDXL on one H100 at 1024, 2048 and 4096 px, which are scales 1, 2 and 4.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from giantleap.models.bundle.descriptor import METHODS, Method

PAPER_S: Mapping[float, Mapping[Method, float]] = {
    2: {"hidiffusion": 4.97, "demofusion": 28.99, "lsrna": 20.77, "direct": 7.23, "swinir": 6.29, "lua": 3.52},
    4: {"hidiffusion": 122.62, "demofusion": 225.77, "lsrna": 91.64, "direct": 148.71, "swinir": 7.29, "lua": 6.87},
}
PAPER_SCORES: Mapping[float, Mapping[Method, tuple[float, float, float, float, float]]] = {
    1: {"direct": (194.53, 192.71, 0.0151, 0.0225, 0.731)},
    2: {
        "hidiffusion": (200.72, 114.30, 0.0030, 0.0090, 0.738),
        "demofusion": (184.79, 177.67, 0.0030, 0.0100, 0.750),
        "lsrna": (181.24, 98.09, 0.0019, 0.0066, 0.762),
        "direct": (202.87, 116.57, 0.0030, 0.0086, 0.741),
        "swinir": (183.16, 100.09, 0.0020, 0.0077, 0.757),
        "lua": (180.80, 97.90, 0.0018, 0.0065, 0.764),
    },
    4: {
        "hidiffusion": (233.65, 95.95, 0.0158, 0.0214, 0.698),
        "demofusion": (185.36, 177.89, 0.0043, 0.0113, 0.749),
        "lsrna": (177.95, 62.07, 0.0023, 0.0071, 0.757),
        "direct": (280.42, 101.89, 0.0396, 0.0175, 0.663),
        "swinir": (183.15, 65.71, 0.0018, 0.0103, 0.756),
        "lua": (176.90, 61.80, 0.0015, 0.0152, 0.759),
    },
}
_IN_PAPER = ("fid", "patch_fid", "kid", "patch_kid", "clip_score")
_SCORES = {
    "fid": ("FID", 2),
    "patch_fid": ("patch FID", 2),
    "kid": ("KID", 4),
    "patch_kid": ("patch KID", 4),
    "clip_score": ("CLIP", 2),
    "base_psnr_db": ("PSNR, dB", 2),
    "base_ms_ssim": ("MS-SSIM", 4),
    "base_flip": ("FLIP", 4),
    "base_jod": ("JOD", 2),
}
_STAGES = ("generate", "upscale", "refine", "decode", "total")
_COLUMNS = (
    *("scale", "method", "image px", *(f"{stage} s" for stage in _STAGES)),
    *("over lua", "paper s", "over lua", "peak MB"),
)


def to_markdown(cells: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> str:
    """The measured cells as a page: conditions, times, scores, and limits of the comparison.

    Args:
        cells: Records of `giantleap.cli.paper.measure`, at least one.
        machine: Device and versions.
    """
    ordered = sorted(cells, key=lambda cell: (cell["scale"], METHODS.index(cell["method"]), cell["is_refined"]))
    totals = {(cell["scale"], cell["method"], cell["is_refined"]): cell["median_s"]["total"] for cell in ordered}
    conditions = ordered[0]["conditions"]
    passes = {cell["conditions"]["refine"] for cell in ordered} - {""}
    refine = "".join(f", refine pass {each} (strength:steps)" for each in passes)
    lines = [
        f"# Methods of bundle {conditions['bundle']}",
        "",
        f"Batch 1, {conditions['steps']} steps, guidance {conditions['guidance_scale']:g}{refine}, "
        f"{conditions['warmups']} warm-ups, then the median of {conditions['runs']} runs; device "
        f"{conditions['device']}, {', '.join(f'{k} {v}' for k, v in machine.items())}.",
        "",
        *_table(_COLUMNS, [_times(cell, totals) for cell in ordered]),
        "",
        "`paper s` is Table 1 of arXiv 2511.10629: SDXL on one H100. Compare the two columns `over lua`, not seconds. "
        "`lsrna` has LUA in place of its own enlarger. A refined image shares the generation of the plain one; for "
        "`swinir` its `refine s` includes encoding the pixels. The peak of a process (process_rss) counts all that ran "
        "before.",
        "",
        *_table(("scale", "method", *(title for title, _ in _SCORES.values())), [_scores(cell) for cell in ordered]),
        "",
        "FID, KID and CLIP: in parentheses the paper's, over 1,000 photographs; its CLIP score is not times 100. PSNR, "
        "MS-SSIM, FLIP (better when smaller) and JOD say how much of the base image of the same seed is left: the "
        "image is reduced to the base size, and both are compared at twice that.",
        "",
        *_reasons(ordered),
    ]
    return "\n".join(lines)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _name(cell: Mapping[str, Any]) -> str:
    return f"{cell['method']} + refine" if cell["is_refined"] else str(cell["method"])


def _times(cell: Mapping[str, Any], totals: Mapping[tuple[float, str, bool], float]) -> list[str]:
    scale, stages_s = cell["scale"], dict(cell["median_s"])
    if "vae_encode" in stages_s:
        stages_s["refine"] += stages_s["vae_encode"]
    paper_s = {} if cell["is_refined"] else PAPER_S.get(scale, {})
    return [
        f"x{scale:g}",
        _name(cell),
        cell["image_px"],
        *(f"{stages_s[stage]:.3f}" if stage in stages_s else "" for stage in _STAGES),
        _ratio(stages_s["total"], totals.get((scale, "lua", False))),
        f"{paper_s[cell['method']]:.2f}" if cell["method"] in paper_s else "",
        _ratio(paper_s.get(cell["method"]), paper_s.get("lua")),
        f"{cell['peak_bytes'] / 1e6:.0f} {cell['peak_source']}",
    ]


def _ratio(value_s: float | None, lua_s: float | None) -> str:
    return "" if value_s is None or not lua_s else f"{value_s / lua_s:.2f}"


def _scores(cell: Mapping[str, Any]) -> list[str]:
    paper = () if cell["is_refined"] else PAPER_SCORES.get(cell["scale"], {}).get(cell["method"], ())
    published = dict(zip(_IN_PAPER, paper, strict=False))
    row = [f"x{cell['scale']:g}", _name(cell)]
    for name, (_, digits) in _SCORES.items():
        value = cell["scores"][name]
        text = "not available" if isinstance(value, str) else f"{value:.{digits}f}"
        row.append(f"{text} ({published[name]})" if name in published else text)
    return row


def _reasons(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why scores are not available, each reason once."""
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        for name, (title, _) in _SCORES.items():
            if isinstance(cell["scores"][name], str) and title not in reasons.setdefault(cell["scores"][name], []):
                reasons[cell["scores"][name]].append(title)
    return [f"- {', '.join(titles)}: {reason}." for reason, titles in reasons.items()] + [""]
