"""Checks of the path between client and service: published URLs, event streams, large bodies."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from giantleap.service.doctor.findings import Finding, fail, ok, skipped
from giantleap.service.doctor.images import cancel, get_job, is_over
from giantleap.service.doctor.probe import Answer, Service, name_error

FIRST_EVENT_S: Final = 4.0
"""The first event is there when the stream opens; a proxy that holds it for so long buffers."""

_READ: Final = (400, 415, 422)  # of zeros, once they have come
_CHUNK_BYTES: Final = 1 << 16
_PROXY: Final = "pass Host and X-Forwarded-Proto; list the proxy in GIANTLEAP_FORWARDED_ALLOW_IPS"


def check_result_url(path: str, answer: Answer) -> Finding:
    """Whether the URL of a result, as the service publishes it, leads to the result."""
    root = path.partition("/jobs/")[0] or "/"
    if answer.status == 200 and not _is_page(answer):
        return ok("result URL", f"the published path, below {root}, leads back to the service")
    found = f"results are published below {root}, where they are not: {answer.explain()}"
    return fail("result URL", found, "set GIANTLEAP_ROOT_PATH to the path of --url")


def _is_page(answer: Answer) -> bool:
    return answer.headers.get("content-type", "").startswith("text/html")


def check_absolute_url(base_url: str, answer: Answer) -> Finding:
    """Whether a whole URL in an answer has the scheme and host that the client used.

    Args:
        base_url: What the client used.
        answer: That of /v1/images/generations.
    """
    data = answer.fields.get("data")
    if answer.status != 200 or not data:
        return fail("whole URL", f"/v1/images/generations: {answer.explain()}", "let the proxy pass /v1")
    published, own = urlsplit(str(data[0].get("url", ""))), urlsplit(base_url)
    if published.scheme != own.scheme:
        return fail("whole URL", f"URLs in answers are {published.scheme}, you used {own.scheme}", _PROXY)
    if published.netloc != own.netloc.rpartition("@")[2]:
        return fail("whole URL", f"URLs in answers name the host {published.netloc}, not {own.netloc}", _PROXY)
    if own.path and not published.path.startswith(f"{own.path}/"):
        return fail("whole URL", f"URLs in answers lack the path {own.path}", "set GIANTLEAP_ROOT_PATH to it")
    return ok("whole URL", "URLs in answers have the scheme, host and path that you used")


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """The facts of an event stream while its job was live.

    Args:
        came: Whether an event came within `FIRST_EVENT_S`.
        ended: Whether the job had ended then, so that nothing is known.
        reason: Why there was no stream; empty: there was one.
    """

    came: bool
    ended: bool
    reason: str = ""


def read_stream(service: Service, job: dict[str, Any]) -> StreamFacts:
    """Open the events of a job, wait for the first, and ask whether the job goes on."""
    came, reason = False, ""
    try:
        with service.stream_lines(job["events_url"], FIRST_EVENT_S) as lines:
            came = any(line.startswith("event:") for line in lines)
    except httpx.ReadTimeout:
        came = False
    except httpx.HTTPError as error:
        reason = name_error(error) if isinstance(error, httpx.TransportError) else "the proxy or service refuses it"
    return StreamFacts(came, is_over(get_job(service, job["id"])), reason)


def check_stream(facts: StreamFacts) -> Finding:
    """Whether events come while the job runs."""
    if facts.reason:
        return fail(
            "events", f"the stream of events does not open: {facts.reason}", "let the proxy pass /jobs/*/events"
        )
    if facts.ended:
        return skipped("events", "even the longest test job ended before its first event", "check on a busy service")
    if not facts.came:
        return fail(
            "events",
            f"no event came within {FIRST_EVENT_S:.0f} s while the job went on: a proxy buffers the stream",
            "turn buffering and compression of text/event-stream off (nginx: proxy_buffering off)",
        )
    return ok("events", "an event came while its job went on: nothing buffers the stream")


def watch_long_job(service: Service, answer: Answer) -> StreamFacts:
    """`read_stream` of a long job, which is then canceled."""
    if answer.status != 202:
        return StreamFacts(False, True)
    facts = read_stream(service, answer.fields)
    cancel(service, answer.fields["id"])
    return facts


def send_largest_body(service: Service, size_bytes: int) -> Answer:
    """POST as many zeros as the service takes; it refuses them, for they are no latent."""

    def chunks() -> Iterator[bytes]:
        for start in range(0, size_bytes, _CHUNK_BYTES):
            yield bytes(min(_CHUNK_BYTES, size_bytes - start))

    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size_bytes)}
    return service.send("POST", "/upscale", content=chunks(), headers=headers, timeout=120.0)


def check_body_limit(answer: Answer, size_bytes: int) -> Finding:
    """Whether a body of the service's own limit reaches it."""
    size = f"{size_bytes / 2**20:.0f} MiB"
    advice = "raise the proxy's limit to GIANTLEAP_MAX_BODY_BYTES (nginx: client_max_body_size)"
    if answer.problem_code == "payload_too_large":
        return skipped("body size", f"the service takes less than {size}", "set its GIANTLEAP_MAX_BODY_BYTES here")
    if answer.problem_code is not None and answer.status in _READ:
        return ok("body size", f"a body of {size} reaches the service")
    if answer.problem_code is not None:
        return skipped("body size", f"the service refused before it read: {answer.explain()}", "run the doctor again")
    if answer.status == 413:
        return fail("body size", f"the proxy refuses a body of {size}: {answer.explain()}", advice)
    return fail("body size", f"a body of {size} does not arrive: {answer.explain()}", advice)
