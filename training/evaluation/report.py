"""Write the Markdown report, the sheet of pictures and the plots of an evaluation."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from giantleap.training.evaluation.distributions import Floats, Pool, density, grid_over

PACKAGES = ("torch", "torchmetrics", "diffusers", "numpy", "pillow")
METRICS = {
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "clip_score": "CLIP",
    "fid": "FID",
    "kid": "KID",
    "patch_fid": "patch FID",
    "patch_kid": "patch KID",
}
CELL_PX = 256
HEAD_PX = 18
PLOT_PX = (460, 280)
MARGIN_PX = (12, 22, 12, 18)  # left, top, right, bottom
COLORS = {"target": "#000000", "small": "#1f77b4", "bicubic latent": "#ff7f0e", "bicubic pixels": "#1f77b4"}
OTHERS = ("#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2")


def read_machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the versions."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def to_markdown(report: Mapping[str, Any]) -> str:
    """Format the report as tables; an unavailable metric is a dash with its reason below."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# Evaluation on bundle {report['bundle']}",
        "",
        f"{report['cases']} {report['source']}; {machine['processor']}, {machine['cores']} cores, device "
        f"{machine['device']}, Python {machine['python']}, {versions}; {machine['measured_at']}.",
        "",
        "PSNR and SSIM: RGB in [0, 1] of 8-bit pictures, a border of 2 px left out.",
        "",
        "| scale | method | " + " | ".join(METRICS.values()) + " |",
        "|---|---|" + "---|" * len(METRICS),
    ]
    reasons: dict[str, set[str]] = {}
    for scale, methods in report["scores"].items():
        for method, row in methods.items():
            cells = [_cell(row[name]) for name in METRICS]
            lines.append(f"| {'' if scale == 'x1' else scale} | {method} | " + " | ".join(cells) + " |")
            for name, title in METRICS.items():
                if isinstance(row[name], str):
                    reasons.setdefault(str(row[name]), set()).add(title)
    lines += ["", *(f"- {', '.join(sorted(names))}: {reason.rstrip('.')}." for reason, names in reasons.items())]
    for title, key in (("Latents", "latent_statistics"), ("Pixels", "pixel_statistics")):
        lines += ["", f"## {title} against the true large ones", "", *_gap_table(report[key])]
    return "\n".join(lines) + "\n"


def _cell(value: float | str) -> str:
    return "-" if isinstance(value, str) else f"{value:.4g}"


def _gap_table(gaps: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = [
        "| | Wasserstein-1 | of means | of deviations | JSD, bits | of means | of deviations | variance gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = ("wasserstein", "wasserstein_means", "wasserstein_deviations", "jsd", "jsd_means", "jsd_deviations")
    for kind, gap in gaps.items():
        cells = [f"{gap[name]:.4f}" for name in names] + [f"{100 * gap['variance_gap']:.1f} %"]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return lines


def write_sheet(rows: Sequence[tuple[str, Mapping[str, Tensor]]], path: Path) -> None:
    """Write one row per case and one column per method: centers of uint8 pictures [1, 3, height_px, width_px]."""
    titles = list(rows[0][1])
    sheet = Image.new("RGB", (len(titles) * CELL_PX, len(rows) * (HEAD_PX + CELL_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate(rows):
        top = row * (HEAD_PX + CELL_PX)
        for column, title in enumerate(titles):
            pen.text((column * CELL_PX + 4, top + 3), f"{name}: {title}" if column == 0 else title, fill="black")
            sheet.paste(_to_cell(pictures[title]), (column * CELL_PX, top + HEAD_PX))
    sheet.save(path, optimize=True)


def _to_cell(picture: Tensor) -> Image.Image:
    height, width = picture.shape[-2:]
    top, left = max(0, (height - CELL_PX) // 2), max(0, (width - CELL_PX) // 2)
    cut = picture[0, :, top : top + CELL_PX, left : left + CELL_PX].permute(1, 2, 0).cpu().contiguous()
    return Image.fromarray(cut.numpy())


def write_distributions(latents: Mapping[str, Pool], pixels: Mapping[str, Pool], scale: int, path: Path) -> None:
    """Plot densities of the pooled means and deviations at one scale, latents above pixels (figure 10 of the paper)."""
    sheet = Image.new("RGB", (2 * PLOT_PX[0], 2 * PLOT_PX[1]), "white")
    for row, (domain, pools) in enumerate((("latents", latents), ("pixels", pixels))):
        prefix = f"x{scale} "
        shown = {kind.removeprefix(prefix): p for kind, p in pools.items() if kind == "target" or prefix in kind}
        for column, part in enumerate(("means", "deviations")):
            curves = {kind: getattr(each, part).ravel() for kind, each in shown.items()}
            plot = draw_densities(f"{domain}: {part} of channels, x{scale}", curves)
            sheet.paste(plot, (column * PLOT_PX[0], row * PLOT_PX[1]))
    sheet.save(path, optimize=True)


def draw_densities(title: str, curves: Mapping[str, Floats]) -> Image.Image:
    """Draw one panel with a curve per sample, scaled to the highest."""
    plot = Image.new("RGB", PLOT_PX, "white")
    pen = ImageDraw.Draw(plot)
    left, top, right, bottom = MARGIN_PX
    width, height = PLOT_PX[0] - left - right, PLOT_PX[1] - top - bottom
    grid = grid_over(*curves.values())
    densities = {kind: density(samples, grid) for kind, samples in curves.items()}
    peak = max(float(values.max()) for values in densities.values()) or 1.0
    pen.text((left, 5), title, fill="black")
    pen.line([(left, top + height), (left + width, top + height)], fill="#888888")
    pen.text((left, top + height + 2), f"{grid[0]:.3g}", fill="#555555")
    pen.text((left + width - 40, top + height + 2), f"{grid[-1]:.3g}", fill="#555555")
    others = iter(OTHERS * len(curves))
    xs = left + width * (grid - grid[0]) / (grid[-1] - grid[0])
    for number, (kind, values) in enumerate(densities.items()):
        color = COLORS.get(kind) or next(others)
        ys = top + height * (1.0 - values / peak)
        pen.line([(float(x), float(y)) for x, y in zip(xs, ys, strict=True)], fill=color, width=2)
        pen.text((left + width - 130, top + 4 + 13 * number), kind, fill=color)
    return plot
