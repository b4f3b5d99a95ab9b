"""Behind a reverse proxy: TLS ends there, the API is below a path, and it adds credentials of its own."""

import re
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from giantleap.service.api.server import server_config
from giantleap.service.auth import new_key
from giantleap.service.settings import read_settings
from tests.service.compat_fakes import FileProducer, build_app
from tests.service.live_server import serve

PROMPT = "a red sphere on a green floor"
ROOT = "/tools/giantleap"
IMAGES = {"prompt": PROMPT, "response_format": "url"}


# --- TLS


def open_proxy(address: str, url: str) -> httpx.Client:
    """A proxy at an address of loopback, which ended TLS."""
    headers = {"X-Forwarded-Proto": "https", "Host": "images.example.org"}
    transport = httpx.HTTPTransport(local_address=address)
    return httpx.Client(base_url=url, headers=headers, transport=transport, timeout=60)


@pytest.mark.parametrize(
    ("proxies", "address", "scheme"),
    [
        ("", "127.0.0.1", "https"),
        ("", "127.0.0.2", "http"),
        ("127.0.0.2", "127.0.0.2", "https"),
        ("10.0.0.0/8, 127.0.0.0/24", "127.0.0.2", "https"),
        ("10.0.0.0/8", "127.0.0.2", "http"),
        ("*", "127.0.0.2", "https"),
    ],
)
def test_urls_have_the_scheme_of_a_proxy_that_is_believed(
    proxies: str, address: str, scheme: str, bundle_dirs: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    settings = read_settings(bundle=bundle_dirs, forwarded_allow_ips=proxies)
    app = build_app(FileProducer(), bundle_dirs)
    with serve(server_config(app, settings)) as url, open_proxy(address, url) as proxy:
        image = proxy.post("/v1/images/generations", json=IMAGES).json()["data"][0]["url"]
        assert image.startswith(f"{scheme}://images.example.org/v1/images/")
        assert proxy.get("/models/").headers["Location"] == f"{scheme}://images.example.org/models"


@pytest.mark.parametrize("wrong", ["proxy", "10.0.0.1/8", "10.0.0.0/8,", "127.0.0.1:80"])
def test_a_proxy_that_would_never_match_is_refused_at_start(wrong: str) -> None:
    if wrong.endswith(","):
        assert read_settings(forwarded_allow_ips=wrong).forwarded_allow_ips == ("10.0.0.0/8",)
        return
    with pytest.raises(ValueError, match="address or a network"):
        read_settings(forwarded_allow_ips=wrong)


# --- a path


def strip(path: str) -> str:
    return path.removeprefix(ROOT)


@pytest.fixture
def app(bundle_dirs: tuple[Path, ...]) -> FastAPI:
    return build_app(FileProducer(), bundle_dirs, root_path=ROOT)


class Proxy(httpx.ASGITransport):
    """Publishes the app below `ROOT`; passes the path on as it is, or strips it."""

    def __init__(self, app: FastAPI, strips: bool) -> None:
        super().__init__(app)
        self.strips = strips

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert request.url.path.startswith(f"{ROOT}/"), f"{request.url} is not below the root path"
        if self.strips:
            request.url = request.url.copy_with(raw_path=strip(request.url.raw_path.decode()).encode())
        return await super().handle_async_request(request)


@pytest.fixture(params=[True, False], ids=["stripped", "passed on"])
async def client(app: FastAPI, request: pytest.FixtureRequest) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=Proxy(app, request.param), base_url="https://example.org") as client:
        yield client


async def test_every_url_that_is_handed_out_leads_back_through_the_proxy(client: httpx.AsyncClient) -> None:
    posted = await client.post(f"{ROOT}/generate", json={"prompt": PROMPT}, headers={"Prefer": "respond-async"})
    job = posted.json()
    assert posted.status_code == 202 and posted.headers["location"] == job["status_url"] == f"{ROOT}/jobs/{job['id']}"
    job = (await client.get(job["status_url"])).json()
    for name in ("status_url", "result_url", "events_url"):
        assert (await client.get(job[name])).is_success, name
    assert job["results"][0]["url"] == job["result_url"]
    conflict = await client.post(job["cancel_url"])
    assert conflict.status_code == 409 and conflict.json()["status_url"] == job["status_url"]
    (listed,) = (await client.get(f"{ROOT}/jobs")).json()["jobs"]
    assert listed["status_url"] == job["status_url"]
    image = (await client.post(f"{ROOT}/v1/images/generations", json=IMAGES)).json()["data"][0]["url"]
    assert image.startswith(f"https://example.org{ROOT}/v1/images/") and (await client.get(image)).is_success
    made = await client.put(f"{ROOT}/jobs/{uuid.uuid4()}", json={"prompt": PROMPT}, headers={"Prefer": "respond-async"})
    assert made.headers["location"].startswith(f"{ROOT}/jobs/")


async def test_redirects_and_the_documentation_stay_below_the_path(client: httpx.AsyncClient) -> None:
    redirect = await client.get(f"{ROOT}/models/")
    assert (redirect.status_code, redirect.headers["location"]) == (307, f"https://example.org{ROOT}/models")
    page = await client.get(f"{ROOT}/docs")
    for source in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert (await client.get(f"{ROOT}/{source}")).is_success, source
    document = (await client.get(f"{ROOT}/openapi.json")).json()
    assert document["servers"] == [{"url": ROOT}] and "/generate" in document["paths"]


async def test_errors_keep_the_form_of_their_protocol(client: httpx.AsyncClient) -> None:
    assert "error" in (await client.get(f"{ROOT}/v1/nothing")).json()
    assert (await client.get(f"{ROOT}/nothing")).json()["code"] == "not_found"
    assert (await client.get(f"{ROOT}/livez")).is_success


async def test_only_whole_parts_of_a_path_count_as_the_root(app: FastAPI) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://giantleap") as probe:
        for path in ("/livez", f"{ROOT}/livez"):  # a probe asks the process itself
            assert (await probe.get(path)).is_success
        for path in (f"{ROOT}livez", f"{ROOT}{ROOT}/livez", f"{ROOT}x/livez"):
            assert (await probe.get(path)).status_code == 404, path


@pytest.mark.parametrize(("given", "root"), [("/gl/", "/gl"), ("/", ""), ("", ""), ("/a/b_c~d-1.2", "/a/b_c~d-1.2")])
def test_a_root_path_has_no_slash_at_its_end(given: str, root: str) -> None:
    assert read_settings(root_path=given).root_path == root


@pytest.mark.parametrize("wrong", ["gl", "//gl", "/a//b", "/..", "/a b", "https://example.org/gl", "/a?b"])
def test_a_root_path_that_no_url_could_have_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="root_path"):
        read_settings(root_path=wrong)


# --- credentials of the proxy


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    made, lines = {}, []
    for name in ("alice", "bob"):
        made[name], digest = new_key()
        lines.append(f'[[key]]\nname = "{name}"\nsha256 = "{digest}"\nscopes = ["generate"]\n')
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.touch(mode=0o600)
    path.write_text("".join(lines))
    return made, path


FOREIGN = (
    "Basic dXNlcjpwYXNz",
    "Bearer eyJhbGciOiJub25lIn0.e30.",
    "Negotiate YII=",
    'Digest username="u", realm="r"',
    "AWS4-HMAC-SHA256 Credential=a/b, Signature=c",
    "Basic",
    "",
)


@pytest.mark.parametrize("foreign", FOREIGN)
async def test_credentials_of_a_proxy_do_not_hide_the_key(
    foreign: str, keys: tuple[dict[str, str], Path], bundle_dirs: tuple[Path, ...]
) -> None:
    made, path = keys
    app = build_app(FileProducer(), bundle_dirs, api_keys_file=path)
    key, other = made["alice"], made["bob"]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:

        async def status(*headers: tuple[str, str]) -> int:
            return (await client.get("/models", headers=list(headers))).status_code

        assert await status(("Authorization", foreign), ("X-API-Key", key)) == 200
        assert await status(("Authorization", foreign), ("Authorization", f"Bearer {key}")) == 200
        assert await status(("X-API-Key", "of a gateway"), ("Authorization", f"Bearer {key}")) == 200
        assert await status(("Authorization", foreign)) == 401
        assert await status(("Authorization", foreign), ("X-API-Key", "gl_wrong")) == 401
        assert await status(("Authorization", f"Bearer {other}"), ("X-API-Key", key)) == 401, "two keys of ours"


async def test_many_guesses_in_one_request_are_not_looked_up(
    keys: tuple[dict[str, str], Path], bundle_dirs: tuple[Path, ...]
) -> None:
    app = build_app(FileProducer(), bundle_dirs, api_keys_file=keys[1])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        guesses = [("X-API-Key", key) for key in (keys[0]["alice"], *(f"gl_{number}" for number in range(90)))]
        assert (await client.get("/models", headers=guesses)).status_code == 401
