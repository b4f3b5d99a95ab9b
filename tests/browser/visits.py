"""A service with API keys below a path prefix, a worker without networks, and a real Chromium at one of its pages."""

import contextlib
import io
import json
import mimetypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from giantleap.models.bundle.bundle import read_bundle
from giantleap.service.api.app import create_app
from giantleap.service.api.server import server_config
from giantleap.service.auth import new_key
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.devices import Device
from giantleap.service.jobs.job import GenerateParams, ResultFile
from giantleap.service.settings import Settings
from giantleap.service.telemetry.metrics import Metrics
from tests.browser.devtools import Page, open_page
from tests.service.compat_fakes import to_file
from tests.service.live_server import serve
from tests.service.thread_worker import thread_worker

RESULT = "document.querySelector('#result img')?.complete && !document.getElementById('submit').disabled"
ERROR = "document.getElementById('error').textContent"
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
    """A page of a service, the service's settings, root URL and metrics, and a key of its."""

    page: Page
    settings: Settings
    url: str
    key: str
    metrics: Metrics

    @contextlib.contextmanager
    def worker(self, end: Callable[[JobConsumer, Claim], None] = draw) -> Iterator[None]:
        name = read_bundle(Path(self.settings.bundle[0])).name
        device = Device("cpu", 8 << 30, 2 << 30, {name: {}}, loaded=(name,))
        with thread_worker(self.settings, name, end, device):
            yield


def sign_in(visit: Visit) -> None:
    """Enter the key once the page asks for it; the form is ready then."""
    visit.page.until("document.getElementById('key')?.checkVisibility()")
    visit.page.fill("key", visit.key)
    visit.page.until("document.getElementById('method').value")


def drop(page: Page, content: bytes, name: str) -> None:
    """Drop a file onto the form."""
    kind = mimetypes.guess_type(name)[0] or ""
    page.run(
        f"""(() => {{
          const data = new DataTransfer();
          const file = new File([new Uint8Array({list(content)})], {json.dumps(name)}, {{type: {json.dumps(kind)}}});
          data.items.add(file);
          document.getElementById("drop").dispatchEvent(new DragEvent("drop", {{dataTransfer: data, bubbles: true}}));
        }})()"""
    )


@contextlib.contextmanager
def open_visit(settings: Settings, tmp_path: Path, bundle: Path, path: str) -> Iterator[Visit]:
    """Open a page of a service that serves a bundle; afterwards no code was blocked and no other host was called."""
    key, sha256 = new_key()
    keys = tmp_path / "keys.toml"
    keys.touch(mode=0o600)
    scopes = ", ".join(f'"{scope}"' for scope in SCOPES)
    keys.write_text(f'[[key]]\nname = "page"\nsha256 = "{sha256}"\nscopes = [{scopes}]\n')
    settings = settings.model_copy(update={"bundle": (bundle,), "api_keys_file": keys, "root_path": ROOT})
    app = create_app(settings)
    with (
        serve(server_config(app, settings)) as host,
        open_page(f"{host}{ROOT}{path}", tmp_path / "profile") as page,
    ):
        yield Visit(page, settings, host + ROOT, key, app.state.giantleap.metrics)
        assert [entry for entry in page.logged if '"network"' not in entry] == [], "blocked by the policy, or a fault"
        others = [url for url in page.requests if not url.startswith((host, "data:", "blob:"))]
        assert page.requests and others == [], "requests to other hosts"
