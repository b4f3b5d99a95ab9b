"""`giantleap jobs` and `giantleap status`: follow, cancel and delete jobs of a running service, and see how it is.

They use the service over HTTP, so that they work from any machine and with the rights of their API key.
"""

import ipaddress
import json
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from urllib.parse import quote

import typer

from giantleap.cli.options import stop
from giantleap.service.settings import format_errors, read_settings

if TYPE_CHECKING:
    import httpx

UrlOption = Annotated[str | None, typer.Option("--url", help="Address of the service [GIANTLEAP_API_URL].")]
JobArgument = Annotated[str, typer.Argument(help="Id of the job.")]
LimitOption = Annotated[int, typer.Option(help="Most jobs to list.", min=1, max=100)]

app = typer.Typer(no_args_is_help=True, help="Jobs of a running service.")
dead = typer.Typer(no_args_is_help=True, help="Jobs that failed for good; needs a key with the scope admin.")
app.add_typer(dead, name="dead")

_TIMEOUT_S = 30.0


@app.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs of this state.")] = None,
    limit: LimitOption = 20,
    url: UrlOption = None,
) -> None:
    """List the jobs of your key, newest first; without API keys, all jobs."""
    params: dict[str, Any] = {"limit": limit} | ({} if status is None else {"status": status})
    for job in _request("GET", "/jobs", url, params).json()["jobs"]:
        typer.echo(f"{job['id']}  {job['status']:<10}  {job['kind']:<8}  {job['bundle']}  {job['created_at']}")


@app.command()
def show(job_id: JobArgument, url: UrlOption = None) -> None:
    """Print a job as JSON."""
    typer.echo(json.dumps(_request("GET", f"/jobs/{_quote(job_id)}", url).json(), indent=2))


@app.command()
def cancel(job_id: JobArgument, url: UrlOption = None) -> None:
    """Cancel a job: at once where it waits, at its next step where it runs."""
    job = _request("POST", f"/jobs/{_quote(job_id)}/cancel", url).json()
    typer.echo(f"{job_id}  {job['status'] if job['status'] == 'canceled' else 'cancel requested'}")


@app.command()
def delete(job_id: JobArgument, url: UrlOption = None) -> None:
    """Delete a job that has ended, with its results; cancel one that has not."""
    response = _request("DELETE", f"/jobs/{_quote(job_id)}", url)
    typer.echo(f"{job_id}  {'deleted' if response.status_code == 204 else 'cancel requested'}")


@dead.command("list")
def list_dead(limit: LimitOption = 20, url: UrlOption = None) -> None:
    """List the jobs that failed for good, the latest first."""
    for letter in _request("GET", "/dead-letters", url, {"limit": limit}).json()["dead_letters"]:
        retry = "can be retried" if letter["blocked_reason"] is None else letter["blocked_reason"]
        typer.echo(f"{letter['id']}  {letter['failed_at']}  {letter['error']['code']}  {retry}")


@dead.command()
def retry(job_id: JobArgument, url: UrlOption = None) -> None:
    """Enqueue a job again, under a new id, which is printed."""
    typer.echo(_request("POST", f"/dead-letters/{_quote(job_id)}/retry", url).json()["id"])


@dead.command()
def drop(job_id: JobArgument, url: UrlOption = None) -> None:
    """Take a job off the list."""
    _request("DELETE", f"/dead-letters/{_quote(job_id)}", url)
    typer.echo(f"{job_id}  dropped")


def status(url: UrlOption = None) -> None:
    """Print whether a service is ready, its queue and its workers. Exit code 1 where it is not ready."""
    version = _request("GET", "/version", url).json()["version"]
    ready = _request("GET", "/readyz", url, accepted=(503,)).json()
    reasons = "; ".join(ready.get("reasons", ()))
    typer.echo(f"giantleap {version}  {'ready' if ready.get('ready') else f'not ready: {reasons}'}")
    metrics = _request("GET", "/metrics", url, accepted=(401, 403))
    if metrics.status_code == 200:
        _print_metrics(metrics.text)
    if not ready.get("ready"):
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


def _request(
    method: str, path: str, url: str | None, params: dict[str, Any] | None = None, accepted: tuple[int, ...] = ()
) -> "httpx.Response":
    """One request; an error of the service, but one that is accepted, ends the command with its message."""
    import httpx

    try:  # without a log, which would show each request
        settings = read_settings(**({} if url is None else {"api_url": url}))
    except ValueError as error:
        stop(*format_errors(error))
    base_url = settings.api_url or to_local_url(settings.host, settings.port)
    headers = {} if settings.api_key is None else {"Authorization": f"Bearer {settings.api_key.get_secret_value()}"}
    try:
        response = httpx.request(method, base_url + path, params=params, headers=headers, timeout=_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        _fail(f"{base_url} does not answer ({type(error).__name__}); start `giantleap serve`, or set --url")
    if response.is_error and response.status_code not in accepted:
        _fail(_to_detail(response))
    return response


def _quote(job_id: str) -> str:
    """An argument as one part of a path, whatever it holds."""
    return quote(job_id, safe="")


def _to_detail(response: "httpx.Response") -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"the address answered with status {response.status_code} and is no Giantleap service; check --url"


def _fail(line: str) -> NoReturn:
    typer.echo(f"giantleap: {line}", err=True)
    raise typer.Exit(1)
