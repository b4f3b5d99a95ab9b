"""`giantleap keys`: make an API key, list those of the file. The service keeps digests only: a lost key is replaced."""

import re
from typing import Annotated

import typer

from giantleap.cli.options import settings_from, stop
from giantleap.service.auth import NAME_PATTERN, KeysFileError, Scope, new_key, read_keys

app = typer.Typer(no_args_is_help=True, help="API keys of GIANTLEAP_API_KEYS_FILE.")


@app.command()
def new(
    name: Annotated[str, typer.Option(help="Whose key it is; jobs belong to this name.")],
    scope: Annotated[list[Scope], typer.Option(help="What it may do; may be given several times.")],
    requests_per_minute: Annotated[int | None, typer.Option(help="Most requests for work a minute.", min=1)] = None,
    max_jobs: Annotated[int | None, typer.Option(help="Most jobs queued and running at once.", min=1)] = None,
) -> None:
    """Make a key: it is printed once, to standard output; to standard error goes what to add to the file."""
    if not re.fullmatch(NAME_PATTERN, name):
        stop("name: 1 to 64 letters, digits, dots, dashes and underscores; the first is a letter or a digit")
    key, digest = new_key()
    scopes = ", ".join(f'"{each}"' for each in dict.fromkeys(scope))
    lines = ["[[key]]", f'name = "{name}"', f'sha256 = "{digest}"', f"scopes = [{scopes}]"]
    if requests_per_minute is not None:
        lines.append(f"requests_per_minute = {requests_per_minute}")
    if max_jobs is not None:
        lines.append(f"max_jobs = {max_jobs}")
    typer.echo(key)
    typer.echo("\n".join(lines) + "\n", err=True)


@app.command("list")
def list_keys() -> None:
    """List the keys of the file: name, first digits of the digest, scopes, limits."""
    path = settings_from().api_keys_file
    if path is None:
        stop("no keys: GIANTLEAP_API_KEYS_FILE is not set, the service is open to everybody who reaches it")
    try:
        keys = read_keys(path)
    except KeysFileError as error:
        stop(str(error))
    for key in keys:
        caller = key.caller
        limits = [
            f"{number} {words}"
            for number, words in ((caller.requests_per_minute, "requests/min"), (caller.max_jobs, "jobs"))
            if number is not None
        ]
        scopes = ",".join(sorted(caller.scopes))
        typer.echo(f"{caller.name}  {key.sha256.hex()[:8]}  {scopes}  {', '.join(limits) or 'no limits'}")
