"""Receives webhooks: checks the signature of each, ignores repeats, and stores the image of a job that succeeded.

export GIANTLEAP_WEBHOOK_SECRET=a-long-random-text            # in both terminals
GIANTLEAP_WEBHOOK_ALLOW_PRIVATE=true make serve               # in another terminal; loopback is a private address
python examples/webhooks/receiver.py out                      # listens on http://127.0.0.1:9000
sh examples/webhooks/generate.sh                              # in a third: out/<job id>.png appears
"""

import hashlib
import hmac
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from giantleap_client import Client

MAX_AGE_S = 300
MAX_BODY_BYTES = 2**20


def is_genuine(secret: str, header: str, body: bytes) -> bool:
    """Whether a signature `t=<seconds>,v1=<hex>` is that of the service, and recent."""
    parts = dict(part.partition("=")[::2] for part in header.split(","))
    sent_s, signature = parts.get("t", ""), parts.get("v1", "")
    if not sent_s.isascii() or not sent_s.isdecimal() or abs(time.time() - int(sent_s)) > MAX_AGE_S:
        return False
    expected = hmac.new(secret.encode(), sent_s.encode() + b"." + body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(expected.encode(), signature.encode())


class Receiver(ThreadingHTTPServer):
    """Listens on loopback. Behind a proxy with TLS it may be public: only the service can sign."""

    def __init__(self, port: int, out: Path, secret: str, service_url: str) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.out, self.secret, self.service_url = out, secret, service_url
        self.deliveries: set[str] = set()


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        """Answer within 15 s, or the service repeats the delivery: the work comes after the answer."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self.send_error(413)
            return
        body = self.rfile.read(int(length))
        if not is_genuine(self.server.secret, self.headers.get("X-Giantleap-Signature", ""), body):
            self.send_error(401)
            return
        self.send_response(204)
        self.end_headers()
        delivery = self.headers["X-Giantleap-Delivery"]
        if delivery not in self.server.deliveries:  # a delivery comes at least once
            self.server.deliveries.add(delivery)
            self._store(json.loads(body))

    def _store(self, event: dict[str, Any]) -> None:
        job_id = event["job"]["id"]
        print(event["type"], job_id, flush=True)
        if event["type"] == "job.succeeded":
            with Client(self.server.service_url, os.environ.get("GIANTLEAP_API_KEY")) as client:
                client.job(job_id).result().save(self.server.out / f"{job_id}.png")


if __name__ == "__main__":
    url = os.environ.get("GIANTLEAP_API_URL", "http://127.0.0.1:8000")
    Receiver(9000, Path(sys.argv[1]), os.environ["GIANTLEAP_WEBHOOK_SECRET"], url).serve_forever()
