"""The page at /ui as its users meet it, in a real Chromium, below a path prefix and with API keys."""

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from giantleap.service.api.app import create_app
from giantleap.service.api.server import server_config
from giantleap.service.auth import new_key
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.job import GenerateParams, ResultFile
from giantleap.service.settings import Settings
from tests.browser.devtools import Page, open_page
from tests.service.compat_fakes import LATENT, to_file
from tests.service.live_server import serve
from tests.service.paper_bundle import write_paper_bundle
from tests.service.thread_worker import thread_worker

pytestmark = pytest.mark.browser
STEPS = 3
RESULT = "document.querySelector('#result img')?.complete && !document.getElementById('submit').disabled"
FACTS = "[...document.querySelectorAll('.facts')].map(each => each.textContent)"
ERROR = "document.getElementById('error').textContent"


def draw(consumer: JobConsumer, claim: Claim) -> None:
    params = claim.job.params
    for step in range(1, STEPS + 1):
        consumer.emit(claim, "step", {"step": step, "steps": STEPS})
    file = to_file(claim.job, 0)
    seed = params.seed if isinstance(params, GenerateParams) else None
    result = ResultFile(f"image/{params.output_format}", len(file), seed, *Image.open(io.BytesIO(file)).size)
    consumer.complete(claim, [(result, file)], {"generate": 0.2, "decode": 0.1}, ())


@dataclass(frozen=True)
class Visit:
    """A page with the form of its service, the worker's settings, and the key that was typed in."""

    page: Page
    settings: Settings
    key: str

    @contextlib.contextmanager
    def worker(self) -> Iterator[None]:
        with thread_worker(self.settings, "paper", draw):
            yield


@pytest.fixture
def visit(settings: Settings, tmp_path: Path) -> Iterator[Visit]:
    key, sha256 = new_key()
    keys = tmp_path / "keys.toml"
    keys.touch(mode=0o600)
    keys.write_text(f'[[key]]\nname = "page"\nsha256 = "{sha256}"\nscopes = ["generate", "upscale"]\n')
    bundle = write_paper_bundle(tmp_path / "paper")
    settings = settings.model_copy(update={"bundle": (bundle,), "api_keys_file": keys, "root_path": "/tools/gl"})
    with (
        serve(server_config(create_app(settings), settings)) as url,
        open_page(f"{url}/tools/gl/", tmp_path / "profile") as page,
    ):
        page.until("document.getElementById('key')?.checkVisibility()")
        assert page.run("location.pathname") == "/tools/gl/ui"
        page.fill("key", key)
        page.until("document.getElementById('method').value")
        yield Visit(page, settings, key)
        assert [entry for entry in page.logged if '"network"' not in entry] == [], "blocked by the policy, or a fault"


def test_a_prompt_becomes_an_image_and_a_link_and_is_in_the_strip(visit: Visit) -> None:
    page = visit.page
    with visit.worker():
        for field, value in {"prompt": "a red sphere", "seed": "7", "scale": "4"}.items():
            page.fill(field, value)
        page.click("#submit")
        page.until(RESULT)
    assert page.run(FACTS) == ["lua \u00b7 x4 \u00b7 256 x 256 px \u00b7 seed 7"]
    assert page.run("document.querySelector('#result img').naturalWidth") == 256
    assert page.run("document.querySelector('#result img').alt") == "a red sphere"
    assert "generate 200 ms" in page.run("document.querySelector('.key').textContent")
    stored = page.run("JSON.stringify({...localStorage})")
    assert visit.key not in stored and page.run("Object.values(sessionStorage)") == [visit.key]
    link = page.run("document.querySelector('a.link').href")
    page.send("Page.reload")
    page.until("document.querySelector('#jobs button img') && document.getElementById('method').value")
    page.open(link)
    page.until("document.getElementById('prompt').value === 'a red sphere'")
    assert page.run("['seed', 'scale'].map(name => document.getElementById(name).value)") == ["7", "4"]
    page.open(link.replace("method=lua", "method=magic"))
    page.until(f"{ERROR} === 'method: magic does not exist here; choose another value'")
    page.click("#jobs button")
    page.until(RESULT)
    assert page.run(FACTS) == ["lua \u00b7 x4 \u00b7 256 x 256 px \u00b7 seed 7"]


def test_two_methods_are_compared_with_one_seed(visit: Visit) -> None:
    page = visit.page
    with visit.worker():
        page.fill("prompt", "a red sphere")
        page.fill("compare", "bicubic")
        page.click("#submit")
        page.until(RESULT)
    facts = page.run(FACTS)
    assert [each.split()[0] for each in facts] == ["lua", "bicubic"]
    assert facts[0].split("seed ")[1] == facts[1].split("seed ")[1]
    cut = "parseFloat(document.querySelector('.compare-stage').style.getPropertyValue('--cut'))"
    before = page.until(cut)
    page.run("document.querySelector('.compare input').focus()")
    for kind in ("keyDown", "keyUp"):
        page.send("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    page.until(f"{cut} > {before}")
    page.click(".zoom")
    page.until("document.querySelector('.compare img').clientWidth * devicePixelRatio === 128")


def test_a_dropped_latent_is_upscaled(visit: Visit) -> None:
    page, file = visit.page, io.BytesIO()
    np.save(file, LATENT)
    page.run(
        f"""(() => {{
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array({json.dumps(list(file.getvalue()))})], "latent.npy"));
          document.getElementById("drop").dispatchEvent(new DragEvent("drop", {{dataTransfer: data, bubbles: true}}));
        }})()"""
    )
    assert page.run("document.getElementById('submit').textContent") == "Upscale"
    assert not page.run("document.getElementById('prompt').checkVisibility()")
    with visit.worker():
        page.click("#submit")
        page.until(RESULT)
    assert page.run(FACTS) == ["lua \u00b7 x2 \u00b7 96 x 64 px"]


def test_a_queued_job_shows_its_place_and_can_be_canceled(visit: Visit) -> None:
    page = visit.page
    page.fill("prompt", "a red sphere")
    page.click("#submit")  # there is no worker
    page.until("document.getElementById('progress').textContent.includes('queued')")
    page.click("#cancel")
    page.until("document.getElementById('announce').textContent === 'Canceled'")
    assert page.run("document.getElementById('cancel').hidden && !document.getElementById('submit').disabled")
    assert page.run(ERROR) == ""


def test_mistakes_are_shown_where_they_are(visit: Visit) -> None:
    page = visit.page
    page.fill("prompt", "a red sphere")
    page.fill("width", "100")
    page.click("#submit")
    page.until(ERROR)
    assert page.run("document.querySelector('[aria-invalid]').id") == "width"
    page.fill("key", "gl_wrong")
    page.until(f"{ERROR} === 'the API key is not known'")
    assert page.run("document.activeElement.id") == "key"
    assert page.run("document.getElementById('submit').disabled")
    page.fill("key", visit.key)
    page.until("!document.getElementById('submit').disabled")
