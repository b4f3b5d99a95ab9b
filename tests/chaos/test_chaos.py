"""Thousands of jobs while workers are killed and frozen and Redis is killed or fails over: each ends exactly once.

Run by `make chaos`; each test prints its report and stores it in `benchmarks/results/chaos.json` with the machine.
"""

import asyncio
import json
import os
import platform
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from giantleap.models.worker_role import WorkerRole
from giantleap.service.jobqueue.client import cancel_tasks
from giantleap.service.jobqueue.faults import REDIS_UNAVAILABLE
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.results.store import open_store
from giantleap.service.settings import read_settings
from giantleap.service.supervisor.embedded_redis import free_port
from tests.chaos.files import StoredFiles
from tests.chaos.harness import ROOT, Clients, ProcessManager
from tests.chaos.judge import Verdict, judge
from tests.chaos.stores import OneServer, Replicated, Store
from tests.chaos.stores import open_store as open_redis_of
from tests.s3_server import BUCKET, S3Server
from tests.service.paper_bundle import write_paper_bundle

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]

REPORT = ROOT / "benchmarks" / "results" / "chaos.json"
SEED = int(os.environ.get("CHAOS_SEED", "20261121"))
PREFIX = "chaos"
WORKERS = 4
VISIBILITY_S = 5.0
# What a master that is killed may have promised and not yet sent to a replica: milliseconds on one machine.
FAILOVER_LOSS_S = 2.0
_END_S = 300.0
# Of the runs with a result store, which wait until it has passed; longer than such a run takes.
FILES_TTL_S = 240


class Run:
    """One run: its processes, its clients, and what was done to them."""

    def __init__(
        self,
        store: Store,
        root: Path,
        jobs: int,
        pools: tuple[WorkerRole, ...] = (WorkerRole.ALL,),
        **changes: object,
    ) -> None:
        self.store, self.jobs = store, jobs
        settings = read_settings(
            redis_url=store.url,
            key_prefix=PREFIX,
            port=free_port(),
            bundle=(write_paper_bundle(root / "paper"),),
            visibility_timeout_s=VISIBILITY_S,
            max_deliveries=10,
            log_level="error",
            **changes,
        )
        self.files: StoredFiles | None = None
        if (opened := open_store(settings)) is not None:
            self.files = StoredFiles(opened, PREFIX)
        self.fleet = ProcessManager(settings, root / "journal", pools)
        self.clients = Clients(f"http://127.0.0.1:{settings.port}", jobs, SEED, self.files is not None)
        self.done: Counter[str] = Counter()
        self.left: list[str] = []
        self._frozen = asyncio.Event()

    def execute(self, kills: int, harms: int, store_harms: int = 0, left_after_s: float | None = None) -> Verdict:
        """Everything from the first start to the judgment; stops all of it.

        With `left_after_s` it also waits so long until nothing is left in the result store: `left` names the rest.
        """
        started_s = time.monotonic()
        try:
            self.fleet.start(WORKERS)
            asyncio.run(self._scenario(self._plan(kills, harms, store_harms)))
            with open_redis_of(self.store) as client:
                accepted = list(self.clients.accepted.values())
                verdict = judge(client, PREFIX, accepted, self.fleet.notes(), self.fleet.killed_pids, self.files)
            if self.files is not None and left_after_s is not None:
                self.left = self.files.await_empty(left_after_s)
        finally:
            self.fleet.stop()
        self.duration_s = time.monotonic() - started_s
        return verdict

    async def _scenario(self, plan: list[tuple[int, str]]) -> None:
        with open_redis_of(self.store) as client:
            watching = asyncio.create_task(self._watch_files())
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.clients.run())
                tasks.create_task(self._freeze(client))
                tasks.create_task(self._harm(plan))
            await self._await_ends(client)
            await cancel_tasks([watching])
        await asyncio.sleep(1.0)  # a worker notes the end of its last job after the queue has it

    async def _watch_files(self) -> None:
        while self.files is not None:
            await asyncio.to_thread(self.files.look)
            await asyncio.sleep(0.2)

    def _plan(self, kills: int, harms: int, store_harms: int) -> list[tuple[int, str]]:
        """What is done after how many ends, in order, at random moments."""
        dice = random.Random(SEED)
        killed = [(moment, "worker kills") for moment in dice.sample(range(20, self.jobs - 50), kills)]
        harmed = [(moment, "Redis kills") for moment in dice.sample(range(100, self.jobs - 100), harms)]
        stores = [(moment, "store kills") for moment in dice.sample(range(50, self.jobs - 50), store_harms)]
        return sorted(killed + harmed + stores)

    async def _harm(self, plan: list[tuple[int, str]]) -> None:
        dice = random.Random(SEED + 1)
        await self._frozen.wait()
        for moment, what in plan:
            await await_until(f"{moment} jobs end", lambda moment=moment: self.fleet.count("accepted") >= moment)  # type: ignore[misc]
            await asyncio.sleep(dice.uniform(0, 0.1))
            if what == "worker kills":
                self.fleet.kill_worker(dice.choice(self.fleet.workers))
            elif what == "store kills" and self.files is not None:
                await asyncio.to_thread(self.files.harm)
            else:
                await asyncio.to_thread(self.store.harm)
            self.done[what] += 1

    async def _freeze(self, client: redis.Redis) -> None:
        """Stops the worker that runs the long job until another has ended that job, then lets it go on."""
        await await_until("the long job is accepted", lambda: 0 in self.clients.accepted)
        job_id = self.clients.accepted[0]
        await await_until("the long job starts", lambda: bool(self._notes("start", job_id)))
        pid = self._notes("start", job_id)[0].pid
        [frozen] = [worker for worker in self.fleet.workers if worker.pid == pid]
        self.fleet.workers.remove(frozen)  # out of reach of the kills, and back at the end
        frozen.send_signal(signal.SIGSTOP)
        self._frozen.set()
        try:
            state_key = Keys(PREFIX).job(job_id)
            await await_until(
                "another worker ends the frozen one's job",
                lambda: patiently(lambda: client.hget(state_key, "state")) == b"succeeded",
            )
            frozen.send_signal(signal.SIGCONT)
            await await_until(
                "the frozen worker learns that it is late",
                lambda: any(note.pid == pid for note in self._notes("refused", job_id)),
            )
        finally:
            self.fleet.workers.append(frozen)
        self.done["frozen workers"] += 1

    def _notes(self, what: str, job_id: str) -> list[Any]:
        return [note for note in self.fleet.notes() if note.what == what and note.job_id == job_id]

    async def _await_ends(self, client: redis.Redis) -> None:
        """Returns when no job is waiting or running, or after a while: the judge then names them."""
        names = [Keys(PREFIX).job(job_id) for job_id in self.clients.accepted.values()]
        deadline_s = time.monotonic() + _END_S
        while time.monotonic() < deadline_s:
            states = patiently(lambda: [client.hget(name, "state") for name in names])
            if states is not None and not {b"queued", b"processing"} & set(states):
                return
            await asyncio.sleep(0.5)

    def report(self, verdict: Verdict, name: str, **more: object) -> None:
        """Prints what happened and stores it under the name of the run."""
        notes = self.fleet.notes()
        starts = Counter(note.job_id for note in notes if note.what == "start")
        found = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, {platform.system()} {platform.release()}",
            "load_average": os.getloadavg(),
            "seed": SEED,
            "jobs_accepted": len(self.clients.accepted),
            "harm_done": dict(self.done),
            "posts_refused": dict(self.clients.refusals),
            "claimed_ahead": self.fleet.count("ahead"),
            "starts": sum(starts.values()),
            "jobs_started_again": sum(number > 1 for number in starts.values()),
            "ends_accepted": sum(note.what == "accepted" for note in notes),
            "ends_refused_as_late": sum(note.what == "refused" for note in notes),
            "faults": {name: len(ids) for name, ids in vars(verdict).items()},
            "duration_s": round(self.duration_s, 1),
        } | more
        print(json.dumps(found, indent=2))
        stored = json.loads(REPORT.read_text()) if REPORT.exists() else {}
        stored[name] = found
        REPORT.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")


async def await_until(what: str, is_true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + _END_S
    while not is_true():
        assert time.monotonic() < deadline_s, f"{what}: not within {_END_S:.0f} s"
        await asyncio.sleep(0.02)


def patiently(call: Callable[[], Any]) -> Any:
    """None while Redis is away: it is killed meanwhile."""
    try:
        return call()
    except REDIS_UNAVAILABLE:
        return None


def test_every_accepted_job_ends_exactly_once(tmp_path: Path) -> None:
    store = OneServer(tmp_path / "redis")
    try:
        run = Run(store, tmp_path, jobs=2000)
        verdict = run.execute(kills=20, harms=3)
        run.report(verdict, "OneServer")
    finally:
        store.stop()
    assert run.done == {"worker kills": 20, "Redis kills": 3, "frozen workers": 1}
    assert len(set(run.clients.accepted.values())) == 2000
    assert verdict.is_clean, verdict


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_every_job_with_a_result_store_ends_exactly_once_and_leaves_no_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, with fewer jobs; a server of S3 is killed too. Nobody reads half a result."""
    store, server = OneServer(tmp_path / "redis"), S3Server(tmp_path / "s3") if kind == "s3" else None
    url = (tmp_path / "results").as_uri() if server is None else f"s3://{BUCKET}/chaos"
    try:
        if server is not None:
            server.start()
            server.set_environment(monkeypatch)
        run = Run(store, tmp_path, jobs=300, result_store=url, job_ttl_s=FILES_TTL_S)
        assert run.files is not None
        run.files.server = server
        verdict = run.execute(kills=6, harms=1, store_harms=kind == "s3", left_after_s=FILES_TTL_S + 150)
        unstored = run.fleet.count("unstored")
        read = {"results_read_meanwhile": run.files.reads, "torn": len(run.files.torn), "files_left": len(run.left)}
        run.report(verdict, f"Store-{kind}", ends_not_stored=unstored, **read)
    finally:
        store.stop()
        if server is not None:
            server.kill()
    expected = {"worker kills": 6, "Redis kills": 1, "frozen workers": 1}
    assert run.done == (expected if server is None else expected | {"store kills": 1})
    assert run.files.reads > 0 and run.files.torn == [] and run.left == []
    assert verdict.is_clean, verdict


def test_every_job_of_split_pools_ends_exactly_once(tmp_path: Path) -> None:
    store = OneServer(tmp_path / "redis")
    try:
        run = Run(store, tmp_path, jobs=500, pools=(WorkerRole.GENERATE, WorkerRole.DECODE))
        verdict = run.execute(kills=10, harms=1)
        run.report(verdict, "SplitPools", transferred=run.fleet.count("handed"))
    finally:
        store.stop()
    assert run.done == {"worker kills": 10, "Redis kills": 1, "frozen workers": 1}
    assert run.fleet.count("handed") >= 300, "three jobs of four are drawn"
    assert verdict.is_clean, verdict


def test_failover_loses_at_most_what_the_old_master_had_not_sent(tmp_path: Path) -> None:
    """Replication is asynchronous: a job that the master took in its last moment may be gone, and an end be redone.

    `min-replicas-to-write` bounds that to a master with a live replica; everything else ends exactly once.
    """
    store = Replicated(tmp_path / "redis")
    try:
        run = Run(store, tmp_path, jobs=500)
        verdict = run.execute(kills=5, harms=1)
        killed_at_s = store.killed_at_s
        at_risk = {
            *(job_id for job_id, at_s in run.clients.accepted_at_s.items() if _was_just_before(at_s, killed_at_s)),
            *(
                note.job_id
                for note in run.fleet.notes()
                if note.what == "accepted" and _was_just_before(note.at_s, killed_at_s)
            ),
        }
        run.report(verdict, "Replicated", jobs_at_risk=len(at_risk))
    finally:
        store.stop()
    assert run.done == {"worker kills": 5, "Redis kills": 1, "frozen workers": 1}
    assert set(verdict.lost) | set(verdict.accepted_twice) <= at_risk
    excused = {"lost": (), "accepted_twice": ()}
    assert Verdict(**{**vars(verdict), **excused}).is_clean, verdict


def _was_just_before(at_s: float, killed_at_s: float) -> bool:
    return killed_at_s - FAILOVER_LOSS_S <= at_s <= killed_at_s + 0.1
