"""The page at /ui as its users meet it, in a real Chromium, below a path prefix and with API keys."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from giantleap.service.settings import Settings
from tests.browser.visits import ERROR, RESULT, ROOT, Visit, drop, open_visit, sign_in
from tests.service.compat_fakes import LATENT
from tests.service.paper_bundle import write_paper_bundle

pytestmark = pytest.mark.browser
FACTS = "[...document.querySelectorAll('.facts')].map(each => each.textContent)"


@pytest.fixture
def visit(settings: Settings, tmp_path: Path) -> Iterator[Visit]:
    with open_visit(settings, tmp_path, write_paper_bundle(tmp_path / "paper"), "/") as visit:
        page = visit.page
        sign_in(visit)
        assert page.run("location.pathname") == f"{ROOT}/ui"
        yield visit


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
    drop(page, file.getvalue(), "latent.npy")
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
