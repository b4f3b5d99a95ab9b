"""Pages of allowed sites: what they may send, which answers they can read, and which files they may show."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from giantleap.service.auth import new_key
from giantleap.service.errors import NotReady, QueueFull
from giantleap.service.settings import read_settings
from tests.service.compat_fakes import FileProducer, build_app

SITE = "https://app.example.org"
PROMPT = "a red sphere on a green floor"
OTHERS = ("https://evil.example.org", "https://app.example.org:8443", "http://app.example.org", "null")


@pytest.fixture
def producer() -> FileProducer:
    return FileProducer()


@pytest.fixture
def app(producer: FileProducer, bundle_dirs: tuple[Path, ...]) -> FastAPI:
    return build_app(producer, bundle_dirs, cors_origins=SITE)


@pytest.fixture
async def page(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """What a page of the allowed site sends."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://giantleap", headers={"Origin": SITE}) as client:
        yield client


async def preflight(client: httpx.AsyncClient, path: str, method: str, headers: str, **more: str) -> httpx.Response:
    asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": headers}
    return await client.options(path, headers=asked | more)


HEADERS = {
    "OpenAI JS": "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,"
    "x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,"
    "x-stainless-timeout,openai-organization",
    "tracing": "baggage,sentry-trace,traceparent,tracestate,x-datadog-trace-id,b3",
    "libraries": "x-requested-with,content-type,cache-control,pragma,if-none-match,range",
    "own": "accept,cancel-after,idempotency-key,inference-header-content-length,last-event-id,prefer,"
    "x-api-key,x-request-id",
    "later": "x-no-one-has-thought-of-yet",
}


@pytest.mark.parametrize("headers", HEADERS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE"])
async def test_a_page_of_an_allowed_site_may_send_any_header(
    method: str, headers: str, page: httpx.AsyncClient
) -> None:
    response = await preflight(page, "/generate", method, HEADERS[headers])
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == SITE
    assert set(HEADERS[headers].split(",")) <= set(response.headers["access-control-allow-headers"].split(","))
    assert method in response.headers["access-control-allow-methods"]


async def test_a_public_page_may_call_a_service_of_a_private_network(page: httpx.AsyncClient) -> None:
    asked = {"Access-Control-Request-Private-Network": "true"}
    response = await preflight(page, "/generate", "POST", "content-type", **asked)
    assert response.status_code == 200 and response.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("origin", OTHERS)
async def test_a_page_of_another_site_may_not(origin: str, page: httpx.AsyncClient) -> None:
    response = await preflight(page, "/generate", "POST", "content-type", Origin=origin)
    assert response.status_code == 400 and "access-control-allow-origin" not in response.headers
    read = await page.get("/models", headers={"Origin": origin})
    assert read.status_code == 200 and "access-control-allow-origin" not in read.headers
    assert read.headers["cross-origin-resource-policy"] == "same-origin"
    assert (await page.post("/generate", json={"prompt": PROMPT}, headers={"Origin": origin})).status_code == 403


async def test_a_page_can_read_every_answer(
    page: httpx.AsyncClient, producer: FileProducer, app: FastAPI, bundle_dirs: tuple[Path, ...]
) -> None:
    seen = []

    def read(response: httpx.Response) -> None:
        assert response.headers["access-control-allow-origin"] == SITE, response.status_code
        assert "x-job-id" in response.headers["access-control-expose-headers"].lower()
        assert "Origin" in response.headers["vary"]
        assert response.headers["cross-origin-resource-policy"] == "cross-origin"
        seen.append(response.status_code)

    read(await page.post("/generate", json={"prompt": PROMPT}))
    read(await page.post("/generate", json={"prompt": PROMPT}, headers={"Prefer": "respond-async"}))
    read(await page.post("/generate", json={}))
    read(await page.post("/generate", content=b"{", headers={"Content-Type": "application/json"}))
    read(await page.post("/generate", content=b"x", headers={"Content-Type": "text/plain"}))
    read(await page.post("/upscale", content=bytes(2 << 20)))  # over the limit, by its Content-Length
    read(await page.get("/nothing"))
    read(await page.get("/generate"))
    read(await page.get("/models", headers={"X-Long": "x" * 40_000}))
    producer.refusal = QueueFull("full", retry_after_s=3)
    read(await page.post("/generate", json={"prompt": PROMPT}))
    producer.refusal, producer.outage = None, NotReady("Redis does not answer")
    read(await page.post("/generate", json={"prompt": PROMPT}))
    read(await page.get("/readyz"))
    producer.outage = RuntimeError("a fault of ours")  # type: ignore[assignment]
    read(await page.post("/generate", json={"prompt": PROMPT}))
    app.state.giantleap = None
    read(await page.get("/models"))
    assert seen == [200, 202, 422, 400, 415, 413, 404, 405, 431, 429, 503, 503, 500, 500]


async def test_a_page_can_read_what_the_door_refuses(bundle_dirs: tuple[Path, ...], tmp_path: Path) -> None:
    key, digest = new_key()
    keys = tmp_path / "keys.toml"
    keys.touch(mode=0o600)
    keys.write_text(f'[[key]]\nname = "a"\nsha256 = "{digest}"\nscopes = ["generate"]\nrequests_per_minute = 1\n')
    app = build_app(FileProducer(), bundle_dirs, cors_origins=SITE, api_keys_file=keys)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://giantleap", headers={"Origin": SITE}
    ) as page:
        assert (await preflight(page, "/generate", "POST", "authorization")).status_code == 200, "it carries no key"
        bearer = {"Authorization": f"Bearer {key}"}
        responses = [
            await page.get("/models"),
            await page.post("/upscale", content=b"x", headers=bearer),
            await page.post("/generate", json={"prompt": PROMPT}, headers=bearer),
            await page.post("/generate", json={"prompt": PROMPT}, headers=bearer),
        ]
    assert [response.status_code for response in responses] == [401, 403, 200, 429]
    for response in responses:
        assert response.headers["access-control-allow-origin"] == SITE


async def test_files_may_be_shown_by_other_sites_only_where_some_are_allowed(
    page: httpx.AsyncClient, bundle_dirs: tuple[Path, ...]
) -> None:
    def policy(response: httpx.Response) -> str:
        assert response.status_code == 200
        return str(response.headers["cross-origin-resource-policy"])

    job = (await page.post("/generate", json={"prompt": PROMPT})).json()
    del page.headers["Origin"]  # <img> sends none
    for path in (job["result_url"], f"/v1/images/{job['id']}/content"):
        assert policy(await page.get(path)) == policy(await page.head(path)) == "cross-origin"
    assert policy(await page.get(job["status_url"])) == "same-origin"
    closed = build_app(FileProducer(), bundle_dirs)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(closed), base_url="http://giantleap") as client:
        job = (await client.post("/generate", json={"prompt": PROMPT})).json()
        assert policy(await client.get(job["result_url"])) == "same-origin"


def test_an_origin_is_compared_as_browsers_send_it() -> None:
    origins = "HTTPS://App.Example.org, https://b.example:443, http://c.example:80, http://d.example:443"
    assert read_settings(cors_origins=origins).cors_origins == (
        *("https://app.example.org", "https://b.example", "http://c.example", "http://d.example:443"),
    )
