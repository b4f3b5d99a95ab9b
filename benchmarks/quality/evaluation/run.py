"""Evaluate the pocket bundle on the six held-out photographs, as `giantleap train evaluate` does.

`python -m benchmarks.quality.evaluation` writes `benchmarks/results/evaluation.json`; the report, the sheet and the
plots of distributions go to `out/evaluation`. LPIPS, FID, KID and CLIP score are measured where the weights of their
networks are given, and listed as not available where not.
"""

import json
import tempfile
from pathlib import Path

import torch
import typer
from PIL import Image

from benchmarks.quality.photos import read_photos
from giantleap.training.evaluation.evaluate import EvaluateConfig, evaluate
from giantleap.training.evaluation.feature_extractors import open_networks
from giantleap.training.evaluation.metrics import to_levels
from giantleap.training.evaluation.report import to_markdown


def write_photos(folder: Path) -> None:
    """Write the photographs as PNG files, lossless."""
    for name, photo in read_photos().items():
        Image.fromarray(to_levels(photo)[0].permute(1, 2, 0).numpy()).save(folder / f"{name}.png")


def run(
    bundle: Path,
    out: Path,
    report: Path,
    inception: Path | None,
    lpips: Path | None,
    clip: str | None,
    patch_px: int,
    threads: int,
) -> None:
    """Measure, print, write the JSON."""
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder))
        config = EvaluateConfig(bundle, report, images=Path(folder), patch_px=patch_px)
        results = evaluate(config, device, open_networks(inception, lpips, clip, device))
    typer.echo(to_markdown(results))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
