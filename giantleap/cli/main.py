"""The `giantleap` command: the processes of the service here, the other commands in the modules beside this one.

Slow modules (torch, uvicorn, redis) are imported inside the commands that need them, so that `--help` starts fast.

`giantleap.cli.errors.EXIT_CODES` says what the exit codes mean.
"""

import logging
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from giantleap.cli.batch import batch
from giantleap.cli.bench.commands import app as bench_commands
from giantleap.cli.bundle import app as bundle_commands
from giantleap.cli.doctor import doctor
from giantleap.cli.errors import EXIT_CODES, OneLineErrors
from giantleap.cli.export import app as export_commands
from giantleap.cli.jobs import app as job_commands
from giantleap.cli.jobs import status
from giantleap.cli.keys import app as key_commands
from giantleap.cli.local import generate, models, upscale
from giantleap.cli.options import (
    BundleOption,
    DeviceOption,
    HostOption,
    LifelineOption,
    PortOption,
    RedisOption,
    RoleOption,
    read_bundles,
    settings_from,
    stop,
    stop_if_on_hub,
)
from giantleap.cli.provenance import app as provenance_commands
from giantleap.cli.train import app as train_commands
from giantleap.models.bundle.bundle import BundleError
from giantleap.service.auth import check_auth_config
from giantleap.service.errors import EXIT_FAILURE, BadConfiguration, NotReady, StoreUnavailable
from giantleap.service.settings import Settings, format_errors, read_settings
from giantleap.service.settings_page import explain_settings, to_markdown

app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, epilog=EXIT_CODES, pretty_exceptions_enable=False)
for command in (generate, upscale, batch, models, status, doctor):
    app.command()(command)
app.add_typer(bench_commands, name="bench")
app.add_typer(bundle_commands, name="bundle")
app.add_typer(export_commands, name="export")
app.add_typer(job_commands, name="jobs")
app.add_typer(key_commands, name="keys")
app.add_typer(provenance_commands, name="provenance")
app.add_typer(train_commands, name="train")

log = logging.getLogger(__name__)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"giantleap {version_of('giantleap')}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Upscale diffusion latents and decode them once. See README.md and docs/."""


@app.command()
def serve(
    host: HostOption = None,
    port: PortOption = None,
    redis_url: RedisOption = None,
    bundle: BundleOption = None,
    device: DeviceOption = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Directory of the embedded Redis and of results [GIANTLEAP_DATA_DIR].")
    ] = None,
) -> None:
    """Run the API, the workers and, unless a URL is given, Redis on this machine. Ctrl-C stops all."""
    options = {"host": host, "port": port, "redis_url": redis_url, "bundle": bundle, "device": device}
    from giantleap.service.supervisor.supervisor import serve as serve_all

    settings, reread = _read_twice(options | {"data_dir": data_dir})
    for served in read_bundles(settings):
        stop_if_on_hub(served)
    try:
        _check(settings)
        raise typer.Exit(serve_all(settings, reread))
    except OSError as error:
        _stop_not_listening(settings, error)
    except (NotReady, BadConfiguration) as error:
        stop(error.detail)


@app.command()
def api(
    host: HostOption = None,
    port: PortOption = None,
    redis_url: RedisOption = None,
    bundle: BundleOption = None,
    listen_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
    lifeline_fd: LifelineOption = None,
    ready_fd: LifelineOption = None,
) -> None:
    """Run the API processes of this machine against an existing Redis."""
    from giantleap.service.supervisor.supervisor import exit_with_parent, serve_api

    settings, reread = _read_twice({"host": host, "port": port, "redis_url": redis_url, "bundle": bundle})
    if settings.redis_url is None:
        stop("no Redis given: set GIANTLEAP_REDIS_URL, or use `giantleap serve`, which brings its own")
    if listen_fd is None:
        try:
            check_auth_config(settings)
            raise typer.Exit(serve_api(settings, reread))
        except OSError as error:
            _stop_not_listening(settings, error)
        except BadConfiguration as error:
            stop(error.detail)
    if lifeline_fd is not None:
        exit_with_parent(lifeline_fd, settings.drain_grace_s)
    _run_api_process(settings, listen_fd, ready_fd)


def _read_twice(options: Mapping[str, object]) -> tuple[Settings, Callable[[], Settings]]:
    """The settings, and a function that reads and checks them again for the supervisor."""

    def reread() -> Settings:
        settings = read_settings(**{name: value for name, value in options.items() if value is not None})
        _check(settings)
        return settings

    return settings_from(**options), reread


def _check(settings: Settings) -> None:
    """Check at start the configuration that would otherwise stop each child process."""
    from giantleap.models.filters.image_filter import FilterSetupError, find_filters
    from giantleap.service.jobs.marking import open_manifest_signer

    check_auth_config(settings)
    try:
        find_filters(settings.filters)  # the workers open them
    except FilterSetupError as error:
        raise BadConfiguration(f"filters: {error}") from error
    open_manifest_signer(settings)


def _warn_of_store(settings: Settings) -> None:
    """Check the result store; one that is away may come back."""
    from giantleap.service.results.store import check_store, open_store

    try:
        check_store(open_store(settings))
    except StoreUnavailable as error:
        log.warning("the result store is unavailable; requests for results get 503 until it is back: %s", error.detail)


def _run_api_process(settings: Settings, listen_fd: int, ready_fd: int | None) -> None:
    import uvicorn

    from giantleap.models.allocator import keep_freed_memory
    from giantleap.service.api.app import create_app
    from giantleap.service.api.server import server_config
    from giantleap.service.jobqueue.server import check_url
    from giantleap.service.supervisor.supervisor import notify_ready

    keep_freed_memory()
    try:
        check_url(settings.redis_url or "", settings)
        _warn_of_store(settings)
        application = create_app(settings)
    except (BundleError, BadConfiguration) as error:
        stop(str(error))

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            log.info(
                "API listens on http://%s:%d, docs at /docs; jobs wait until a worker is ready", host, settings.port
            )
            notify_ready(ready_fd)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            log.info("API stopped")  # here: the server then ends the process by the signal that it received

    Server(server_config(application, settings)).run(sockets=[socket.socket(fileno=listen_fd)])


def _stop_not_listening(settings: Settings, error: OSError) -> NoReturn:
    reason = error.strerror or str(error)
    stop(f"cannot listen on {settings.host}:{settings.port}: {reason}; choose another address with --host and --port")


@app.command()
def worker(
    redis_url: RedisOption = None,
    bundle: BundleOption = None,
    device: DeviceOption = None,
    role: RoleOption = None,
    lifeline_fd: LifelineOption = None,
    ready_fd: LifelineOption = None,
    number: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Run one worker (one process per device) against an existing Redis."""
    settings = settings_from(redis_url=redis_url, bundle=bundle, device=device, role=role)
    if settings.redis_url is None:
        stop("no Redis given: set GIANTLEAP_REDIS_URL, or use `giantleap serve`, which brings its own")
    for served in read_bundles(settings):
        stop_if_on_hub(served)

    from giantleap.service.supervisor.supervisor import exit_with_parent, notify_ready

    if lifeline_fd is not None:
        exit_with_parent(lifeline_fd, settings.drain_grace_s)

    stopping = threading.Event()
    for number_of_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number_of_signal, lambda *_: stopping.set())

    from giantleap.models.allocator import keep_freed_memory
    from giantleap.service.worker.process import run_worker

    keep_freed_memory()
    try:
        run_worker(settings, stopping, number, lambda: notify_ready(ready_fd))
    except BadConfiguration as error:
        stop(error.detail)
    except (NotReady, StoreUnavailable) as error:
        stop(error.detail, code=EXIT_FAILURE)


@app.command("settings")
def print_settings(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/settings.md: every setting with default and meaning.")
    ] = False,
) -> None:
    """Print the effective settings and the source of each; secrets are masked."""
    if markdown:
        typer.echo(to_markdown(), nl=False)
        return
    try:
        rows = explain_settings()
    except ValueError as error:
        stop(*format_errors(error))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for variable, value, origin in rows:
        typer.echo(f"{variable:<{widths[0]}}  {value:<{widths[1]}}  {origin}")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
