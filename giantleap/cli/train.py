"""`giantleap train prepare, run, transfer ...`: train a LUA for the VAE of your base model on your photographs.

`giantleap.cli.main` mounts these commands. Torch and what imports it are imported inside them. To use several
processes: `torchrun --nproc-per-node 2 -m giantleap.cli.main train run ...`, and the same for `prepare`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from giantleap.cli.options import stop
from giantleap.models.bundle.bundle import BundleError

if TYPE_CHECKING:
    import torch

app = typer.Typer(no_args_is_help=True, help="Train a LUA for the VAE of a bundle (docs/training.md).")

DIVERGED = 3
"""Exit code of a run whose loss was not finite: resume it from its last checkpoint with another configuration."""

DeviceOption = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:N or auto; under torchrun each process takes its own GPU.")
]
PrecisionOption = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Type that the VAE computes in.")]
StoredOption = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the latents on disk.")]


@app.command()
def prepare(
    bundle: Annotated[Path, typer.Option(help="Directory of the bundle whose VAE encodes.")],
    out: Annotated[Path, typer.Option(help="Directory for the pairs; an unfinished one is continued.")],
    source: Annotated[
        Path | None, typer.Argument(help="Folder with pictures and .tar files, or one .tar file.")
    ] = None,
    hf_dataset: Annotated[
        str | None, typer.Option(help="Instead of a folder: a data set on the hub, or its path.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    image_column: Annotated[str, typer.Option(help="Image column of the data set.")] = "image",
    hf_config: Annotated[str | None, typer.Option(help="Configuration of a data set that has several.")] = None,
    hf_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a data set on the hub.")] = None,
    min_side_px: Annotated[int, typer.Option(min=1, help="Skip pictures with a shorter side.")] = 1440,
    tile_px: Annotated[int, typer.Option(min=1, help="Side of a tile.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Tiles encoded at once.")] = 8,
    pictures_per_shard: Annotated[int, typer.Option(min=1, help="Pictures that an interruption costs at most.")] = 64,
    store: StoredOption = "float32",
    precision: PrecisionOption = "float32",
    device: DeviceOption = "auto",
) -> None:
    """Cut photographs into tiles, downscale and encode them to latents; a second run resumes an interrupted one."""
    import torch

    from giantleap.training.data.hf_source import HubSource
    from giantleap.training.data.pairs_store import PairsError
    from giantleap.training.data.prepare import PrepareConfig, count_skipped
    from giantleap.training.data.prepare import prepare as make_pairs

    if (source is None) == (hf_dataset is None):
        stop("give either a folder or .tar file, or --hf-dataset, not both")
    pictures = source or HubSource(hf_dataset or "", split, image_column, hf_config, hf_revision)
    config = PrepareConfig(pictures, bundle, out, min_side_px, tile_px, batch, pictures_per_shard, store)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    try:
        report = make_pairs(config, _own_device(device), dtype, rank, world_size)
    except (BundleError, PairsError, OSError, ValueError) as error:
        stop(str(error))
    for line in report.skipped:
        if line["skipped"] == "corrupt":
            typer.echo(f"skipped {line['source']}: {line['why']}", err=True)
    counts = count_skipped(report)
    typer.echo(
        f"process {rank} of {world_size}: {report.pictures} pictures, {report.tiles} tiles in {report.spent_s:.1f} s, "
        f"{report.tiles_per_s:.2f} tiles/s; skipped {counts['corrupt']} corrupt, {counts['small']} small"
    )
    if report.is_finished:
        typer.echo(f"pairs are in {out}")
    else:
        typer.echo("other processes are still writing shards; the last one writes the index")


@app.command()
def run(
    config: Annotated[Path, typer.Option(help="TOML file; docs/training.md names every key.")],
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    resume: Annotated[bool, typer.Option(help="Resume from the last checkpoint in --out, if there is one.")] = False,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Stop after this many updates.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Train all stages; interrupt it at any time and continue with --resume."""
    from giantleap.training.curriculum import read_config
    from giantleap.training.run import open_distributed_context, train

    with _one_line_errors():
        plan = read_config(config)
        with open_distributed_context(_own_device(device)) as place:
            written = train(plan, out, place, resume=resume, stop_after=stop_after)
    if place.is_first:
        typer.echo(f"wrote {written}")


@app.command()
def transfer(
    source: Annotated[Path, typer.Option("--from", help="Bundle directory with LUA weights, or a file of them.")],
    to_bundle: Annotated[Path, typer.Option(help="Directory of the bundle with the other VAE.")],
    pairs: Annotated[Path, typer.Option(help="Pairs of the other VAE, as `prepare` writes them.")],
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    start: Annotated[
        Literal["fit", "slice", "fresh"],
        typer.Option(
            help="New first and last layers: fitted through both VAEs (needs --from a bundle), copied, or untrained."
        ),
    ] = "fit",
    config: Annotated[
        Path | None, typer.Option(help="TOML file as for `run`, without bundle, pairs and lua; by default a short run.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Resume from the last checkpoint in --out, if there is one.")] = False,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Stop after this many updates.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Adapt weights to another VAE: replace the first and last convolutions, then fine-tune."""
    from giantleap.training.run import open_distributed_context
    from giantleap.training.transfer import transfer_and_train

    with _one_line_errors(), open_distributed_context(_own_device(device)) as place:
        written = transfer_and_train(
            source, to_bundle, pairs, out, place, start=start, config=config, resume=resume, stop_after=stop_after
        )
    if place.is_first:
        typer.echo(f"wrote {written}")


@app.command()
def statistics(
    lua: Annotated[Path, typer.Option(help="Weights without statistics, in any supported layout.")],
    pairs: Annotated[Path, typer.Option(help="Pairs of the same VAE, as `prepare` writes them.")],
    out: Annotated[Path, typer.Option(help="File to write, in this project's layout; may be the same.")],
) -> None:
    """Write latent statistics into the header of weights, for `clamp_sigmas`; `run` does so itself."""
    from giantleap.models.lua.released_layouts import CheckpointError
    from giantleap.models.lua.statistics import StatisticsError
    from giantleap.training.data.pairs_store import PairsError, PairsStore
    from giantleap.training.guard_statistics import add_statistics

    try:
        statistics = add_statistics(lua, PairsStore.open(pairs), out)
    except (CheckpointError, PairsError, StatisticsError, OSError) as error:
        stop(str(error))
    typer.echo(f"wrote {out} with statistics of {statistics.tiles} tiles")


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Option(help="Directory of the bundle whose VAE encodes and decodes.")],
    out: Annotated[Path, typer.Option(help="Directory for the report, the sheet and the plots.")],
    images: Annotated[Path | None, typer.Option(help="Folder of pictures; captions in .txt files beside them.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Instead of a folder: pairs as `prepare` writes them.")] = None,
    lua: Annotated[list[Path] | None, typer.Option(help="Weights, repeatable; by default the bundle's.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Weights of torch-fidelity's Inception, for FID, KID.")] = None,
    lpips: Annotated[Path | None, typer.Option(help="Weights of torchvision's AlexNet, for LPIPS.")] = None,
    clip: Annotated[str | None, typer.Option(help="Directory or hub id of a CLIP, for the CLIP score.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Limit of pictures or tiles.")] = None,
    crop_px: Annotated[int | None, typer.Option(min=1, help="Cut pictures to a center square first.")] = None,
    patch_px: Annotated[int, typer.Option(min=1, help="Side of the crops of patch FID and KID.")] = 1024,
    patches: Annotated[int, typer.Option(min=1, help="Crops per picture.")] = 1,
    kid_subsets: Annotated[int, typer.Option(min=1, help="Number of subsets.")] = 100,
    kid_subset_size: Annotated[int, typer.Option(min=2, help="Samples in each.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of crops and subsets.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Compare weights with bicubic upscaling; metrics that cannot be measured are named with the reason."""
    if find_spec("torchmetrics") is None:  # checked before pictures are encoded: metrics come last
        stop('torchmetrics is missing: pip install "giantleap[train]"')
    from giantleap.models.lua.released_layouts import CheckpointError
    from giantleap.models.vae.autoencoder import VaeError
    from giantleap.training.data.pairs_store import PairsError
    from giantleap.training.evaluation.cases import EvaluationError
    from giantleap.training.evaluation.evaluate import EvaluateConfig
    from giantleap.training.evaluation.evaluate import evaluate as measure
    from giantleap.training.evaluation.feature_extractors import open_networks
    from giantleap.training.evaluation.report import to_markdown

    own = _own_device(device)
    config = EvaluateConfig(
        bundle, out, images, pairs, tuple(lua or ()), limit, crop_px, patch_px, patches, kid_subsets, kid_subset_size,
        seed,
    )  # fmt: skip
    try:
        report = measure(config, own, open_networks(inception, lpips, clip, own))
    except ModuleNotFoundError as error:
        stop(f'{error.name} is missing: pip install "giantleap[train]"')
    except (BundleError, CheckpointError, EvaluationError, PairsError, VaeError, OSError) as error:
        stop(str(error))
    typer.echo(to_markdown(report))


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the command with one line where a training cannot start or continue; `DIVERGED` has its own exit code."""
    from giantleap.models.lua.released_layouts import CheckpointError
    from giantleap.models.vae.autoencoder import VaeError
    from giantleap.training.checkpoint import TrainingStateError
    from giantleap.training.curriculum import ConfigError
    from giantleap.training.data.pairs_store import PairsError
    from giantleap.training.run import DivergedError
    from giantleap.training.transfer import TransferError

    try:
        yield
    except DivergedError as error:
        typer.echo(f"giantleap: {error}", err=True)
        raise typer.Exit(DIVERGED) from error
    except (
        BundleError, CheckpointError, ConfigError, PairsError, TrainingStateError, TransferError, VaeError, OSError
    ) as error:  # fmt: skip
        stop(str(error))


def _own_device(name: str) -> "torch.device":
    """The device of this process; `torchrun` numbers the processes of a machine."""
    from giantleap.models.device import choose_device

    try:
        device = choose_device(name)
        local = os.environ.get("LOCAL_RANK")
        if local is not None and device.type == "cuda":
            return choose_device(f"cuda:{local}")
    except ValueError as error:
        stop(str(error))
    return device
