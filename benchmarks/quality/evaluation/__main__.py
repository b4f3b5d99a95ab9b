"""`python -m benchmarks.quality.evaluation`: the options; `run.py`, beside it, loads torch."""

from pathlib import Path
from typing import Annotated

import typer


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
    from benchmarks.quality.evaluation.run import run

    run(bundle, out, report, inception, lpips, clip, patch_px, threads)


if __name__ == "__main__":
    typer.run(main)
