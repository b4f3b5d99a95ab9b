"""`giantleap jobs` and `giantleap status`: follow, cancel and delete jobs of a running service, and see how it is.

They use the service through its client, so that they work from any machine and with the rights of their API key.
"""

import ipaddress
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from urllib.parse import quote

import typer

from giantleap.cli.errors import to_line
from giantleap.cli.options import stop
from giantleap.service.settings import format_errors, read_settings

if TYPE_CHECKING:
    from giantleap_client import Client, Job

UrlOption = Annotated[str | None, typer.Option("--url", help="URL of the service [GIANTLEAP_API_URL].")]
JobArgument = Annotated[str, typer.Argument(help="Id of the job.")]
LimitOption = Annotated[int, typer.Option(help="Maximum number of jobs.", min=1, max=100)]

app = typer.Typer(no_args_is_help=True, help="List, show, cancel and delete jobs of a running service.")
dead = typer.Typer(no_args_is_help=True, help="Dead letters: jobs that failed permanently. Needs a key of scope admin.")
app.add_typer(dead, name="dead")

_TIMEOUT_S = 30.0


@app.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs with this status.")] = None,
    limit: LimitOption = 20,
    url: UrlOption = None,
) -> None:
    """List the jobs of your key, newest first; without API keys, all jobs."""
    params: dict[str, str | int] = {"limit": limit} | ({} if status is None else {"status": status})
    for job in _read("jobs", url, "jobs", params):
        typer.echo(f"{job['id']}  {job['status']:<10}  {job['kind']:<8}  {job['bundle']}  {job['created_at']}")


@app.command()
def show(job_id: JobArgument, url: UrlOption = None) -> None:
    """Print a job as JSON."""
    with _job(job_id, url) as job:
        typer.echo(json.dumps(job.show(), indent=2))


@app.command()
def cancel(job_id: JobArgument, url: UrlOption = None) -> None:
    """Cancel a job. A running job stops at its next step."""
    with _job(job_id, url) as job:
        state = job.cancel()["status"]
    typer.echo(f"{job_id}  {state if state == 'canceled' else 'cancel requested'}")


@app.command()
def delete(job_id: JobArgument, url: UrlOption = None) -> None:
    """Delete a job that has ended, with its results; cancel one that has not."""
    with _job(job_id, url) as job:
        typer.echo(f"{job_id}  {'deleted' if job.delete() else 'cancel requested'}")


@dead.command("list")
def list_dead(limit: LimitOption = 20, url: UrlOption = None) -> None:
    """List jobs that failed permanently, newest first."""
    for letter in _read("dead-letters", url, "dead_letters", {"limit": limit}):
        retry = "can be retried" if letter["blocked_reason"] is None else letter["blocked_reason"]
        typer.echo(f"{letter['id']}  {letter['failed_at']}  {letter['error']['code']}  {retry}")


@dead.command()
def retry(job_id: JobArgument, url: UrlOption = None) -> None:
    """Enqueue a job again and print its new id."""
    typer.echo(_read(f"dead-letters/{_quote(job_id)}/retry", url, "id", method="POST"))


@dead.command()
def drop(job_id: JobArgument, url: UrlOption = None) -> None:
    """Remove a job from the list."""
    with _client(url) as client:
        client.send("DELETE", f"dead-letters/{_quote(job_id)}")
    typer.echo(f"{job_id}  dropped")


def status(url: UrlOption = None) -> None:
    """Print readiness, queue and workers of a service. Exit code 1: not ready."""
    from giantleap_client import GiantleapError

    version, reasons = _read("version", url, "version"), ""
    with _client(url) as client:
        try:
            client.send("GET", "readyz")
        except GiantleapError as error:
            if error.code != "not_ready":
                raise
            reasons = error.detail
        typer.echo(f"giantleap {version}  {f'not ready: {reasons}' if reasons else 'ready'}")
        try:
            _print_metrics(client.send("GET", "metrics").decode())
        except GiantleapError as error:
            if error.status not in (401, 403):
                raise
    if reasons:
        raise typer.Exit(1)


def _print_metrics(text: str) -> None:
    """The figures of the queue, which are absent while Redis cannot be reached."""
    from prometheus_client.parser import text_string_to_metric_families

    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        totals[family.name.removeprefix("giantleap_")] = sum(sample.value for sample in family.samples)
    if "queue_limit" not in totals:
        return
    typer.echo(
        f"queue    {totals.get('queue_depth', 0):.0f} waiting, {totals['queue_processing']:.0f} running, "
        f"{totals['queue_delayed']:.0f} delayed, of {totals['queue_limit']:.0f}; "
        f"{totals['queue_dead_lettered']:.0f} dead letters"
    )
    typer.echo(f"workers  {totals['workers_live']:.0f} live")
    typer.echo(f"storage  {totals['blob_bytes'] / 2**20:.0f} of {totals['blob_budget_bytes'] / 2**20:.0f} MiB")


def to_local_url(host: str, port: int) -> str:
    """The URL of the service on this machine; one that listens on every address is reached by loopback."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}"
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://{host}:{port}" if address.version == 4 else f"http://[{host}]:{port}"


@contextmanager
def _client(url: str | None) -> "Iterator[Client]":
    """A client of the service; an error response, or none, ends the command with one line."""
    from giantleap_client import Client, GiantleapError

    try:  # without a log, which would show each request
        settings = read_settings(**({} if url is None else {"api_url": url}))
    except ValueError as error:
        stop(*format_errors(error))
    base_url = settings.api_url or to_local_url(settings.host, settings.port)
    key = None if settings.api_key is None else settings.api_key.get_secret_value()
    try:
        client = Client(base_url, key, timeout_s=_TIMEOUT_S, retry=False)
    except ValueError as error:
        stop(to_line(error))
    try:
        with client:
            yield client
    except GiantleapError as error:
        if error.code == "unreachable":
            _fail(f"{base_url} does not answer ({error.__cause__}); start `giantleap serve`, or set --url")
        _fail(error.detail)


@contextmanager
def _job(job_id: str, url: str | None) -> "Iterator[Job]":
    with _client(url) as client:
        try:
            job = client.job(job_id)
        except ValueError:
            stop(f"{job_id!r} is not a job id; `giantleap jobs list` shows them")
        yield job


def _read(
    path: str, url: str | None, member: str, params: Mapping[str, str | int] | None = None, *, method: str = "GET"
) -> Any:
    """A member of the JSON object that a route returns."""
    with _client(url) as client:
        content = client.send(method, path, **params or {})
    try:
        return json.loads(content)[member]
    except (ValueError, KeyError, TypeError):
        _fail("the server at this address is not a Giantleap service; check --url")


def _quote(job_id: str) -> str:
    """An argument, escaped as one part of a path."""
    return quote(job_id, safe="")


def _fail(line: str) -> NoReturn:
    typer.echo(f"giantleap: {line}", err=True)
    raise typer.Exit(1)
