"""The page at /docs in a real Chromium: Swagger UI from the service itself, below a path prefix and with API keys."""

from pathlib import Path

import pytest

from giantleap.service.settings import Settings
from tests.browser.visits import ROOT, open_visit
from tests.service.paper_bundle import write_paper_bundle

pytestmark = pytest.mark.browser


def test_swagger_shows_the_api_and_calls_it_without_another_host(settings: Settings, tmp_path: Path) -> None:
    with open_visit(settings, tmp_path, write_paper_bundle(tmp_path / "paper"), "/docs") as visit:
        page = visit.page
        page.until("document.querySelectorAll('.opblock').length > 15")
        assert page.run("document.querySelector('.info .title').textContent").startswith("Giantleap")
        page.click("#operations-service-get_version .opblock-summary-control")
        page.until("document.querySelector('#operations-service-get_version .try-out__btn') !== null")
        page.click("#operations-service-get_version .try-out__btn")
        page.until("document.querySelector('#operations-service-get_version .execute') !== null")
        page.click("#operations-service-get_version .execute")
        page.until("document.querySelector('.live-responses-table .response')?.textContent.startsWith('200')")
        assert f"{visit.url}/version" in page.requests and visit.url.endswith(ROOT)
