"""Checks of the address: the server, its protocol and version, and its readiness."""

from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import urlsplit

from giantleap.service.auth import is_loopback
from giantleap.service.doctor.findings import Finding, fail, ok, skipped, warn
from giantleap.service.doctor.probe import Answer

_SKEW_WARN_S: Final = 5.0
_SKEW_FAIL_S: Final = 60.0
_ADVICE: Final = {
    "no worker is ready": "start `giantleap worker` with the same Redis URL and key prefix; its log says what it loads",
    "no worker of role": "start `giantleap worker --role` of the missing half (docs/operations.md#split-pools)",
    "Redis cannot be reached": "start Redis, or correct GIANTLEAP_REDIS_URL of the API",
}


def check_address(url: str, live: Answer) -> Finding:
    """Whether a Giantleap answers at the URL itself."""
    if not live.status:
        advice = "install the authority of its certificate" if "CERTIFICATE" in live.reason else "correct --url"
        return fail("address", f"{url} does not answer: {live.reason}", f"start the service, or {advice}")
    if 300 <= live.status < 400:
        target = live.headers.get("location", "nowhere")
        return fail("address", f"{url} redirects to {target}", "give --url, and your clients, the final address")
    if live.status != 200 or live.document != {"live": True}:
        return fail(
            "address",
            f"{url}/livez is not Giantleap: {live.explain()}",
            "correct --url with its path, or the proxy's upstream",
        )
    return ok("address", f"{url} answers in {1000 * (live.received_s - live.sent_s):.0f} ms")


def check_transport(url: str) -> Finding:
    """Whether keys and prompts travel encrypted. Certificates are verified by every request."""
    parts = urlsplit(url)
    if parts.scheme == "https":
        return ok("transport", "TLS with a certificate that this machine trusts")
    if is_loopback(parts.hostname or ""):
        return ok("transport", "plain HTTP within this machine")
    return warn(
        "transport", "plain HTTP over a network: keys and prompts can be read", "put a proxy with TLS before it"
    )


def check_version(answer: Answer, own: str) -> Finding:
    """Whether the service is of this command's version."""
    version = answer.fields.get("version")
    if version is None:
        return skipped("version", f"/version: {answer.explain()}", "let the proxy pass /version")
    if version != own:
        return warn(
            "version", f"the service is {version}, this command {own}", "update the older one; rely on its own doctor"
        )
    return ok("version", f"the service and this command are {own}")


def check_clock(answer: Answer) -> Finding:
    """Whether the server's clock is this machine's: receivers compare the time in a webhook's signature."""
    try:
        at_s = parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return skipped("clock", "the response has no Date that can be read", "let the proxy pass the header Date")
    return to_clock_finding("clock", "the service's clock", at_s, answer.sent_s, answer.received_s)


def to_clock_finding(check: str, name: str, at_s: float, sent_s: float, received_s: float) -> Finding:
    """How far a clock, read between two moments of this machine's, is beside it; a Date has whole seconds."""
    skew_s = max(sent_s - at_s - 1, at_s - received_s, 0.0)
    if skew_s <= _SKEW_WARN_S:
        return ok(check, f"{name} is that of this machine")
    ahead = "ahead of" if at_s > received_s else "behind"
    judge = fail if skew_s > _SKEW_FAIL_S else warn
    return judge(check, f"{name} is {skew_s:.0f} s {ahead} this machine's", "synchronize both by NTP")


def check_readiness(answer: Answer) -> list[Finding]:
    """Check /readyz."""
    reasons = answer.fields.get("reasons", [])
    if answer.status == 200 and answer.fields.get("ready") is True:
        return [ok("readiness", "the service takes and runs jobs")]
    if not reasons:
        return [fail("readiness", f"/readyz: {answer.explain()}", "let the proxy pass /readyz")]
    return [fail("readiness", reason, _advise(reason)) for reason in reasons]


def check_storage_warnings(answer: Answer) -> list[Finding]:
    """Check the API's warnings about its Redis, if the doctor has no Redis URL."""
    enable = "give --redis-url, or set GIANTLEAP_REDIS_URL"
    if "warnings" not in answer.fields:
        return [skipped("redis", "the API says nothing of its Redis", enable)]
    warnings = [fail("redis", *warning.rsplit("; ", 1)) for warning in answer.fields["warnings"] if "; " in warning]
    return [
        *warnings,
        skipped("redis", "version, memory, fsync, role and clock of Redis are not seen from here", enable),
    ]


def _advise(reason: str) -> str:
    known = (advice for start, advice in _ADVICE.items() if reason.startswith(start))
    return next(known, "see the log of the API and the workers")
