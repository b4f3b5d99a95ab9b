"""Shared parts of commands: options, reading settings and bundles, and ending on invalid ones.

Modules that are slow to import (torch, the route) are imported inside the functions that need them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from giantleap.cli.errors import to_line
from giantleap.cli.progress import import_torch, working
from giantleap.models.bundle.bundle import Bundle, BundleError, read_bundle
from giantleap.models.bundle.descriptor import DecodeName, Method
from giantleap.models.bundle.names import PULLED, find_bundle, list_bundles
from giantleap.service.errors import EXIT_BAD_CONFIGURATION, field_errors
from giantleap.service.jobs.bundles import read_in_modes
from giantleap.service.settings import Settings, format_errors, read_settings
from giantleap.service.telemetry.logs import configure_logging

if TYPE_CHECKING:
    from tqdm import tqdm

    from giantleap.models.route import Route

HostOption = Annotated[str | None, typer.Option(help="Address to listen on [GIANTLEAP_HOST].")]
PortOption = Annotated[int | None, typer.Option(help="Port to listen on [GIANTLEAP_PORT].")]
RedisOption = Annotated[str | None, typer.Option(help="Redis to use [GIANTLEAP_REDIS_URL].")]


def complete_bundle(incomplete: str) -> list[str]:
    """Names of bundles, for the completion of a shell."""
    return [path.name for path in list_bundles(pulled_dir()) if path.name.startswith(incomplete)]


BundleOption = Annotated[
    str | None,
    typer.Option(help="Name or directory of a bundle [GIANTLEAP_BUNDLE].", autocompletion=complete_bundle),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or auto [GIANTLEAP_DEVICE].")]
RoleOption = Annotated[
    str | None,
    typer.Option(help="Stages to run: `all`, `generate`, or `decode` (upscale and decode) [GIANTLEAP_ROLE]."),
]
MethodOption = Annotated[Method | None, typer.Option(help="How to upscale; default: the bundle's method.")]
DecodeOption = Annotated[
    DecodeName, typer.Option(help="exact; tiled and tiny need less time or memory and change the image.")
]
LifelineOption = Annotated[int | None, typer.Option(hidden=True)]


def settings_from(**options: Any) -> Settings:
    """Settings with the options that are not None; a wrong one ends the command with one line for each fault."""
    try:
        settings = read_settings(**{name: value for name, value in options.items() if value is not None})
    except ValueError as error:
        stop(*format_errors(error))
    configure_logging(settings.log_level, settings.log_format)
    return settings


def pulled_dir() -> Path:
    """Directory of the pulled bundles."""
    return settings_from().data_dir / PULLED


def bundle_directory(name: str, among_pulled: bool = True) -> Path:
    """The directory of a bundle, which is given by its directory or name; an unknown one ends the command."""
    try:
        return find_bundle(name, pulled_dir() if among_pulled else None)
    except BundleError as error:
        stop(to_line(error))


def read_bundle_or_stop(directory: Path) -> Bundle:
    """The bundle in a directory; a wrong one ends the command."""
    try:
        return read_bundle(directory)
    except BundleError as error:
        stop(to_line(error))


def read_bundles(settings: Settings) -> list[Bundle]:
    """The bundles that the settings name, in their modes."""
    try:
        return [read_in_modes(directory, settings.modes) for directory in settings.bundle]
    except BundleError as error:
        stop(to_line(error))


def open_bundle_route(settings: Settings, bundle: Bundle) -> "Route":
    """The bundle's route, loaded as a worker would load it."""
    stop_if_on_hub(bundle)
    import_torch()

    from giantleap.service.worker.engines import open_local_route

    try:
        with working(f"loading bundle {bundle.name}"):
            return open_local_route(bundle, settings)
    except (OSError, ValueError) as error:
        stop(f"bundle {bundle.name}: {to_line(error).removeprefix(f'bundle {bundle.name}: ')}")


RefineStrengthOption = Annotated[
    float | None, typer.Option(help="Refine pass: share of the noise schedule to run again, 0 to 0.5; start with 0.15.")
]
RefineStepsOption = Annotated[int | None, typer.Option(help="Denoising steps of the refine pass; default: 4.")]


def to_refine(strength: float | None, steps: int | None) -> dict[str, float] | None:
    """The field `refine` of a request; None where neither option is given."""
    given = {"strength": strength, "steps": steps}
    return {name: value for name, value in given.items() if value is not None} or None


def advance(bar: "tqdm[NoReturn]", done: int, total: int = 0) -> None:
    """Set a progress bar to `done`; `total` is unused, but callers of a progress function pass it."""
    bar.update(done - bar.n)


def to_message(error: Exception) -> str:
    """One line for an error: of a validation error the fields and their faults, without the values."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{name}: {reason}" for name, reason in field_errors(error.errors()))
    return to_line(error)


def stop_if_on_hub(bundle: Bundle) -> None:
    """End the command if the weights are not on disk: commands that serve or generate download nothing."""
    if isinstance(bundle.pipeline, str):
        stop(f"bundle {bundle.name} is on the hub: fetch it with `giantleap bundle pull {bundle.name}` first")


def stop(*lines: str, code: int = EXIT_BAD_CONFIGURATION) -> NoReturn:
    """Print the lines to standard error and exit."""
    for line in lines:
        typer.echo(f"giantleap: {line}", err=True)
    raise typer.Exit(code)
