"""A service with API keys below a path prefix, a worker without networks, and a real Chromium at one of its pages."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from giantleap.service.api.app import create_app
from giantleap.service.api.server import server_config
from giantleap.service.auth import new_key
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.job import GenerateParams, ResultFile
from giantleap.service.settings import Settings
from tests.browser.devtools import Page, open_page
from tests.service.compat_fakes import to_file
from tests.service.live_server import serve
from tests.service.thread_worker import thread_worker

STEPS = 3
ROOT = "/tools/gl"
SCOPES = ("generate", "upscale", "metrics")


def draw(consumer: JobConsumer, claim: Claim) -> None:
    """What the worker does: the events of a job, and files of noise as its results."""
    params = claim.job.params
    for step in range(1, STEPS + 1):
        consumer.emit(claim, "step", {"step": step, "steps": STEPS})
    seed = params.seed if isinstance(params, GenerateParams) else None
    file = to_file(claim.job, 0)
    result = ResultFile(f"image/{params.output_format}", len(file), seed, *Image.open(io.BytesIO(file)).size)
    consumer.complete(claim, [(result, file)], {"generate": 0.2, "decode": 0.1}, ())


@dataclass(frozen=True)
class Visit:
    """A page of a service, the service's settings and root URL, and a key of its."""

    page: Page
    settings: Settings
    url: str
    key: str

    @contextlib.contextmanager
    def worker(self) -> Iterator[None]:
        with thread_worker(self.settings, "paper", draw):
            yield


@contextlib.contextmanager
def open_visit(settings: Settings, tmp_path: Path, bundle: Path, path: str) -> Iterator[Visit]:
    """Open a page of a service that serves a bundle; afterwards no code was blocked and no other host was called."""
    key, sha256 = new_key()
    keys = tmp_path / "keys.toml"
    keys.touch(mode=0o600)
    scopes = ", ".join(f'"{scope}"' for scope in SCOPES)
    keys.write_text(f'[[key]]\nname = "page"\nsha256 = "{sha256}"\nscopes = [{scopes}]\n')
    settings = settings.model_copy(update={"bundle": (bundle,), "api_keys_file": keys, "root_path": ROOT})
    with (
        serve(server_config(create_app(settings), settings)) as host,
        open_page(f"{host}{ROOT}{path}", tmp_path / "profile") as page,
    ):
        yield Visit(page, settings, host + ROOT, key)
        assert [entry for entry in page.logged if '"network"' not in entry] == [], "blocked by the policy, or a fault"
        others = [url for url in page.requests if not url.startswith((host, "data:", "blob:"))]
        assert page.requests and others == [], "requests to other hosts"
