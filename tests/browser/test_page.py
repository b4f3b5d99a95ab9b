"""A day in the life of a page on another allowed site, in a real Chromium, with API keys and signed URLs."""

import contextlib
import http.server
import json
import queue
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from giantleap.service.api.app import create_app
from giantleap.service.api.server import server_config
from giantleap.service.auth import new_key
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.job import GenerateParams, ResultFile
from giantleap.service.settings import Settings
from tests.browser.devtools import chromium
from tests.service.compat_fakes import to_file
from tests.service.live_server import serve
from tests.service.paper_bundle import write_paper_bundle
from tests.service.thread_worker import thread_worker

pytestmark = pytest.mark.browser
PAGE = Path(__file__).with_name("page.html").read_bytes()
STEPS = 3


def draw(consumer: JobConsumer, claim: Claim) -> None:
    params = claim.job.params
    assert isinstance(params, GenerateParams)
    for step in range(1, STEPS + 1):
        consumer.emit(claim, "step", {"step": step, "steps": STEPS})
    file = to_file(claim.job, 0)
    result = ResultFile(f"image/{params.output_format}", len(file), params.seed, params.width_px, params.height_px)
    consumer.complete(claim, [(result, file)], {"generate": 0.1}, ())


class Site(http.server.ThreadingHTTPServer):
    """The other site: hands out its page and takes the page's report."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.config: dict[str, str] = {}
        self.reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    @property
    def origin(self) -> str:
        return f"http://localhost:{self.server_port}"  # the service is at 127.0.0.1: another site, not just a port


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        kind, body = "text/html", PAGE
        if self.path == "/config":
            kind, body = "application/json", json.dumps(self.server.config).encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.server.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@contextlib.contextmanager
def open_site() -> Iterator[Site]:
    with Site() as site:
        thread = threading.Thread(target=site.serve_forever, daemon=True)
        thread.start()
        try:
            yield site
        finally:
            site.shutdown()
            thread.join(30)


def visit(settings: Settings, tmp_path: Path, **changes: object) -> dict[str, Any]:
    """What the page saw of a service with these settings."""
    key, sha256 = new_key()
    keys = tmp_path / "keys.toml"
    keys.touch(mode=0o600)
    keys.write_text(f'[[key]]\nname = "page"\nsha256 = "{sha256}"\nscopes = ["generate", "upscale", "metrics"]\n')
    with open_site() as site:
        given = {
            "bundle": (write_paper_bundle(tmp_path / "paper"),),
            "api_keys_file": keys,
            "cors_origins": (site.origin,),
            "max_body_bytes": 1 << 20,
        }
        settings = settings.model_copy(update=given | changes)
        with (
            serve(server_config(create_app(settings), settings)) as url,
            thread_worker(settings, "paper", draw),
        ):
            site.config = {"api": url + settings.root_path, "key": key}
            with chromium(site.origin, tmp_path / "profile"):
                return site.reports.get(timeout=180)


def requests_of_events(metrics: str) -> dict[str, float]:
    """How many requests for events ended with each status."""
    pattern = r'^giantleap_http_requests_total\{code="(\d+)",method="GET",route="/jobs/\{job_id\}/events"\} (\S+)$'
    return {status: float(count) for status, count in re.findall(pattern, metrics, re.MULTILINE)}


def test_a_page_of_an_allowed_site_draws_follows_and_shows_an_image(settings: Settings, tmp_path: Path) -> None:
    seen = visit(settings, tmp_path, url_secret=SecretStr("0123456789abcdef0123456789abcdef"))
    assert "error" not in seen, seen
    assert seen["posted"] == 202 and seen["location"].startswith("/jobs/")
    assert seen["events"] == ["queued", "started", *["step"] * STEPS, "done"] and seen["status"] == "succeeded"
    assert seen["opens"] == 1, "the stream ended once and was not opened again"
    assert requests_of_events(seen["metrics"]) == {"200": 1.0, "204": 1.0}
    assert seen["image"] == seen["readable"] == seen["size"] and seen["pixels"] == 4
    assert seen["unsigned"] == "blocked", "without a signature the key is needed"
    assert seen["head"] is not None and (seen["refused"], seen["large"]) == (401, 413)
