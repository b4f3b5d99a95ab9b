"""Evaluate the pocket bundle on the six held-out photographs, as `giantleap train evaluate` does.

`python -m benchmarks.quality.evaluation` writes `benchmarks/results/evaluation.json`; the report, the sheet and the
plots of distributions go to `out/evaluation`. LPIPS, FID, KID and CLIP score are measured where the weights of their
networks are given, and listed as not available where not.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated

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


def main(
    bundle: Annotated[Path, typer.Option(help="Bundle directory.")] = Path("bundles/pocket"),
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/evaluation.json"),
    report: Annotated[Path, typer.Option(help="Where report, sheet and plots go.")] = Path("out/evaluation"),
    inception: Annotated[Path | None, typer.Option(help="Weights of torch-fidelity's Inception.")] = None,
    lpips: Annotated[Path | None, typer.Option(help="Weights of torchvision's AlexNet.")] = None,
    clip: Annotated[str | None, typer.Option(help="Directory or hub id of a CLIP.")] = None,
    patch_px: Annotated[int, typer.Option(min=1, help="Side of the crops of patch FID and KID.")] = 256,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
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


if __name__ == "__main__":
    typer.run(main)
