"""Requests of the doctor, as values: every response or the reason why there was none. The checks judge them."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

_TIMEOUT_S = 30.0
_MAX_DETAIL_CHARS = 240


@dataclass(frozen=True, slots=True)
class Answer:
    """A response; without one `status` is 0 and `reason` says why.

    Args:
        status: Of HTTP.
        headers: Names in lower case.
        body: All of it.
        sent_s: When the request was sent, Unix time.
        received_s: When the response was complete.
        reason: Why there is no response.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    sent_s: float = 0.0
    received_s: float = 0.0
    reason: str = ""

    @property
    def document(self) -> Any:
        """The body as JSON; None where it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def fields(self) -> dict[str, Any]:
        """The body as a JSON object; empty where it is none."""
        document = self.document
        return document if isinstance(document, dict) else {}

    @property
    def problem_code(self) -> str | None:
        """The code of a problem document of Giantleap; None: something else answered."""
        code, kind = self.fields.get("code"), str(self.fields.get("type"))
        return code if isinstance(code, str) and kind.startswith("urn:giantleap:") else None

    def explain(self) -> str:
        """The response in a few words, for a finding."""
        if not self.status:
            return self.reason
        if self.problem_code is None:
            return f"status {self.status} from {self.headers.get('server', 'an unnamed server')[:40]}"
        return f"status {self.status}, {self.fields.get('detail', '')}"[:_MAX_DETAIL_CHARS]


class Service:
    """The service at an address, with or without a key. Follows no redirect: a client would lose method and body."""

    def __init__(self, client: httpx.Client, base_url: str, key: str | None) -> None:
        self._client = client
        self.base_url = base_url.rstrip("/")
        self.has_key = key is not None
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def send(self, method: str, path: str, *, with_key: bool = True, **options: Any) -> Answer:
        """One request below the address."""
        return self._send(method, self.base_url + path, with_key, **options)

    def get_published(self, path: str) -> Answer:
        """GET of a path that the service published, as a client resolves it; follows one redirect, to a bucket."""
        answer = self._send("GET", self.to_published(path), True)
        if answer.status == 307 and "location" in answer.headers:
            return self._send("GET", self.to_published(answer.headers["location"]), True)
        return answer

    def to_published(self, path: str) -> str:
        """The URL to which a published path or URL leads."""
        return urljoin(f"{self.base_url}/", path)

    def is_own(self, url: str) -> bool:
        """Whether a URL has this service's scheme, host and port: no other gets the key."""
        return _origin(url) == _origin(self.base_url)

    @contextmanager
    def stream_lines(self, path: str, within_s: float) -> Iterator[Iterator[str]]:
        """The lines of a stream that the service published, each within a time.

        Raises:
            httpx.ReadTimeout: No line came in time.
            httpx.HTTPError: There is no stream.
        """
        url = self.to_published(path)
        headers = (self._headers if self.is_own(url) else {}) | {"Accept": "text/event-stream"}
        timeout = httpx.Timeout(_TIMEOUT_S, read=within_s)
        with self._client.stream("GET", url, headers=headers, timeout=timeout) as response:
            response.raise_for_status()
            yield response.iter_lines()

    def _send(self, method: str, url: str, with_key: bool, **options: Any) -> Answer:
        headers = options.pop("headers", {})
        if with_key and self.is_own(url):
            headers = self._headers | headers
        sent_s = time.time()
        try:
            response = self._client.request(method, url, headers=headers, **({"timeout": _TIMEOUT_S} | options))
        except httpx.InvalidURL:
            return Answer(0, reason="the URL cannot be read")
        except httpx.HTTPError as error:
            return Answer(0, sent_s=sent_s, received_s=time.time(), reason=name_error(error))
        names = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status_code, names, response.content, sent_s, time.time())


def name_error(error: Exception) -> str:
    """An error of the connection in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_DETAIL_CHARS].removesuffix(": ")


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    return parts.scheme, parts.hostname, port or {"http": 80, "https": 443}.get(parts.scheme)
