"""Deleting jobs, dead letters, results together, and the commands for them: the real API on a real queue."""

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from safetensors.numpy import save
from typer.testing import CliRunner, Result

from giantleap.cli.main import app as commands
from giantleap.service.api.app import create_app
from giantleap.service.auth import new_key
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobs.job import JobError, ResultFile
from giantleap.service.settings import Settings
from tests.service.compat_fakes import LATENT
from tests.service.live_server import live_server
from tests.service.paper_bundle import write_paper_bundle

ASYNC = {"Prefer": "respond-async"}
FAULT = JobError("engine_error", "the engine raised RuntimeError")
FILES = [ResultFile("image/png", 4, 7, 2, 2), ResultFile("image/jpeg", 4, 8, 2, 2)]


@dataclass
class Service:
    """A running API, its queue, and a worker that does what the test says."""

    url: str
    client: httpx.Client
    worker: JobConsumer
    redis: redis.Redis
    tag: str

    def create(self, **fields: Any) -> str:
        answer = self.client.post("/generate", json={"prompt": "a secret wish", **fields}, headers=ASYNC)
        return str(answer.raise_for_status().json()["id"])

    def claim(self) -> Claim:
        (claim,) = self.worker.claim(1, 30.0)
        return claim

    def succeed(self) -> None:
        self.worker.complete(
            self.claim(), [(FILES[0], b"\x89PNG"), (FILES[1], b"\xff\xd8\xff\xe0")], {"decode": 1.0}, []
        )

    def fail(self) -> Claim:
        claim = self.claim()
        self.worker.fail(claim, FAULT)
        return claim

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(commands, [*arguments, "--url", self.url])

    def keys_with(self, text: str) -> list[str]:
        """The keys of the deployment that hold a text, whatever their type."""
        found = []
        for key in self.redis.scan_iter(f"{self.tag}*"):
            dumped: Any = self.redis.dump(key)
            if text.encode() in dumped or text in key.decode():
                found.append(key.decode())
        return found


@pytest.fixture
def service(settings: Settings, open_consumer: Any, redis_client: redis.Redis, tmp_path: Path) -> Iterator[Service]:
    bundle = write_paper_bundle(tmp_path / "paper")
    served = settings.model_copy(update={"bundle": (bundle,)})
    worker = open_consumer(bundles=("paper",))
    with live_server(create_app(served)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield Service(url, client, worker, redis_client, Keys(settings.key_prefix).tag)


def test_a_deleted_job_leaves_nothing_of_its_caller(service: Service) -> None:
    job_id = service.create(num_images=2)
    service.succeed()
    assert service.client.get(f"/jobs/{job_id}/result").content == b"\x89PNG"
    assert service.client.delete(f"/jobs/{job_id}").status_code == 204
    for path in ("", "/result", "/results", "/events"):
        assert service.client.get(f"/jobs/{job_id}{path}").status_code == 404
    assert service.client.delete(f"/jobs/{job_id}").status_code == 404
    assert service.client.get("/jobs").json()["jobs"] == []
    assert service.keys_with(job_id) == [f"{service.tag}:job:{job_id}"], "the id, so that it is not used again"
    left: Any = service.redis.hgetall(f"{service.tag}:job:{job_id}")
    assert b"secret" not in b"".join(left.values()) and service.redis.ttl(f"{service.tag}:job:{job_id}") > 0
    assert service.redis.get(f"{service.tag}:blob_bytes") == b"0"


def test_delete_cancels_what_has_not_ended_and_cancel_never_deletes(service: Service) -> None:
    queued, running = service.create(), service.create()
    answer = service.client.delete(f"/jobs/{queued}")
    assert (answer.status_code, answer.json()["status"]) == (200, "canceled")
    claim = service.claim()
    assert claim.job.id == running
    answer = service.client.delete(f"/jobs/{running}")
    assert (answer.status_code, answer.json()["status"], answer.json()["cancel_requested"]) == (200, "processing", True)
    service.worker.complete(claim, [(FILES[0], b"\x89PNG")], {}, [])
    assert service.client.get(f"/jobs/{running}").json()["status"] == "canceled"
    done = service.create()
    service.succeed()
    assert service.client.post(f"/jobs/{done}/cancel").status_code == 409
    assert service.client.get(f"/jobs/{done}/result").status_code == 200


def test_an_id_that_was_deleted_before_its_message_was_met_runs_no_second_job(service: Service) -> None:
    job_id = "9ffc72bd-eedb-4a4b-8709-584d01415be4"
    for status in (202, 404):
        answer = service.client.put(f"/jobs/{job_id}", json={"prompt": "a"}, headers=ASYNC)
        assert answer.status_code == status, answer.text
        assert service.client.delete(f"/jobs/{job_id}").status_code == (200 if status == 202 else 404)
        service.client.delete(f"/jobs/{job_id}")
    other = service.create()
    assert service.claim().job.id == other and service.worker.claim(1, 0.1) == []


def test_all_results_come_in_one_zip_file(service: Service) -> None:
    job_id = service.create(num_images=2)
    assert service.client.get(f"/jobs/{job_id}/results").status_code == 409
    service.succeed()
    answer = service.client.get(f"/jobs/{job_id}/results")
    assert answer.headers["content-type"] == "application/zip" and job_id in answer.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {
            "0.png": b"\x89PNG",
            "1.jpeg": b"\xff\xd8\xff\xe0",
        }
    assert service.client.get(f"/jobs/{job_id}/results").content == answer.content


def test_a_dead_letter_is_retried_as_a_new_job_with_its_input(service: Service) -> None:
    latent = save({"latent": LATENT})
    headers = ASYNC | {"Content-Type": "application/x-safetensors"}
    job_id = service.client.post("/upscale?scale=2", content=latent, headers=headers).json()["id"]
    failed = service.fail()
    (letter,) = service.client.get("/dead-letters").json()["dead_letters"]
    assert (letter["id"], letter["bundle"], letter["blocked_reason"]) == (job_id, "paper", None)
    assert letter["error"]["code"] == "job_failed" and "secret" not in json.dumps(letter)
    answer = service.client.post(f"/dead-letters/{job_id}/retry")
    assert answer.status_code == 202 and answer.headers["location"] == f"/jobs/{answer.json()['id']}"
    again = service.claim()
    assert again.job.id == answer.json()["id"] != job_id and again.body == failed.body and again.delivery == 1
    assert service.client.get("/dead-letters").json()["dead_letters"] == []
    assert service.client.post(f"/dead-letters/{job_id}/retry").status_code == 404
    assert service.client.get(f"/jobs/{job_id}").json()["status"] == "failed", "an end is an end"
    service.worker.complete(again, [], {}, [])
    assert service.client.delete(f"/jobs/{job_id}").status_code == 204
    assert service.redis.get(f"{service.tag}:blob_bytes") == b"0", "the input of the failed job is gone with it"


def test_a_dead_letter_whose_job_was_deleted_or_dropped_is_gone(service: Service) -> None:
    deleted = service.create()
    service.fail()
    dropped = service.create()
    service.fail()
    assert [each["id"] for each in service.client.get("/dead-letters").json()["dead_letters"]] == [dropped, deleted]
    assert service.client.delete(f"/jobs/{deleted}").status_code == 204
    assert service.client.delete(f"/dead-letters/{dropped}").status_code == 204
    assert service.client.get("/dead-letters").json()["dead_letters"] == []
    assert service.client.delete(f"/dead-letters/{dropped}").status_code == 404
    assert service.client.get(f"/jobs/{dropped}").json()["status"] == "failed"


def test_a_dead_letter_that_cannot_be_retried_says_why(service: Service) -> None:
    headers = ASYNC | {"Content-Type": "application/x-safetensors"}
    job_id = service.client.post("/upscale", content=save({"latent": LATENT}), headers=headers).json()["id"]
    service.fail()
    service.redis.delete(f"{service.tag}:input:{job_id}")
    (letter,) = service.client.get("/dead-letters").json()["dead_letters"]
    assert letter["blocked_reason"] == "its input has expired, or went to make room"
    answer = service.client.post(f"/dead-letters/{job_id}/retry")
    assert answer.status_code == 409 and "its input has expired" in answer.json()["detail"]
    service.redis.delete(f"{service.tag}:job:{job_id}")
    (letter,) = service.client.get("/dead-letters").json()["dead_letters"]
    assert letter["blocked_reason"] == "its record has expired"


def test_dead_letters_are_for_operators_only(settings: Settings, tmp_path: Path) -> None:
    keys = {}
    lines = []
    for name, scope in (("user", "generate"), ("operator", "admin")):
        keys[name], digest = new_key()
        lines.append(f'[[key]]\nname = "{name}"\nsha256 = "{digest}"\nscopes = ["{scope}"]\n')
    file = tmp_path / "keys.toml"
    file.write_text("".join(lines))
    file.chmod(0o600)
    bundle = write_paper_bundle(tmp_path / "paper")
    served = settings.model_copy(update={"api_keys_file": file, "bundle": (bundle,)})
    with live_server(create_app(served)) as url, httpx.Client(base_url=url, timeout=60) as client:
        for method, path in (("GET", ""), ("POST", "/x/retry"), ("DELETE", "/x")):
            sent = {name: {"X-API-Key": key} for name, key in keys.items()}
            assert client.request(method, f"/dead-letters{path}", headers=sent["user"]).status_code == 403
            assert client.request(method, f"/dead-letters{path}").status_code == 401
        assert client.get("/dead-letters", headers={"X-API-Key": keys["operator"]}).status_code == 200
        assert client.get("/version").status_code == 200 and client.get("/health").status_code == 503
        ended = CliRunner().invoke(commands, ["status", "--url", url])
        assert ended.exit_code == 1 and "not ready: no worker is ready" in ended.output
        ended = CliRunner().invoke(commands, ["jobs", "list", "--url", url])
        assert ended.exit_code == 1 and "send an API key" in ended.output
        environment = {"GIANTLEAP_API_KEY": keys["operator"], "GIANTLEAP_API_URL": url}
        assert CliRunner(env=environment).invoke(commands, ["jobs", "list"]).exit_code == 0


def test_the_commands_follow_cancel_and_delete_jobs(service: Service) -> None:
    first, second = service.create(), service.create()
    listed = service.run("jobs", "list")
    assert listed.exit_code == 0 and [line.split()[0] for line in listed.output.splitlines()] == [second, first]
    assert json.loads(service.run("jobs", "show", first).output)["id"] == first
    assert service.run("jobs", "cancel", first).output == f"{first}  canceled\n"
    assert service.run("jobs", "delete", first).output == f"{first}  deleted\n"
    assert service.run("jobs", "delete", second).output == f"{second}  cancel requested\n"
    missing = service.run("jobs", "show", first)
    assert (
        missing.exit_code == 1
        and missing.output.startswith("giantleap: no such job")
        and missing.output.count("\n") == 1
    )
    dead = service.create()
    service.fail()
    assert service.run("jobs", "dead", "list").output.split()[0] == dead
    retried = service.run("jobs", "dead", "retry", dead).output.strip()
    assert service.client.get(f"/jobs/{retried}").json()["status"] == "queued"
    service.fail()
    assert service.run("jobs", "dead", "drop", retried).output == f"{retried}  dropped\n"


def test_status_prints_the_queue_and_the_workers(service: Service) -> None:
    service.create()
    lines = service.run("status").output.splitlines()
    assert lines[0].startswith("giantleap ") and lines[0].endswith("ready")
    assert lines[1].startswith("queue    1 waiting, 0 running, 0 delayed, of 256; 0 dead letters")
    assert lines[2] == "workers  1 live" and lines[3].startswith("storage  0 of ")
    ended = CliRunner().invoke(commands, ["status", "--url", "http://127.0.0.1:1"])
    assert ended.exit_code == 1 and ended.output.count("\n") == 1 and "does not answer (ConnectError)" in ended.output


def test_probes_name_the_version_and_the_readiness(service: Service) -> None:
    assert service.client.get("/version").json()["version"]
    health, ready = (service.client.get(path).json() for path in ("/health", "/readyz"))
    assert health == ready and (ready["ready"], ready["reasons"]) == (True, [])


def test_a_wait_that_ends_too_early_names_where_the_job_is(settings: Settings, tmp_path: Path) -> None:
    bundle = write_paper_bundle(tmp_path / "paper")
    served = settings.model_copy(update={"bundle": (bundle,), "wait_timeout_s": 0.2})
    with live_server(create_app(served)) as url:
        answer = httpx.post(f"{url}/generate", json={"prompt": "a"}, timeout=60)
        assert answer.status_code == 504 and answer.headers["location"] == answer.json()["status_url"]
        metrics = httpx.get(f"{url}/metrics", timeout=60).text
    assert 'giantleap_rejections_total{reason="wait_timeout"} 1.0' in metrics
