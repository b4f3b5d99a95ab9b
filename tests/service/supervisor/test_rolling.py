"""SIGHUP to `giantleap serve` restarts every process while jobs keep arriving, with the settings of its file.

A file that is wrong changes nothing; a bundle that is broken stops one worker only.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from giantleap.service.supervisor.embedded_redis import free_port

pytestmark = pytest.mark.slow
TIMEOUT_S = 180.0
REQUEST = {"prompt": "a red ball", "width": 128, "height": 128, "scale": 2, "steps": 2}


def until(holds: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline_s, f"never: {what}"
        time.sleep(0.05)


class Service:
    """A running `giantleap serve`, its log and its children."""

    def __init__(self, bundle: Path, directory: Path, **variables: str) -> None:
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", directory / "log"
        command = [
            sys.executable,
            "-m",
            "giantleap",
            "serve",
            "--port",
            str(port),
            "--data-dir",
            str(directory / "data"),
        ]
        environment = {**os.environ, "GIANTLEAP_BUNDLE": str(bundle), "GIANTLEAP_TORCH_THREADS": "1", **variables}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stderr=log)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def pids(self) -> set[int]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = set()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
                if {"api", "worker"} & set(child.cmdline()):
                    found.add(child.pid)
        return found

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"giantleap_{name} "))

    def count(self, text: str) -> int:
        return self.log.read_text().count(text)


@contextmanager
def serving(bundle: Path, directory: Path, **variables: str) -> Iterator[Service]:
    service = Service(bundle, directory, **variables)
    try:
        until(service.ready, "ready")
        yield service
        service.process.terminate()
        assert service.process.wait(60) == 0
    finally:
        service.process.kill()
        service.process.wait()


class Clients:
    """Sends jobs without pause until it is stopped; a 503 is retried, as the API says."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self.jobs: list[str] = []
        self.errors: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Clients":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            try:
                answer = httpx.post(
                    f"{self._url}/generate", json=REQUEST, headers={"Prefer": "respond-async"}, timeout=60
                )
            except httpx.TransportError as error:
                self.errors.append(repr(error))
                continue
            if answer.status_code == 202:
                self.jobs.append(answer.json()["id"])
            elif answer.status_code not in (429, 503):
                self.errors.append(answer.text)


def state(url: str, job_id: str) -> dict[str, Any]:
    body: dict[str, Any] = httpx.get(f"{url}/jobs/{job_id}", timeout=60).json()
    return body


def test_every_process_is_restarted_and_no_job_is_lost(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle_dir, tmp_path) as service:
        old = service.pids()
        with Clients(service.url) as clients:
            until(lambda: len(clients.jobs) > 3, "jobs before")
            service.process.send_signal(signal.SIGHUP)
            until(lambda: service.count("restarted ") == 2, "a worker and an API process are restarted")
            assert not old & service.pids()
            sent = len(clients.jobs)
            until(lambda: len(clients.jobs) > sent + 3, "jobs after")
        assert not clients.errors
        for job_id in clients.jobs:
            until(lambda job_id=job_id: state(service.url, job_id)["status"] == "succeeded", job_id)  # type: ignore[misc]
        assert service.ready()


def test_a_bundle_that_is_broken_meanwhile_stops_one_worker_only(tiny_bundle_dir: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle_dir, tmp_path / "tiny")
    with serving(bundle, tmp_path, GIANTLEAP_WORKER_PROCESSES="2") as service:
        weights = (bundle / "lua.safetensors").rename(tmp_path / "lua.safetensors")
        service.process.send_signal(signal.SIGHUP)
        until(lambda: service.count("worker-0 ended with code 2") > 0, "the first worker cannot start")
        assert service.count("worker-1 ended") == 0 and service.ready()
        answer = httpx.post(f"{service.url}/generate", json=REQUEST, timeout=TIMEOUT_S)
        assert answer.status_code == 200
        weights.rename(bundle / "lua.safetensors")
        until(lambda: service.count("restarted ") == 3, "both workers and the API process are restarted")


def ends(service: Service) -> list[tuple[str, str]]:
    """The id and the status of each job that a worker ended, from the log."""
    lines = [json.loads(line) for line in service.log.read_text().splitlines() if '"job ended"' in line]
    return [(line["job_id"], line["status"]) for line in lines]


def test_settings_of_the_file_are_in_force_after_sighup_and_jobs_end_once(
    tiny_bundle_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("queue_limit = 40\nbatch_items = 1\n")
    with serving(tiny_bundle_dir, tmp_path, GIANTLEAP_SETTINGS_FILE=str(path)) as service:
        assert service.metric("queue_limit") == 40
        old = service.pids()

        path.write_text("queue_limit = -1\n")
        service.process.send_signal(signal.SIGHUP)
        until(lambda: service.count("settings not reloaded, the old ones stay: queue_limit: ") == 1, "it is refused")
        assert service.pids() == old and service.metric("queue_limit") == 40

        path.write_text('queue_limit = 3\nbatch_items = 2\nkey_prefix = "other"\n')
        with Clients(service.url) as clients:
            until(lambda: len(clients.jobs) > 3, "jobs before")
            service.process.send_signal(signal.SIGHUP)
            until(lambda: service.count("restarted ") == 2, "a worker and an API process are restarted")
            sent = len(clients.jobs)
            until(lambda: len(clients.jobs) > sent + 3, "jobs after")
        assert service.metric("queue_limit") == 3
        assert service.count("only a restart applies it: key_prefix") == 1
        assert not clients.errors
        for job_id in clients.jobs:
            until(lambda job_id=job_id: state(service.url, job_id)["status"] == "succeeded", job_id)  # type: ignore[misc]
        until(lambda: len(ends(service)) >= len(clients.jobs), "every end is in the log")
        assert sorted(ends(service)) == sorted((job_id, "succeeded") for job_id in clients.jobs)
        assert len(list((tmp_path / "data" / "results").rglob("*.result-*"))) == len(clients.jobs)
