"""`giantleap doctor`: checks an installation from outside, one line per finding (`giantleap.service.doctor`)."""

import json
from dataclasses import asdict
from typing import Annotated
from urllib.parse import urlsplit

import typer

from giantleap.cli.jobs import UrlOption, to_local_url
from giantleap.cli.options import RedisOption, stop
from giantleap.service.errors import EXIT_FAILURE
from giantleap.service.settings import format_errors, read_settings


def doctor(
    url: UrlOption = None,
    redis_url: RedisOption = None,
    webhook_url: Annotated[
        str | None, typer.Option(help="URL to send a test webhook to; default: a receiver on this machine.")
    ] = None,
    timeout: Annotated[int, typer.Option(help="Maximum seconds of a test job.", min=1)] = 120,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per finding.")] = False,
) -> None:
    """Check an installation: address, key, Redis, workers, images, proxy, metrics, webhooks. Exit code 1: one failed.

    It sends the key in GIANTLEAP_API_KEY and submits a few small jobs.
    """
    try:  # without a log, which would show each request
        given = {"api_url": url, "redis_url": redis_url}
        settings = read_settings(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        stop(*format_errors(error))
    if webhook_url is not None and urlsplit(webhook_url).scheme not in ("http", "https"):
        stop("--webhook-url is no http or https URL; give https://host/path")

    from giantleap.service.doctor.examination import Options, examine
    from giantleap.service.doctor.findings import is_healthy

    base_url = (settings.api_url or to_local_url(settings.host, settings.port)).rstrip("/")
    findings = []
    for finding in examine(Options(base_url, settings, webhook_url, float(timeout))):
        typer.echo(json.dumps(asdict(finding)) if as_json else finding.to_line())
        findings.append(finding)
    if not is_healthy(findings):
        raise typer.Exit(EXIT_FAILURE)
