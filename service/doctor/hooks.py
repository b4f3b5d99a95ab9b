"""Checks that a webhook arrives: at a receiver of the operator, or at one that the doctor opens on this machine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final
from urllib.parse import urlsplit

from giantleap.service.doctor.findings import Finding, fail, ok, skipped, warn
from giantleap.service.doctor.probe import Answer
from giantleap.service.doctor.scrape import Sums
from giantleap.service.webhooks.sender import sign

WITHIN_S: Final = 20.0
_OUTCOMES: Final = ("delivered", "retried", "dropped")
_GIVE: Final = "give --webhook-url with a receiver that the service may reach"


@dataclass(frozen=True, slots=True)
class Received:
    """A delivery as the receiver got it."""

    body: bytes
    signature: str


@dataclass
class Receiver:
    """A webhook receiver on loopback that stores deliveries."""

    url: str
    deliveries: list[Received] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)


@contextmanager
def open_receiver() -> Iterator[Receiver]:
    """Receive on a free port of this machine until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            receiver.deliveries.append(Received(body, self.headers.get("X-Giantleap-Signature", "")))
            receiver.arrived.set()
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: standard error has the doctor's own lines only."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver = Receiver(f"http://127.0.0.1:{server.server_port}/giantleap-doctor")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


def check_accepted(answer: Answer, given: bool) -> Finding | None:
    """Why a job with a webhook was not taken; None: it was.

    Args:
        answer: To the job.
        given: Whether the operator named the receiver.
    """
    if answer.status == 202:
        return None
    reason = answer.fields.get("detail", "") if answer.problem_code else answer.explain()
    if "GIANTLEAP_WEBHOOK_SECRET" in reason:
        return skipped("webhook", "the service sends no webhooks", "set GIANTLEAP_WEBHOOK_SECRET")
    if not given:
        return skipped("webhook", f"the service sends none to this machine: {reason}", _GIVE)
    return fail(
        "webhook",
        f"the receiver is refused: {reason}",
        "list its host in GIANTLEAP_WEBHOOK_HOSTS; a private address also needs GIANTLEAP_WEBHOOK_ALLOW_PRIVATE",
    )


def check_received(receiver: Receiver, secret: str | None) -> Finding:
    """Whether a delivery came to the doctor's own receiver, and is signed by the secret that is set here."""
    if not receiver.deliveries:
        return fail("webhook", f"none came to this machine within {WITHIN_S:.0f} s", "see the log of the API")
    delivery = receiver.deliveries[0]
    if secret is None:
        return ok("webhook", "one came to this machine; its signature was not checked")
    stamp = delivery.signature.partition(",")[0].removeprefix("t=")
    if not stamp.isdecimal() or sign(secret, int(stamp), delivery.body) != delivery.signature:
        return fail(
            "webhook", "one came with another signature", "set the GIANTLEAP_WEBHOOK_SECRET of the service here"
        )
    return ok("webhook", "one came to this machine, signed")


def check_counted(url: str, before: Sums, after: Sums) -> Finding:
    """Whether the service counts a delivery to the operator's receiver; without metrics both are empty."""
    host = urlsplit(url).hostname
    if not before or not after:
        return skipped("webhook", f"sent to {host}; whether it was taken is not seen", "give a key of scope metrics")
    increased = {outcome for outcome in _OUTCOMES if after.get(name := f"webhooks {outcome}", 0) > before.get(name, 0)}
    if "delivered" in increased:
        return ok("webhook", f"{host} took one")
    if increased:
        return fail("webhook", f"{host} did not take one", "open the way from the API to it; it must answer 2xx")
    return warn(
        "webhook", f"no delivery to {host} was counted within {WITHIN_S:.0f} s", "of several API hosts give --url one"
    )


def has_counted(before: Sums, after: Sums) -> bool:
    """Whether an attempt was made in between."""
    return any(after.get(f"webhooks {each}", 0) > before.get(f"webhooks {each}", 0) for each in _OUTCOMES)
