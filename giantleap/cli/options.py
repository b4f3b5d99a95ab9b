"""The options that several commands share, how they become settings, and how a command ends on a wrong one."""

from typing import Annotated, Any, NoReturn

import typer

from giantleap.models.bundle.bundle import Bundle
from giantleap.models.bundle.descriptor import DecodeName, Method
from giantleap.service.errors import EXIT_BAD_CONFIGURATION
from giantleap.service.settings import Settings, format_errors, read_settings
from giantleap.service.telemetry.logs import configure_logging

HostOption = Annotated[str | None, typer.Option(help="Address to listen on [GIANTLEAP_HOST].")]
PortOption = Annotated[int | None, typer.Option(help="Port to listen on [GIANTLEAP_PORT].")]
RedisOption = Annotated[str | None, typer.Option(help="Redis to use [GIANTLEAP_REDIS_URL].")]
BundleOption = Annotated[str | None, typer.Option(help="Bundle directory [GIANTLEAP_BUNDLE].")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or auto [GIANTLEAP_DEVICE].")]
RoleOption = Annotated[
    str | None, typer.Option(help="`all`, or one half of the route: `generate` or `decode` [GIANTLEAP_ROLE].")
]
MethodOption = Annotated[Method | None, typer.Option(help="How images become large; none: the bundle's default.")]
DecodeOption = Annotated[DecodeName, typer.Option(help="exact, or a decode that changes the image: tiled, tiny.")]
LifelineOption = Annotated[int | None, typer.Option(hidden=True)]


def settings_from(**given: Any) -> Settings:
    """Settings with the options that were given; a wrong one ends the command with one clear line each."""
    try:
        settings = read_settings(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        stop(*format_errors(error))
    configure_logging(settings.log_level, settings.log_format)
    return settings


def stop_if_on_hub(bundle: Bundle) -> None:
    """Ends the command where the weights were not fetched: what serves or draws downloads nothing by itself."""
    if isinstance(bundle.pipeline, str):
        stop(f"bundle {bundle.name} is on the hub: fetch it with `giantleap bundle pull {bundle.name}` first")


def stop(*lines: str) -> NoReturn:
    for line in lines:
        typer.echo(f"giantleap: {line}", err=True)
    raise typer.Exit(EXIT_BAD_CONFIGURATION)
