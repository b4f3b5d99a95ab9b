"""The page for browsers over HTTP: its files, what they may load, the way there, and that they alone need no key."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from giantleap.service.api.routes import page
from giantleap.service.auth import new_key
from tests.service.compat_fakes import FileProducer, build_app

FILES = sorted(path.name for path in (Path(page.__file__).parent.parent / "ui").iterdir())
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@pytest.fixture
async def client(
    bundle_dirs: tuple[Path, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[httpx.AsyncClient]:
    """A service with API keys; a parameter is a further setting."""
    keys = tmp_path / "keys.toml"
    keys.touch(mode=0o600)
    keys.write_text(f'[[key]]\nname = "page"\nsha256 = "{new_key()[1]}"\nscopes = ["generate"]\n')
    app = build_app(FileProducer(), bundle_dirs, api_keys_file=keys, **getattr(request, "param", {}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        yield client


async def test_the_page_and_its_files_need_no_key_and_data_does(client: httpx.AsyncClient) -> None:
    assert len(FILES) > 4
    for path in ("/ui", "/ui/operator", *(f"/ui/{name}" for name in FILES)):
        response = await client.get(path)
        kind = TYPES[Path(path).suffix or ".html"]
        assert response.status_code == 200 and response.headers["content-type"].startswith(kind), path
    for path in ("/models", "/jobs", "/ui/../models", "/ui/x/../../jobs"):
        assert (await client.get(path)).status_code == 401, path
    for path in ("/ui/none.js", "/ui/..", "/ui/%00", f"/ui/{'x' * 300}", "/ui/..%2fapp.py"):
        assert (await client.get(path)).status_code in (401, 404), path


async def test_the_page_may_load_its_own_files_only(client: httpx.AsyncClient) -> None:
    response = await client.get("/ui")
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=", response.text), "inline code would be blocked"
    for name in FILES:
        text = (await client.get(f"/ui/{name}")).text
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
    assert (await client.get("/models")).headers["content-security-policy"].startswith("default-src 'none'; frame")


async def test_files_are_sent_again_only_after_a_change(client: httpx.AsyncClient) -> None:
    first = await client.get("/ui/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = await client.get("/ui/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(("client", "root"), [({}, ""), ({"root_path": "/tools/gl"}, "/tools/gl")], indirect=["client"])
async def test_the_root_leads_browsers_to_the_page(client: httpx.AsyncClient, root: str) -> None:
    response = await client.get(f"{root}/", headers=HTML)
    assert response.status_code == 307
    assert str(response.url.join(response.headers["location"])) == f"http://giantleap{root}/ui"
    assert (await client.get(f"{root}/ui")).status_code == 200
    if root:
        assert (await client.get(root, headers=HTML, follow_redirects=True)).url.path == f"{root}/ui"
    assert (await client.get(f"{root}/")).json()["code"] == "not_found", "for other clients there is nothing"


@pytest.mark.parametrize("client", [{"ui": False}], indirect=True)
async def test_the_page_can_be_switched_off(client: httpx.AsyncClient) -> None:
    for path in ("/", "/ui", "/ui/app.js", "/ui/operator"):
        assert (await client.get(path, headers=HTML)).status_code == 404, path
    assert (await client.get("/docs")).status_code == 200
