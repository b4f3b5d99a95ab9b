"""`giantleap train prepare, run, transfer ...`: train a LUA for the VAE of your base model on your photographs.

`giantleap.cli.main` mounts these commands. Torch and what imports it are imported inside them. To use several
processes: `torchrun --nproc-per-node 2 -m giantleap.cli.main train run ...`, and the same for `prepare`.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from giantleap.cli.errors import to_line
from giantleap.cli.files import check_input_directories, check_input_files, check_output_directory, check_output_file
from giantleap.cli.options import (
    bundle_directory,
    complete_bundle,
    pulled_dir,
    read_bundle_or_stop,
    settings_from,
    stop,
    stop_if_on_hub,
)
from giantleap.cli.progress import import_torch
from giantleap.models.bundle.bundle import BundleError
from giantleap.models.lua.spec import WEIGHT_SUFFIXES
from giantleap.models.messages import install_hint

if TYPE_CHECKING:
    import torch

app = typer.Typer(no_args_is_help=True, help="Train a LUA for the VAE of a bundle (docs/training.md).")

DEVICE_PATTERN = r"auto|cpu|cuda(:\d+)?"
WEIGHTS = "lua.safetensors"
DIVERGED = 3
"""Exit code of a run whose loss was not finite: resume it from its last checkpoint with another configuration."""


def _check_device(name: str) -> str:
    if not re.fullmatch(DEVICE_PATTERN, name):
        raise typer.BadParameter(f"{name!r} is no device; give cpu, cuda, cuda:N or auto")
    return name


BundleOption = Annotated[
    str,
    typer.Option(help="Name or directory of the bundle whose VAE encodes and decodes.", autocompletion=complete_bundle),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:N or auto; under torchrun each process takes its own GPU.", callback=_check_device
    ),
]
PrecisionOption = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Type that the VAE computes in.")]
FilterOption = Annotated[
    Literal["bicubic", "area", "mixed"],
    typer.Option("--filter", help="How tiles are downscaled; mixed: by one filter and the other, image by image."),
]
StoredOption = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the latents on disk.")]


@app.command()
def prepare(
    bundle: BundleOption,
    out: Annotated[Path, typer.Option(help="Directory for the pairs; an interrupted run continues there.")],
    source: Annotated[Path | None, typer.Argument(help="Folder of images and .tar files, or one .tar file.")] = None,
    hf_dataset: Annotated[
        str | None, typer.Option(help="Data set instead of a folder: a name on the hub, or a path.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    image_column: Annotated[str, typer.Option(help="Image column of the data set.")] = "image",
    hf_config: Annotated[str | None, typer.Option(help="Configuration of a data set that has several.")] = None,
    hf_revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a data set on the hub.")] = None,
    min_side_px: Annotated[int, typer.Option(min=1, help="Skip images with a shorter side.")] = 1440,
    tile_px: Annotated[int, typer.Option(min=1, help="Side of a tile.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Tiles to encode at once.")] = 8,
    pictures_per_shard: Annotated[
        int, typer.Option(min=1, help="Images per shard; an interruption repeats at most one shard.")
    ] = 64,
    store: StoredOption = "float32",
    kernel: FilterOption = "bicubic",
    precision: PrecisionOption = "float32",
    device: DeviceOption = "auto",
) -> None:
    """Cut photographs into tiles, downscale and encode them to latents. Run it again to resume."""
    if (source is None) == (hf_dataset is None):
        stop("give either a folder or .tar file, or --hf-dataset, not both")
    if source is not None and not source.exists():
        stop(f"{source}: there is no such folder or .tar file; check the path")
    directory = _find_local_bundle(bundle)
    check_output_directory(out)
    import_torch()

    import torch

    from giantleap.training.data.hf_source import HubSource
    from giantleap.training.data.pairs_store import PairsError
    from giantleap.training.data.prepare import PrepareConfig, count_skipped
    from giantleap.training.data.prepare import prepare as make_pairs

    pictures = source or HubSource(hf_dataset or "", split, image_column, hf_config, hf_revision)
    config = PrepareConfig(pictures, directory, out, min_side_px, tile_px, batch, pictures_per_shard, store, kernel)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    try:
        report = make_pairs(config, _own_device(device), dtype, rank, world_size)
    except (BundleError, PairsError, OSError, ValueError) as error:
        stop(to_line(error))
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
    config: Annotated[Path, typer.Option(help="TOML file; docs/training.md lists its keys.")],
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    resume: Annotated[bool, typer.Option(help="Resume from the last checkpoint in --out, if there is one.")] = False,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Stop after this many updates.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Train all stages. Interrupt it at any time and continue with --resume."""
    check_input_files(config)

    from giantleap.training.run_config import ConfigError, read_config

    try:
        plan = read_config(config, pulled_dir())
        channels = read_bundle_or_stop(_find_local_bundle(str(plan.bundle))).latent_space.channels
        if plan.lua.start is None:
            plan.lua.to_spec(channels)
        for stage in plan.stages:
            stage.micro_batches(int(os.environ.get("WORLD_SIZE", "1")))
    except (BundleError, ConfigError) as error:
        stop(to_line(error))
    check_input_directories(plan.pairs)
    check_input_files(plan.lua.start)
    _check_run_directory(out, resume)
    import_torch()

    from giantleap.training.run import open_distributed_context, train

    with _one_line_errors(), open_distributed_context(_own_device(device)) as place:
        written = train(plan, out, place, resume=resume, stop_after=stop_after)
    if place.is_first:
        _print_result(written, out, plan.bundle)


@app.command()
def transfer(
    source: Annotated[str, typer.Option("--from", help="Bundle with LUA weights, or a weight file.")],
    to_bundle: Annotated[str, typer.Option(help="Name or directory of the bundle with the other VAE.")],
    pairs: Annotated[Path, typer.Option(help="Pairs of the other VAE, as `prepare` writes them.")],
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    start: Annotated[
        Literal["fit", "slice", "fresh"],
        typer.Option(
            help="New first and last layers: fitted through both VAEs (needs --from a bundle), copied, or untrained."
        ),
    ] = "fit",
    config: Annotated[
        Path | None, typer.Option(help="TOML file as for `run`, without bundle, pairs and lua; default: a short run.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Resume from the last checkpoint in --out, if there is one.")] = False,
    stop_after: Annotated[int | None, typer.Option(min=1, help="Stop after this many updates.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Adapt weights to another VAE: replace the first and last convolutions, then fine-tune."""
    weights, target = _find_weights_or_bundle(source), _find_local_bundle(to_bundle)
    check_input_directories(pairs)
    check_input_files(config)
    _check_run_directory(out, resume)
    import_torch()

    from giantleap.training.run import open_distributed_context
    from giantleap.training.transfer import transfer_and_train

    with _one_line_errors(), open_distributed_context(_own_device(device)) as place:
        written = transfer_and_train(
            weights, target, pairs, out, place, start=start, config=config, resume=resume, stop_after=stop_after
        )
    if place.is_first:
        _print_result(written, out, target)


@app.command()
def statistics(
    lua: Annotated[Path, typer.Option(help="Weights without statistics, in any supported layout.")],
    pairs: Annotated[Path, typer.Option(help="Pairs of the same VAE, as `prepare` writes them.")],
    out: Annotated[Path, typer.Option(help="File to write, in this project's layout; may be the input.")],
) -> None:
    """Write latent statistics into the header of a weight file, for `clamp_sigmas`; `run` does it already."""
    check_input_files(lua)
    check_input_directories(pairs)
    check_output_file(out)

    from giantleap.models.lua.released_layouts import CheckpointError
    from giantleap.models.lua.statistics import StatisticsError
    from giantleap.training.data.pairs_store import PairsError, PairsStore
    from giantleap.training.guard_statistics import add_statistics

    _set_threads()
    try:
        statistics = add_statistics(lua, PairsStore.open(pairs), out)
    except (CheckpointError, PairsError, StatisticsError, OSError) as error:
        stop(to_line(error))
    typer.echo(f"wrote {out} with statistics of {statistics.tiles} tiles")


@app.command()
def average(
    lua: Annotated[list[Path], typer.Argument(help="Weights of one network, such as `lua.safetensors` of two runs.")],
    out: Annotated[Path, typer.Option(help="File to write, in this project's layout.")],
) -> None:
    """Average the weights of runs that continue from one another; measure the result with `evaluate`."""
    for file in lua:
        check_input_files(file)
    check_output_file(out)

    from giantleap.models.lua.checkpoints import write_lua
    from giantleap.models.lua.released_layouts import CheckpointError
    from giantleap.training.average import average_weights

    _set_threads()
    try:
        write_lua(out, average_weights(lua))
    except (CheckpointError, OSError) as error:
        stop(to_line(error))
    typer.echo(f"wrote {out}, the average of {len(lua)} files")


@app.command()
def evaluate(
    bundle: BundleOption,
    out: Annotated[Path, typer.Option(help="Directory for the report, the sheet and the plots.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of images; captions in .txt files of the same name.")
    ] = None,
    pairs: Annotated[Path | None, typer.Option(help="Pairs of `prepare`, instead of images.")] = None,
    lua: Annotated[list[Path] | None, typer.Option(help="LUA weights, repeatable; default: the bundle's.")] = None,
    inception: Annotated[Path | None, typer.Option(help="Weights of torch-fidelity's Inception, for FID, KID.")] = None,
    lpips: Annotated[Path | None, typer.Option(help="Weights of torchvision's AlexNet, for LPIPS.")] = None,
    clip: Annotated[str | None, typer.Option(help="Directory or hub id of a CLIP model, for the CLIP score.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of images or tiles.")] = None,
    crop_px: Annotated[
        int | None, typer.Option(min=1, help="Crop images to a center square of this side first.")
    ] = None,
    patch_px: Annotated[int, typer.Option(min=1, help="Side of the crops of patch FID and KID.")] = 1024,
    patches: Annotated[int, typer.Option(min=1, help="Crops per image.")] = 1,
    kid_subsets: Annotated[int, typer.Option(min=1, help="Subsets of KID.")] = 100,
    kid_subset_size: Annotated[int, typer.Option(min=2, help="Samples per subset of KID.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of crops and subsets.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Compare weights with bicubic upscaling; a metric that cannot be measured is reported with the reason."""
    if find_spec("torchmetrics") is None:  # checked before pictures are encoded: metrics come last
        stop(f"torchmetrics is missing: {install_hint('train')}")
    source = pairs if images is None else images
    if source is None or None not in (images, pairs):
        stop("give either --images or --pairs")
    check_input_directories(source)
    check_input_files(*(lua or ()), inception, lpips)
    directory = _find_local_bundle(bundle)
    check_output_directory(out)
    import_torch()

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
        directory, out, images, pairs, tuple(lua or ()), limit, crop_px, patch_px, patches, kid_subsets,
        kid_subset_size, seed,
    )  # fmt: skip
    try:
        report = measure(config, own, open_networks(inception, lpips, clip, own))
    except ModuleNotFoundError as error:
        stop(f"{error.name} is missing: {install_hint('train')}")
    except (BundleError, CheckpointError, EvaluationError, PairsError, VaeError, OSError) as error:
        stop(to_line(error))
    typer.echo(to_markdown(report))


def _find_local_bundle(name: str) -> Path:
    """The directory of a bundle that is read and has its weights on disk; another one ends the command."""
    directory = bundle_directory(name)
    stop_if_on_hub(read_bundle_or_stop(directory))
    return directory


def _check_run_directory(out: Path, resume: bool) -> None:
    check_output_directory(out)
    if not resume and (out / "log.jsonl").exists():
        stop(f"{out} holds a run; continue it with --resume, or name another directory")


def _find_weights_or_bundle(name: str) -> Path:
    path = Path(name)
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        check_input_files(path)
        return path
    return _find_local_bundle(name)


def _print_result(written: Path, out: Path, bundle: Path) -> None:
    """The scores of a run, and the commands that use its weights."""
    from giantleap.training.run_log import read_last_scores

    typer.echo(f"wrote {written}")
    for scale, (psnr_db, gain_db) in read_last_scores(out).items():
        typer.echo(f"  {scale}: {psnr_db:.2f} dB on held-out tiles, {gain_db:+.2f} dB over decode-then-bicubic")
    if written.name != WEIGHTS:
        typer.echo("stopped before its end; continue with --resume")
        return
    typer.echo(f'try it: giantleap generate "..." -o out.png --bundle {bundle} --lua {written}')
    typer.echo(f"serve it: giantleap bundle make NAME --from {bundle} --lua {written}")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the command with one line where a training cannot start or continue; `DIVERGED` has its own exit code."""
    from giantleap.models.lua.released_layouts import CheckpointError
    from giantleap.models.vae.autoencoder import VaeError
    from giantleap.training.checkpoint import TrainingStateError
    from giantleap.training.data.pairs_store import PairsError
    from giantleap.training.run import DivergedError
    from giantleap.training.run_config import ConfigError
    from giantleap.training.transfer import TransferError

    try:
        yield
    except DivergedError as error:
        typer.echo(f"giantleap: {error}", err=True)
        raise typer.Exit(DIVERGED) from error
    except (
        BundleError, CheckpointError, ConfigError, PairsError, TrainingStateError, TransferError, VaeError, OSError
    ) as error:  # fmt: skip
        stop(to_line(error))


def _set_threads() -> None:
    """Set the number of threads; the processes of `torchrun` share the free processors."""
    from giantleap.models.engines.threads import set_threads

    set_threads(settings_from().torch_threads, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _own_device(name: str) -> "torch.device":
    """The device of this process, with its number of threads; `torchrun` numbers the processes of a machine."""
    from giantleap.models.device import choose_device

    _set_threads()
    try:
        device = choose_device(name)
        local = os.environ.get("LOCAL_RANK")
        if local is not None and device.type == "cuda":
            return choose_device(f"cuda:{local}")
    except ValueError as error:
        stop(to_line(error))
    return device
