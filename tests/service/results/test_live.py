"""The API with a store, over sockets: files and a real server of S3, redirects, faults, and what a full start says."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import pytest

from giantleap.service.api.app import create_app
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobs.job import JobError, ResultFile
from giantleap.service.results.store import open_store
from giantleap.service.settings import Settings
from giantleap_client import Client
from tests.s3_server import S3Server, fetch
from tests.service.live_server import live_server
from tests.service.paper_bundle import write_paper_bundle
from tests.service.thread_worker import thread_worker

FILES = [(ResultFile("image/png", 4, 7, 2, 2), b"\x89PNG"), (ResultFile("image/webp", 3, 8, 2, 2), b"web")]


@dataclass
class Service:
    """A running API with a worker; `ends` is what the worker made of each job."""

    client: httpx.Client
    settings: Settings
    ends: list[str] = field(default_factory=list)

    def end(self, consumer: JobConsumer, claim: Claim) -> None:
        try:
            self.ends.append(str(consumer.complete(claim, FILES, {}, [])))
        except Exception as error:  # noqa: BLE001  # as the worker's loop does
            code = getattr(error, "code", "")
            self.ends.append(code)
            consumer.fail(claim, JobError(code, "fault", getattr(error, "retryable", False)))

    def create(self) -> str:
        body = {"prompt": "a red ball", "num_images": 2, "seed": 7}
        return str(self.client.post("/generate", json=body).raise_for_status().json()["id"])

    def files(self) -> list[str]:
        store = open_store(self.settings)
        assert store is not None
        return [name for batch in store.list_expired(self.settings.key_prefix, 1e10) for name in batch]


@contextlib.contextmanager
def running(settings: Settings, tmp_path: Path) -> Iterator[Service]:
    bundle = write_paper_bundle(tmp_path / "paper")
    served = settings.model_copy(update={"bundle": (bundle,)})
    with live_server(create_app(served)) as url, httpx.Client(base_url=url, timeout=60) as client:
        service = Service(client, served)
        with thread_worker(served, "paper", service.end):
            yield service


@pytest.fixture
def service(settings: Settings, tmp_path: Path) -> Iterator[Service]:
    with running(settings, tmp_path) as found:
        yield found


def test_results_are_served_as_from_redis_and_deleted_with_their_job(service: Service) -> None:
    job = service.create()
    answers = [service.client.get(f"/jobs/{job}/result?index={index}") for index in range(2)]
    assert [(each.content, each.headers["content-type"]) for each in answers] == [
        (b"\x89PNG", "image/png"),
        (b"web", "image/webp"),
    ]
    head = service.client.head(f"/jobs/{job}/result")
    assert (head.status_code, head.content) == (200, b"")
    compared = ("content-length", "content-type", "x-seed", "cache-control")
    assert [head.headers[name] for name in compared] == [answers[0].headers[name] for name in compared]
    assert service.client.get(f"/jobs/{job}/results").headers["content-type"] == "application/zip"
    assert service.client.get("/readyz").status_code == 200
    body = service.client.get(f"/jobs/{job}").text
    assert len(service.files()) == 2 and not any(name in body for name in service.files()), "keys are internal"
    assert service.client.delete(f"/jobs/{job}").status_code == 204
    assert service.files() == []
    assert service.client.get(f"/jobs/{job}/result").status_code == 404


@pytest.mark.parametrize("path", ["..%2f..%2fetc%2fpasswd", "../../../etc/passwd", f"{uuid.UUID(int=1)}/../x", "%00"])
def test_no_path_of_a_request_becomes_a_path_of_the_store(service: Service, path: str) -> None:
    for answer in (service.client.get(f"/jobs/{path}/result"), service.client.delete(f"/jobs/{path}")):
        assert answer.status_code in (404, 405)


@pytest.mark.parametrize("store_url", ["file"], indirect=True)
def test_a_directory_that_cannot_be_used_is_503_and_unready_until_it_can(service: Service) -> None:
    job = service.create()
    assert service.settings.result_store is not None
    root = Path(unquote(urlsplit(service.settings.result_store).path))
    aside = root.with_name("aside")
    root.rename(aside)
    root.write_text("no directory")
    answer = service.client.get(f"/jobs/{job}/result")
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert int(answer.headers["retry-after"]) >= 1 and str(root) not in answer.text
    ready = service.client.get("/readyz")
    assert ready.status_code == 503 and "directory of results" in ready.json()["reasons"][0]
    failed = service.client.post("/generate", json={"prompt": "a red ball"})
    assert (failed.status_code, failed.json()["code"]) == (503, "store_unavailable")
    assert service.ends[1:] == ["store_unavailable"] * service.settings.max_deliveries, "retried, then failed"
    root.unlink()
    shutil.move(aside, root)
    assert service.client.get("/readyz").status_code == 200
    assert service.client.get(f"/jobs/{job}/result").content == b"\x89PNG"


@pytest.mark.parametrize("store_url", ["s3"], indirect=True)
def test_a_get_of_a_result_redirects_to_a_presigned_url(settings: Settings, tmp_path: Path, s3: S3Server) -> None:
    presigned = settings.model_copy(update={"result_urls": "presigned"})
    with running(presigned, tmp_path) as service:
        job = service.create()
        for method in ("GET", "HEAD"):
            answer = service.client.request(method, f"/jobs/{job}/result?index=1")
            assert (answer.status_code, answer.headers["cache-control"]) == (307, "no-store")
            assert answer.headers["x-seed"] == "8" and answer.content == b""
            location = answer.headers["location"]
            assert location.startswith(s3.environment["AWS_ENDPOINT"])
            assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in location
            fetched = fetch(location, method)
            assert (fetched.status_code, fetched.headers["content-type"]) == (200, "image/webp")
            assert fetched.content == (b"web" if method == "GET" else b"")
        part = httpx.get(service.client.get(f"/jobs/{job}/result").headers["location"], headers={"Range": "bytes=1-"})
        assert (part.status_code, part.content) == (206, b"PNG")
        assert service.client.get(f"/v1/images/{job}/content").status_code == 307
        answer = service.client.get(f"/jobs/{job}/result", headers={"Prefer": "return=representation"})
        assert (answer.status_code, answer.content) == (200, b"\x89PNG"), "as the page asks"
        with Client(str(service.client.base_url), api_key="a-key-that-s3-would-refuse") as client:
            assert client.send("GET", f"jobs/{job}/result", index=1) == b"web"
        assert service.client.get(f"/jobs/{job}/results").status_code == 200, "a zip passes the API"
        answer = service.client.post("/generate", json={"prompt": "a ball"}, headers={"Accept": "image/png"})
        assert (answer.status_code, answer.content) == (200, b"\x89PNG"), "who waits gets the file itself"


@pytest.mark.parametrize("store_url", ["file"], indirect=True)
def test_results_of_redis_stay_readable_when_a_store_is_set_later(settings: Settings, tmp_path: Path) -> None:
    with running(settings.model_copy(update={"result_store": "redis"}), tmp_path) as before:
        job = before.create()
    with running(settings, tmp_path / "later") as after:
        assert after.client.get(f"/jobs/{job}/result").content == b"\x89PNG"
        stored = after.create()
    with running(settings.model_copy(update={"result_store": None}), tmp_path / "back") as back:
        answer = back.client.get(f"/jobs/{stored}/result")
        assert answer.status_code == 503 and "GIANTLEAP_RESULT_STORE" in answer.json()["detail"]
