"""Signed URLs: each opens its one file or stream of events until it expires, for whoever holds it, and nothing else."""

import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx
import pytest

from giantleap.service.auth import new_key
from giantleap.service.jobs.job import JobEvent
from giantleap.service.links import UrlSigner
from giantleap.service.settings import read_settings
from tests.service.compat_fakes import FileProducer, build_app

SECRET = "a-secret-of-thirty-two-characters"
PROMPT = "a red sphere on a green floor"
EVENTS = [JobEvent("1-0", "started", {}), JobEvent("2-0", "done", {"state": "succeeded"})]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    made, lines = {}, []
    for name in ("alice", "bob"):
        key, digest = new_key()
        made[name] = {"Authorization": f"Bearer {key}"}
        lines.append(f'[[key]]\nname = "{name}"\nsha256 = "{digest}"\nscopes = ["generate", "upscale"]\n')
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.touch(mode=0o600)
    path.write_text("".join(lines))
    return made, path  # type: ignore[return-value]


@pytest.fixture(params=["", "/gl"], ids=["at the root", "below a path"])
async def client(
    request: pytest.FixtureRequest, keys: tuple[dict[str, Any], Path], bundle_dirs: tuple[Path, ...]
) -> AsyncIterator[httpx.AsyncClient]:
    producer = FileProducer(event_list=EVENTS)
    app = build_app(producer, bundle_dirs, api_keys_file=keys[1], url_secret=SECRET, root_path=request.param)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        yield client


@pytest.fixture
async def job(client: httpx.AsyncClient, keys: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    posted = await client.post("/generate", json={"prompt": PROMPT, "num_images": 2}, headers=keys[0]["alice"])
    found: dict[str, Any] = posted.json()
    return found


def change(url: str, **values: str) -> str:
    """The URL with other values in its query."""
    parts = urlsplit(url)
    return f"{parts.path}?{urlencode(dict(parse_qsl(parts.query)) | values)}"


async def test_the_urls_of_a_job_need_no_key(
    client: httpx.AsyncClient, job: dict[str, Any], keys: tuple[dict[str, Any], Path]
) -> None:
    image = await client.post(
        "/v1/images/generations", json={"prompt": PROMPT, "response_format": "url"}, headers=keys[0]["alice"]
    )
    for url in (*(result["url"] for result in job["results"]), job["result_url"], image.json()["data"][0]["url"]):
        for headers in ({}, keys[0]["alice"], keys[0]["bob"], {"X-API-Key": "gl_unknown"}):
            response = await client.get(url, headers=headers)
            assert response.status_code == 200 and response.headers["content-type"] == "image/png"
            assert response.headers["cross-origin-resource-policy"] == "cross-origin"
        assert (await client.head(url)).status_code == 200
    events = await client.get(job["events_url"])
    assert events.status_code == 200 and "event: done" in events.text
    assert (await client.get(job["events_url"], headers={"Last-Event-ID": "2-0"})).status_code == 204


async def test_a_signature_opens_nothing_but_its_own_url(
    client: httpx.AsyncClient, job: dict[str, Any], keys: tuple[dict[str, Any], Path]
) -> None:
    other = (await client.post("/generate", json={"prompt": PROMPT}, headers=keys[0]["alice"])).json()
    first, events = job["results"][0]["url"], job["events_url"]
    query = urlsplit(events).query
    wrong = [
        change(first, index="1"),
        change(first, expires="99999999999"),
        change(first, signature="0" * 64),
        change(first, signature=""),
        change(first, signature="\u00e9"),
        change(first, expires="soon"),
        change(first, more="1"),
        f"{first}&index=1",
        f"{first}&signature={'0' * 64}",
        f"{first}&expires=99999999999",
        first.replace("index=0&", ""),
        first.split("&signature")[0],
        first.replace(job["id"], other["id"]),
        first.upper(),
        f"{job['status_url']}?{query}",
        f"{job['status_url']}/result?{query}",
        f"{other['events_url'].split('?')[0]}?{query}",
        f"/models?{query}",
        f"/jobs?{query}",
    ]
    for url in wrong:
        response = await client.get(url)
        assert response.status_code == 401, url
        assert "signature=" not in response.text
    for method, url in (("DELETE", job["status_url"]), ("POST", job["cancel_url"]), ("POST", events), ("PUT", first)):
        assert (await client.request(method, f"{url.split('?')[0]}?{query}")).status_code == 401


async def test_the_order_of_the_query_does_not_matter(client: httpx.AsyncClient, job: dict[str, Any]) -> None:
    parts = urlsplit(job["result_url"])
    assert (await client.get(f"{parts.path}?{'&'.join(reversed(parts.query.split('&')))}")).status_code == 200


async def test_an_expired_url_says_so_and_the_key_still_opens_it(
    client: httpx.AsyncClient, job: dict[str, Any], keys: tuple[dict[str, Any], Path]
) -> None:
    expired = UrlSigner(SECRET.encode(), 60).sign(f"/jobs/{job['id']}/result?index=0", time.time() - 61)
    refused = await client.get(expired)
    assert refused.status_code == 401 and "expired" in refused.json()["detail"]
    assert (await client.get(expired, headers=keys[0]["alice"])).status_code == 200
    assert (await client.get(expired, headers=keys[0]["bob"])).status_code == 404, "a job of another key"
    forged = UrlSigner(b"another secret, as long", 60).sign(f"/jobs/{job['id']}/result?index=0", time.time())
    assert (await client.get(forged)).status_code == 401


async def test_no_log_line_has_a_signature(
    client: httpx.AsyncClient, job: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="giantleap")
    for url in (job["result_url"], change(job["result_url"], index="7"), change(job["events_url"], expires="1")):
        await client.get(url)
    signature = dict(parse_qsl(urlsplit(job["result_url"]).query))["signature"]
    lines = [str(record.__dict__) for record in caplog.records]
    assert lines and not any("signature" in line or signature in line for line in lines)


async def test_without_a_secret_urls_are_plain_and_signatures_open_nothing(
    keys: tuple[dict[str, Any], Path], bundle_dirs: tuple[Path, ...]
) -> None:
    app = build_app(FileProducer(), bundle_dirs, api_keys_file=keys[1])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        job = (await client.post("/generate", json={"prompt": PROMPT}, headers=keys[0]["alice"])).json()
        assert job["result_url"] == f"/jobs/{job['id']}/result?index=0"
        assert (await client.get(job["result_url"])).status_code == 401
        forged = UrlSigner(b"", 60).sign(job["result_url"], time.time())
        assert (await client.get(forged)).status_code == 401


async def test_signed_urls_work_without_keys_too(bundle_dirs: tuple[Path, ...]) -> None:
    app = build_app(FileProducer(), bundle_dirs, url_secret=SECRET)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://giantleap") as client:
        job = (await client.post("/generate", json={"prompt": PROMPT})).json()
        for url in (job["result_url"], job["result_url"].split("&expires")[0]):
            assert (await client.get(url)).status_code == 200


def test_the_secret_is_long_and_is_never_shown() -> None:
    with pytest.raises(ValueError, match="url_secret") as refused:
        read_settings(url_secret="too-short")
    assert "too-short" not in str(refused.value)
    assert SECRET not in repr(read_settings(url_secret=SECRET))
