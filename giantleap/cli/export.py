"""`giantleap export` and `giantleap export check`: artifacts for engines other than torch, compared with PyTorch.

`giantleap.cli.main` mounts these commands. Torch and what imports it are imported inside them.
"""

from pathlib import Path
from typing import Annotated, get_args

import typer

from giantleap.cli.errors import to_line
from giantleap.cli.files import check_input_directories, check_output_directory
from giantleap.cli.options import BundleOption, DeviceOption, read_bundle_or_stop, settings_from, stop, stop_if_on_hub
from giantleap.cli.progress import working
from giantleap.export.manifest import FILE, ArtifactError, Compatibility, Part, Precision
from giantleap.models.bundle.bundle import BundleError
from giantleap.models.engines.base import ArtifactEngineName
from giantleap.service.settings import Settings

app = typer.Typer(invoke_without_command=True, help="Export networks for ONNX Runtime, TensorRT and AOTInductor.")

EngineOption = Annotated[ArtifactEngineName, typer.Option(help="Engine to export for.")]
PrecisionOption = Annotated[Precision, typer.Option(help="Type that the network computes in.")]
ScaleOption = Annotated[
    list[int] | None, typer.Option("--scale", help="Scale heads, repeatable; default: all of the bundle.")
]
PartOption = Annotated[
    list[str] | None, typer.Option("--part", help="lua or decoder (ONNX only), repeatable; default: lua.")
]
OutOption = Annotated[
    Path | None,
    typer.Option(help="Directory to write; default: exports/BUNDLE-ENGINE-PRECISION in GIANTLEAP_DATA_DIR."),
]
MaxBatchOption = Annotated[int, typer.Option(help="TensorRT: maximum batch size.", min=1, max=64)]
WorkspaceOption = Annotated[int, typer.Option(help="TensorRT: workspace memory, in MiB.", min=1)]
CompatibilityOption = Annotated[Compatibility, typer.Option(help="TensorRT: hardware compatibility of the plan.")]


@app.callback()
def export(
    context: typer.Context,
    bundle: BundleOption = None,
    engine: EngineOption = "onnx",
    precision: PrecisionOption = "fp32",
    scale: ScaleOption = None,
    part: PartOption = None,
    out: OutOption = None,
    device: DeviceOption = None,
    max_batch: MaxBatchOption = 8,
    workspace_mib: WorkspaceOption = 4096,
    compatibility: CompatibilityOption = "none",
) -> None:
    """Write one graph per scale head, after a comparison with PyTorch at several batch sizes and sizes."""
    if context.invoked_subcommand is not None:
        return
    settings = settings_from(bundle=bundle, device=device)
    source = read_bundle_or_stop(settings.bundle[0])
    stop_if_on_hub(source)
    target = out or settings.data_dir / "exports" / f"{source.name}-{engine}-{precision}"
    parts = _parts(part)
    check_output_directory(target)

    from giantleap.export.build import Request, export_bundle
    from giantleap.export.tensorrt_plans import PlanOptions
    from giantleap.models.device import choose_device
    from giantleap.models.lua.released_layouts import CheckpointError

    plan = PlanOptions(max_batch, workspace_mib * 2**20, compatibility, settings.data_dir / "tensorrt-timing.cache")
    _configure(settings)
    try:
        where = choose_device(settings.device)
        request = Request(source, engine, precision, target, tuple(scale or ()), parts, where, plan)
        export_bundle(request, typer.echo, working)
    except (ArtifactError, BundleError, CheckpointError, OSError, ValueError) as error:
        stop(to_line(error))
    typer.echo(f"wrote {target}")


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(help="Directory of an export.")],
    bundle: BundleOption = None,
    device: DeviceOption = None,
) -> None:
    """Compare an export with its bundle, this machine and PyTorch."""
    check_input_directories(directory)
    if not (directory / FILE).is_file():
        stop(f"{directory} holds no exported artifacts: {FILE} is missing; write some with: giantleap export --out DIR")
    settings = settings_from(bundle=bundle, device=device)
    source = read_bundle_or_stop(settings.bundle[0])

    from giantleap.export.build import check_directory
    from giantleap.models.device import choose_device
    from giantleap.models.lua.released_layouts import CheckpointError

    _configure(settings)
    try:
        check_directory(directory, source, choose_device(settings.device), typer.echo, working)
    except (ArtifactError, BundleError, CheckpointError, OSError, ValueError) as error:
        stop(to_line(error))
    typer.echo(f"{directory} matches bundle {source.name} and this machine")


def _parts(names: list[str] | None) -> tuple[Part, ...]:
    known: tuple[Part, ...] = get_args(Part)
    unknown = set(names or ()) - set(known)
    if unknown:
        stop(f"unknown part {min(unknown)}; choose from {', '.join(known)}")
    return tuple(part for part in known if part in (names or ("lua",)))


def _configure(settings: Settings) -> None:
    from diffusers.utils import logging as diffusers_logging

    from giantleap.models.engines.threads import set_threads

    diffusers_logging.set_verbosity_error()
    set_threads(settings.torch_threads)
