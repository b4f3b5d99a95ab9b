"""The processes of a chaos run and what is done to them: an API process, fake workers, a journal, clients that retry.

Every process is ended by its id. `tests.chaos.judge` says afterwards whether each accepted job ended exactly once.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
from safetensors.numpy import save

from giantleap.models.worker_role import WorkerRole
from giantleap.service.settings import Settings, to_environment
from tests.chaos.chaos_worker import LONG_SEED
from tests.service.paper_bundle import CHANNELS

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("chaos_worker.py")
_START_S = 120.0
LARGE_SIDE = 256
"""Side of a latent that is larger than what goes to Redis where there is a result store."""


class Note(NamedTuple):
    """A line of the journal."""

    what: str
    job_id: str
    delivery: int
    pid: int
    at_s: float


@dataclass
class ProcessManager:
    """An API process and workers, started with the settings' environment; their roles are those of `pools` in turn."""

    settings: Settings
    journal: Path
    pools: tuple[WorkerRole, ...] = (WorkerRole.ALL,)
    workers: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    killed_pids: list[int] = field(default_factory=list)
    _api: "subprocess.Popen[bytes] | None" = None
    _notes: list[Note] = field(default_factory=list)
    _read_bytes: int = 0
    _roles: dict[int, WorkerRole] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._environment = {**os.environ, **to_environment(self.settings), "PYTHONPATH": str(ROOT)}

    def start(self, workers: int) -> None:
        self.journal.touch()
        command = [sys.executable, "-m", "giantleap", "api"]
        self._api = subprocess.Popen(command, env=self._environment, cwd=ROOT)
        for number in range(workers):
            self.start_worker(self.pools[number % len(self.pools)])

    def start_worker(self, role: WorkerRole) -> None:
        command = [sys.executable, str(WORKER), str(self.journal)]
        environment = {**self._environment, "GIANTLEAP_ROLE": role}
        self.workers.append(subprocess.Popen(command, env=environment, cwd=ROOT))
        self._roles[self.workers[-1].pid] = role

    def kill_worker(self, worker: "subprocess.Popen[bytes]") -> None:
        """SIGKILL, and another of its pool in its place."""
        assert worker.poll() is None, f"worker {worker.pid} had ended by itself with code {worker.returncode}"
        worker.kill()
        worker.wait()
        self.workers.remove(worker)
        self.killed_pids.append(worker.pid)
        self.start_worker(self._roles[worker.pid])

    def stop(self) -> None:
        for worker in self.workers:
            worker.send_signal(signal.SIGCONT)
            worker.kill()
            worker.wait()
        if self._api is not None:
            self._api.terminate()
            self._api.wait(60)

    def notes(self) -> list[Note]:
        """The journal so far."""
        with self.journal.open("rb") as file:
            file.seek(self._read_bytes)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.decode().splitlines():
            what, job_id, delivery, pid, at_s = line.split()
            self._notes.append(Note(what, job_id, int(delivery), int(pid), float(at_s)))
        return self._notes

    def count(self, what: str) -> int:
        return sum(note.what == what for note in self.notes())


@dataclass
class Clients:
    """Posts jobs, each under its own Idempotency-Key, again and again until it is accepted."""

    url: str
    number: int
    seed: int
    with_large_inputs: bool = False
    accepted: dict[int, str] = field(default_factory=dict)
    accepted_at_s: dict[str, float] = field(default_factory=dict)
    refusals: Counter[str] = field(default_factory=Counter)

    async def run(self) -> None:
        """Returns when every job was accepted."""
        waiting = list(range(self.number - 1, -1, -1))
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
            await self._await_ready(client)

            async def post_all() -> None:
                while waiting:
                    await self._post(client, waiting.pop())

            await asyncio.gather(*(post_all() for _ in range(16)))

    async def _await_ready(self, client: httpx.AsyncClient) -> None:
        deadline_s = time.monotonic() + _START_S
        while True:
            try:
                if (await client.get("/readyz")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline_s, "the API was not ready in time"
            await asyncio.sleep(0.1)

    async def _post(self, client: httpx.AsyncClient, index: int) -> None:
        request = self._to_request(client, index)
        while True:
            try:
                answer = await client.send(request)
            except httpx.TransportError as error:
                self.refusals[type(error).__name__] += 1
            else:
                if answer.status_code == 202:
                    self.accepted[index] = answer.json()["id"]
                    self.accepted_at_s[self.accepted[index]] = time.monotonic()
                    return
                self.refusals[str(answer.status_code)] += 1
                assert answer.status_code in (429, 503), f"{answer.status_code}: {answer.text[:300]}"
            await asyncio.sleep(0.1)  # sooner than Retry-After says: this client is a rude one

    def _to_request(self, client: httpx.AsyncClient, index: int) -> httpx.Request:
        dice = random.Random(f"{self.seed}-{index}")
        headers = {"Idempotency-Key": f"chaos-{self.seed}-{index}", "Prefer": "respond-async"}
        priority = dice.choice(("high", "high", "low"))
        if index % 4 == 3:
            side = LARGE_SIDE if index % 40 == 3 and self.with_large_inputs else 4
            body = save({"latent": np.full((CHANNELS, side, side), index + 1 / 3, np.float32)})  # not exact in float16
            headers["Content-Type"] = "application/x-safetensors"
            return client.build_request("POST", f"/upscale?priority={priority}", content=body, headers=headers)
        seed = LONG_SEED if index == 0 else index
        fields = {"prompt": "a red sphere", "seed": seed, "steps": dice.randint(1, 50), "priority": priority}
        return client.build_request("POST", "/generate", json=fields, headers=headers)
