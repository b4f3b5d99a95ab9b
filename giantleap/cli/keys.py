"""`giantleap keys`: create and list API keys. The file holds digests only, so a lost key cannot be recovered."""

import re
from pathlib import Path
from typing import Annotated

import typer

from giantleap.cli.files import check_output_file
from giantleap.cli.options import settings_from, stop
from giantleap.service.auth import NAME_PATTERN, KeysFileError, Scope, add_entry, new_key, read_keys

app = typer.Typer(no_args_is_help=True, help="Create and list API keys (GIANTLEAP_API_KEYS_FILE).")


@app.command()
def new(
    name: Annotated[str, typer.Option(help="Owner of the key; its jobs belong to this name.")],
    scope: Annotated[list[Scope], typer.Option(help="Permission of the key, repeatable.")],
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Maximum requests per minute (POST and PUT).", min=1)
    ] = None,
    max_jobs: Annotated[int | None, typer.Option(help="Maximum jobs queued and running at once.", min=1)] = None,
    megapixel_steps_per_minute: Annotated[
        int | None, typer.Option(help="Maximum work per minute, in megapixels x steps.", min=1)
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="Append its entry to GIANTLEAP_API_KEYS_FILE (mode 600).")] = False,
) -> None:
    """Create a key and print it, once. Its entry is added to the file (--add) or printed to standard error."""
    if not re.fullmatch(NAME_PATTERN, name):
        stop(
            f"invalid name {name!r}: use 1 to 64 letters, digits, dots, dashes and underscores, first a letter or digit"
        )
    key, digest = new_key()
    scopes = ", ".join(f'"{each}"' for each in dict.fromkeys(scope))
    lines = ["[[key]]", f'name = "{name}"', f'sha256 = "{digest}"', f"scopes = [{scopes}]"]
    limits = {
        "requests_per_minute": requests_per_minute,
        "max_jobs": max_jobs,
        "megapixel_steps_per_minute": megapixel_steps_per_minute,
    }
    lines.extend(f"{name} = {limit}" for name, limit in limits.items() if limit is not None)
    entry = "\n".join(lines) + "\n"
    if add:
        path = _keys_file()
        check_output_file(path)
        try:
            add_entry(path, entry)
        except KeysFileError as error:
            stop(str(error))
        typer.echo(f"giantleap: added to {path}; a running service reads it within seconds", err=True)
    typer.echo(key)
    if not add:
        typer.echo(entry, err=True)


@app.command("list")
def list_keys() -> None:
    """List the keys of the file: name, first digits of the digest, scopes, limits."""
    try:
        keys = read_keys(_keys_file())
    except KeysFileError as error:
        stop(str(error))
    for key in keys:
        caller = key.caller
        limits = [
            f"{number} {words}"
            for number, words in (
                (caller.requests_per_minute, "requests/min"),
                (caller.max_jobs, "jobs"),
                (caller.megapixel_steps_per_minute, "megapixel-steps/min"),
            )
            if number is not None
        ]
        scopes = ",".join(sorted(caller.scopes))
        typer.echo(f"{caller.name}  {key.sha256.hex()[:8]}  {scopes}  {', '.join(limits) or 'no limits'}")


def _keys_file() -> Path:
    path = settings_from().api_keys_file
    if path is None:
        stop("GIANTLEAP_API_KEYS_FILE is not set, and the service accepts every request; set it to a file of keys")
    return path
