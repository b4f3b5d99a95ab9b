"""The operator's view at /ui/operator in a real Chromium, below a path prefix and with API keys."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from giantleap.service.settings import Settings
from tests.browser.visits import Visit, open_visit
from tests.service.paper_bundle import write_paper_bundle

pytestmark = pytest.mark.browser
PERIOD_S = 3.0
READS = "performance.getEntriesByType('resource').filter(each => each.name.endsWith('/metrics')).length"
ROWS = "[...document.querySelectorAll('#{} .row')].map(row => [...row.children].map(each => each.textContent))"
TILES = (
    "Object.fromEntries([...document.querySelectorAll('.tile')]"
    ".map(each => [each.children[0].textContent, each.children[1].textContent]))"
)


@pytest.fixture
def visit(settings: Settings, tmp_path: Path) -> Iterator[Visit]:
    with open_visit(settings, tmp_path, write_paper_bundle(tmp_path / "paper"), "/ui/operator") as visit:
        visit.page.until("document.getElementById('key')?.checkVisibility()")
        yield visit


def post(visit: Visit, **body: object) -> int:
    headers = {"X-API-Key": visit.key, "Prefer": "respond-async"}
    return httpx.post(f"{visit.url}/generate", json={"prompt": "a", **body}, headers=headers, timeout=60).status_code


def test_an_operator_sees_queue_workers_stages_and_errors(visit: Visit) -> None:
    page = visit.page
    assert [post(visit), post(visit), post(visit, priority="low"), post(visit, steps=9999)] == [202, 202, 202, 422]
    page.fill("key", visit.key)
    page.until(f"({TILES}).Waiting === '3' && ({TILES}).Workers === '0'")
    lanes = page.run(ROWS.format("queue"))
    assert [[row[0], row[2]] for row in lanes[:2]] == [["paper, high", "2"], ["paper, low", "1"]]
    assert "No worker is ready" in page.run("document.getElementById('workers').textContent")
    assert "No batch has run" in page.run("document.getElementById('stages').textContent")
    faults = {row[0]: row[2] for row in page.run(ROWS.format("faults"))}
    assert faults["refused: invalid_request"] == "1"
    visit.metrics.observe_stages("paper", "lua", 2, "torch", {"generate": 1.5, "decode": 0.25})
    visit.metrics.observe_stages("paper", "lua", 2, "torch", {"generate": 60.0}, warmup=True)
    visit.metrics.count_failure("paper", "engine_error")
    visit.metrics.count_busy("cuda:0", 1000.0)  # more than the time that has passed
    with visit.worker():
        page.until(f"({TILES}).Waiting === '0' && ({TILES}).Workers === '1'")
        page.until("document.getElementById('workers').textContent.includes('busy: cuda:0')")
        memory, busy = page.run(ROWS.format("workers"))
        assert memory[2] == "2.0 GiB of 8.0 GiB" and busy[2] == "100%"
        assert page.run("document.querySelector('#workers .chip.loaded').textContent") == "paper"
    stages = page.run(ROWS.format("stages"))
    assert [[row[0], row[2]] for row in stages] == [["generate", "1.5 s x 1"], ["decode", "250 ms x 1"]]
    assert "failed: engine_error" in [row[0] for row in page.run(ROWS.format("faults"))]


def test_a_key_without_the_scope_is_told_and_replaced(visit: Visit) -> None:
    page = visit.page
    page.fill("key", "gl_wrong")
    page.until("document.getElementById('error').textContent === 'the API key is not known'")
    assert page.run("document.getElementById('cards').hidden")
    page.fill("key", visit.key)
    page.until("!document.getElementById('cards').hidden && document.getElementById('error').textContent === ''")


def test_a_hidden_tab_asks_for_nothing(visit: Visit) -> None:
    page = visit.page
    page.fill("key", visit.key)
    page.until("!document.getElementById('cards').hidden")

    def hide(hidden: str) -> None:
        page.run(f"Object.defineProperty(document, 'hidden', {{get: () => {hidden}, configurable: true}})")
        page.run("document.dispatchEvent(new Event('visibilitychange'))")

    def requests_after(pause_s: float) -> int:
        time.sleep(pause_s)
        page.run("0")  # reads what has happened
        return len(page.requests)

    hide("true")
    before = requests_after(2 * PERIOD_S)  # what was on its way has come
    assert requests_after(2 * PERIOD_S) == before
    hide("false")
    page.until(f"{READS} > {page.run(READS)}")


def test_counters_are_followed_through_a_restart(visit: Visit) -> None:
    script = """(async () => {
      const page = document.querySelector("script").src;
      const {groups, History, parse, sum} = await import(new URL("metrics.js", page));
      const history = new History(60);
      const scrape = (value) => parse(`# HELP a\\na_total{device="gpu \\\\"0\\\\"",x="y"} ${value}\\nb 1e3\\n`);
      [5, 8, 2].forEach((value, index) => history.add(30 * index, scrape(value)));
      const read = (metrics) => sum(metrics, "a_total", {x: "y", other: ""});
      const last = scrape(1);
      return [history.growth(read), history.perMinute(read), groups(last, "a_total", ["device"]), sum(last, "b")];
    })()"""
    assert visit.page.run(script) == [5, 5, [[['gpu "0"'], 1]], 1000]
