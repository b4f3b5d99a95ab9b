"""The use of httpx by both drivers: the request of a step, and its failures as values without text."""

from typing import Any

import httpx

from giantleap_client.calls import check_url, to_headers
from giantleap_client.flows import Head, Open
from giantleap_client.retries import Cut

_CONNECT_S = 10.0


def client_options(url: str, api_key: str | None) -> dict[str, Any]:
    """The options of httpx's clients.

    Raises:
        ValueError: The address or the key cannot be used.
    """
    return {
        "base_url": check_url(url),
        "headers": to_headers(api_key),
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=32),
    }


def follows(step: Open) -> bool:
    """Whether a redirect is followed: that of a result to its bucket. httpx leaves the key behind at another origin."""
    return step.call.method == "GET"


def build(http: httpx.Client | httpx.AsyncClient, step: Open) -> httpx.Request:
    """The request of a step."""
    call = step.call
    timeout = httpx.Timeout(step.timeout_s, connect=min(_CONNECT_S, step.timeout_s))
    return http.build_request(
        call.method,
        call.path,
        content=call.content or None,
        headers=dict(call.headers),
        params=dict(call.params) or None,
        timeout=timeout,
    )


def to_head(response: httpx.Response) -> Head:
    """The head of a response."""
    return Head(response.status_code, {name.lower(): value for name, value in response.headers.items()})


def to_cut(error: httpx.HTTPError) -> Cut:
    """The failure of a connection. The text of httpx's error may quote the request."""
    return Cut(type(error).__name__)
