"""The scripts against a model: any order of steps of producers and workers leaves each job one place or one end.

A step runs a script on a real Redis as `JobProducer` and `JobConsumer` do, and does the same to the model. Replies get
lost, are repeated, come late; leases run out; groups and streams vanish; one worker reads no jobs of the newer version.
"""

import hashlib
import itertools
import json
import os
import random
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import hypothesis
import pytest
import redis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from giantleap.models.worker_role import WorkerRole
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.keys import Keys, claim_order
from giantleap.service.jobqueue.replies import ClaimReply
from giantleap.service.jobqueue.runner import ScriptRunner, upload_input, upload_results
from giantleap.service.jobs.job import GenerateParams, Job, Priority
from giantleap.service.settings import read_settings
from tests.service.jobqueue.queue_model import (
    BUDGET_BYTES,
    BUNDLE,
    FINAL,
    LIMIT_LATENT_PX,
    MAX_DELIVERIES,
    QUEUE_LIMIT,
    Model,
    ModelJob,
    ModelWorker,
    Snapshot,
    State,
)

ROLES = (WorkerRole.ALL, WorkerRole.ALL, WorkerRole.GENERATE, WorkerRole.DECODE)
LOADED: dict[str, scripts.LuaScript[Any]] = {
    script.name: script for script in vars(scripts).values() if isinstance(script, scripts.LuaScript)
}
LANES = claim_order((BUNDLE,), 0, WorkerRole.ALL)
HOUR_MS = 3_600_000
PARAMS = GenerateParams("a", "", 2, 64, 64, 4, 1.0, 7, 1, "png")
JOB = Job("any", BUNDLE, priority=Priority.HIGH, created_at_s=0.0, params=PARAMS).to_json()
HeldClaim = tuple[ModelWorker, ModelJob, dict[str, object]]
Draw = Callable[..., Any]


class QueueMachine(RuleBasedStateMachine):
    """One run on a prefix of its own. Subclasses set `url` and `planted`, scripts that replace the real ones."""

    url: ClassVar[str]
    planted: ClassVar[dict[str, scripts.LuaScript[Any]]] = {}

    def __init__(self) -> None:
        super().__init__()
        settings = read_settings(
            key_prefix=f"model-{uuid.uuid4().hex[:12]}",
            queue_limit=QUEUE_LIMIT,
            queue_limit_latent_px=LIMIT_LATENT_PX,
            blob_budget_bytes=BUDGET_BYTES,
            visibility_timeout_s=HOUR_MS / 1000,
            retry_backoff_s=HOUR_MS / 1000,
            max_deliveries=MAX_DELIVERIES,
        )
        self.client = redis.Redis.from_url(self.url)
        self.keys = Keys(settings.key_prefix)
        self.runner = ScriptRunner(self.client, settings)
        self.model = Model()
        self.numbers = itertools.count()
        self.seen = Snapshot(self.client, self.keys)
        self.workers = [self._new_worker(number) for number in range(len(ROLES))]

    def teardown(self) -> None:
        self.client.unlink(*self.client.scan_iter(match=f"{self.keys.tag}*", count=1000), "none")
        self.client.close()

    def run_script(self, name: str, arguments: Mapping[str, object], **rest: Any) -> Any:
        return self.runner.run(self.planted.get(name, LOADED[name]), arguments, **rest)

    def _new_worker(self, number: int) -> ModelWorker:
        worker = ModelWorker(f"w{number}-{next(self.numbers)}", ROLES[number], reads_foreign=number != 1)
        arguments = {"consumer": worker.consumer, "device": "", "role": worker.role, "lanes": self._lanes(worker)}
        self.run_script("register_worker", arguments)
        return worker

    def _lanes(self, worker: ModelWorker) -> list[str]:
        return claim_order((BUNDLE,), 0, WorkerRole(worker.role))

    def _jobs(self, *states: State) -> list[ModelJob]:
        return [job for job in self.model.known() if job.state in states]

    def _claims(self) -> list[HeldClaim]:
        """The claims that workers believe to hold."""
        return [
            (worker, self.model.jobs[job_id], claim)
            for worker in self.workers
            for job_id, claim in worker.held.items()
            if not self.model.jobs[job_id].is_expired
        ]

    @rule(
        data=st.data(),
        what=st.sampled_from(
            (
                "enqueue",
                "enqueue",
                "claim",
                "claim",
                "claim ahead",
                "settle",
                "settle",
                "settle",
                "settle",
                "settle",
                "renew",
                "restart",
                "happen",
                "happen",
            )
        ),
    )
    def step(self, data: st.DataObject, what: str) -> None:
        """One rule for all, since hypothesis would leave out some rules of a run, and most need several others."""

        def draw(*options: Any) -> Any:
            return data.draw(st.sampled_from(options))

        if what == "enqueue":
            self.enqueue(draw)
        elif what == "claim":
            loaded = draw(None, None, [], [BUNDLE])
            self.claim(draw(*self.workers), draw(1, 2, 3), is_lost=draw(False, False, False, True), loaded=loaded)
        elif what == "claim ahead":
            worker, loaded = draw(*self.workers), draw(None, None, [], [BUNDLE])
            if draw(False, True):
                self.silence(each for each in self.workers if each is not worker)
            self.claim(worker, draw(1, 1, 2), draw(False, False, True), loaded, ahead=True)
        elif what == "happen":
            self.happen(draw)
        elif self._claims() and what == "settle":
            self.settle(draw)
        elif self._claims() and what == "renew":
            self.renew(draw(*self._claims())[0])
        elif self._claims() and draw(False, False, True):
            self.restart(draw(*self._claims())[0])

    # --- producers

    def enqueue(self, draw: Draw) -> None:
        """A client's request; it may be sent twice, or without the input that belongs to it."""
        latent_px, size_bytes = draw(0, 10, 10, 30, 80), draw(0, 7, 7, 25)
        job = ModelJob(
            f"j{next(self.numbers)}", draw("", "ann", "bob"), f"{latent_px} {size_bytes}", latent_px, size_bytes
        )
        job.has_deadline, job.is_foreign = draw(False, False, True), draw(False, False, False, True)
        caller_key, max_live = draw(*[None] * 8, "k1", "k2"), draw(None, None, 2)
        arguments: dict[str, object] = {"id": job.id, "bundle": BUNDLE, "priority": draw("high", "low")}
        arguments |= {"owner": job.owner, "digest": job.digest, "latent_px": latent_px, "input_bytes": size_bytes}
        arguments |= {"upload": job.id if size_bytes else "", "finish": draw(False, True), "max_live": max_live}
        arguments |= {"idempotency": caller_key, "cancel_after_s": 3600 if job.has_deadline else None}
        before = upload_input(self.keys.upload(job.id), b"x" * size_bytes) if size_bytes else []
        before = draw(before, before, before, [])
        expected, of = self._expected_reply(job, caller_key, max_live, arrived=not size_bytes or bool(before))
        for status in (expected, "existing" if expected == "created" else expected)[: draw(1, 1, 2)]:
            reply = self.run_script("enqueue", arguments, before=before, value=JOB)
            assert (reply.status, reply.job_id) == (status, of)

    def _expected_reply(
        self, job: ModelJob, caller_key: str | None, max_live: int | None, arrived: bool
    ) -> tuple[str, str]:
        """What the script must reply. Effects: the model has the job, or not."""
        known = self.model.idempotency.get(caller_key or "")
        if known is not None:
            return ("existing" if self.model.jobs[known].digest == job.digest else "mismatch"), known
        refusal = self.model.refusal(job.latent_px, job.input_bytes, job.owner, max_live)
        if refusal not in ("full", "full_px", "busy") and not arrived:
            refusal = "upload"
        if refusal is not None:
            return refusal, job.id
        if job.input_bytes:
            self.model.evict(self.model.input_bytes() + job.input_bytes, self.seen.keys.get("blob_results", ()))
        self.model.jobs[job.id] = job
        if caller_key is not None:
            self.model.idempotency[caller_key] = job.id
        return "created", job.id

    # --- workers

    def claim(
        self,
        worker: ModelWorker,
        max_jobs: int,
        is_lost: bool,
        loaded: list[str] | None = None,
        ahead: bool = False,
    ) -> None:
        """A worker claims.

        Args:
            worker: Who claims.
            max_jobs: At most so many.
            is_lost: It never gets the reply.
            loaded: What it has in memory of several bundles.
            ahead: Its device is busy.
        """
        may_take = {job.id for job in self.model.live() if self._may_take(worker, job)}
        resumed = {job.id for job in self.model.live() if self._is_lost_claim(worker, job)}
        arguments = {"consumer": worker.consumer, "max_jobs": max_jobs, "lanes": self._lanes(worker)}
        arguments |= {"held": [*worker.held, *worker.unreadable], "dropped": [*worker.dropped], "ahead": ahead or None}
        if loaded is not None:
            arguments |= {"loaded": loaded, "loaded_first": bool(max_jobs % 2)}
        has_stale = ahead and self._has_stale(worker)
        reply: ClaimReply = self.run_script("claim", arguments)
        assert len(reply.claims) <= max_jobs
        self._end_overdue()
        self._return_due()
        must_take = may_take
        if ahead:
            must_take = {job_id for job_id in may_take - resumed if self.model.jobs[job_id].deliveries == 0}
            may_take = must_take | resumed
            if not self._may_claim_ahead(worker, max_jobs) or (has_stale and not reply.claims):
                must_take = set()
                assert not reply.claims, "what is claimed ahead is not missed by a worker without work"
        for row in reply.claims:
            assert row.id in may_take, "only what waits, is stale or was this worker's"
            job = self.model.jobs[row.id]
            assert not job.is_canceled
            job.deliveries += row.id not in resumed
            job.state, job.worker, job.is_stale = "processing", worker.consumer, False
            assert row.delivery == job.deliveries and row.input_bytes == job.input_bytes
            worker.dropped.discard(row.id)
            if not is_lost:
                self._hold(worker, job, row.lane, row.message)
        left = {row.id for row in reply.claims}
        self._close_met(worker, may_take - left, must_take - left if len(left) < max_jobs else set())

    def _may_claim_ahead(self, worker: ModelWorker, max_jobs: int) -> bool:
        """Whether enough jobs wait for every live worker, and none that was started waits for one that is ready."""
        reachable = [job for job in self.model.live() if self.seen.lanes[job.id] in self._lanes(worker)]
        waiting = sum(job.state == "queued" for job in reachable)
        started = any(job.is_stale and job.id not in worker.held for job in reachable)
        alive = sum(not each.is_silent for each in self.workers)
        return waiting >= max_jobs * max(1, alive) and not started

    def _has_stale(self, worker: ModelWorker) -> bool:
        """Whether a message of its lanes is older than a lease: of a job that was returned or whose worker died."""
        streams = [self.keys.stream(lane) for lane in self._lanes(worker)]
        known = [stream for stream in streams if self.client.exists(stream) and self.client.xinfo_groups(stream)]
        return any(self.client.xpending_range(each, "workers", "-", "+", 1, idle=HOUR_MS) for each in known)

    def _hold(self, worker: ModelWorker, job: ModelJob, lane: str, message: str) -> None:
        claim: dict[str, object] = {"lane": lane, "message": message, "id": job.id, "delivery": job.deliveries}
        if job.is_foreign and not worker.reads_foreign:
            worker.unreadable.add(job.id)
            self.run_script("release", {"consumer": worker.consumer, **claim})
            self._release(job)
        else:
            worker.held[job.id] = claim

    def _is_lost_claim(self, worker: ModelWorker, job: ModelJob) -> bool:
        ours = job.state == "processing" and job.worker == worker.consumer and job.id not in worker.unreadable
        return ours and job.id not in worker.held and job.id not in worker.dropped

    def _may_take(self, worker: ModelWorker, job: ModelJob) -> bool:
        if job.id in worker.unreadable or job.id in worker.held or job.is_overdue:
            return False
        waits = job.state == "queued" or (job.state == "delayed" and job.is_due)
        return waits or job.is_stale or self._is_lost_claim(worker, job)

    def _return_due(self) -> None:
        for job in self._jobs("delayed"):
            if job.is_due:
                job.state, job.has_message, job.is_due = "queued", True, False

    def _close_met(self, worker: ModelWorker, left: set[str], missed: set[str]) -> None:
        """What a claim closed on the way: overdue jobs, canceled or worn out ones, messages of jobs that had ended.

        Args:
            worker: Who claimed.
            left: What it could have taken and did not.
            missed: What of it should have been taken, if the worker reads its lane.
        """
        seen = self.seen = Snapshot(self.client, self.keys)
        for job in self.model.known():
            if job.is_live and seen.states.get(job.id) in FINAL:
                wanted: State = "canceled" if job.is_canceled else "failed"
                assert job.id in left and (job.is_canceled or job.deliveries >= MAX_DELIVERIES)
                assert seen.states[job.id] == wanted
                job.fail() if wanted == "failed" else job.end(wanted)
                job.worker = ""
        lanes = self._lanes(worker)
        for job in self.model.live():
            reachable = job.id in missed and self.seen.lanes[job.id] in lanes
            assert not reachable, f"{job.id} could be claimed and was not"
        for job in self.model.jobs.values():
            if job.has_message and not job.is_live and job.id not in seen.messages:
                job.has_message, job.worker = False, ""

    def settle(self, draw: Draw) -> None:
        """A worker ends one of the claims that it believes to hold, once or twice; it may be too late."""
        held = draw(*self._claims())
        match draw("complete", "complete", "retry", "fail", "transfer", "cancel", "release", "drop"):
            case "complete":
                self._complete(held, draw(0, 5, 20, 70), draw(1, 2))
            case "retry" | "fail" as how:
                self._fail(held, how == "retry", draw(1, 2))
            case "transfer":
                self._transfer(held, draw(0, 12, 12, 70), draw(1, 2))
            case "cancel":
                self._cancel(held, draw(1, 2))
            case "release":
                self._give_back(held)
            case "drop":
                self._drop(held)

    def _complete(self, held: HeldClaim, size_bytes: int, times: int) -> None:
        blobs = [b"r" * size_bytes] if size_bytes else []

        def run(fenced: dict[str, object]) -> str:
            upload = f"{fenced['consumer']}:{fenced['id']}" if blobs else ""
            arguments = {**fenced, "results": "[]", "stages": "{}", "warnings": "[]", "batch_jobs": 1, "idle_s": 0}
            before = upload_results(self.keys.upload(upload), blobs) if blobs else []
            return str(
                self.run_script(
                    "complete", arguments | {"upload": upload, "files": len(blobs), "bytes": size_bytes}, before=before
                ).status
            )

        def end(ended: ModelJob) -> str:
            needed = self.model.input_bytes() - ended.input_bytes + size_bytes
            if size_bytes > ended.input_bytes and needed > BUDGET_BYTES:
                return "no_room"
            if size_bytes > ended.input_bytes:
                self.model.evict(needed, self.seen.keys.get("blob_results", ()))
            ended.end("succeeded")
            ended.result_bytes = size_bytes
            return "done"

        self._settle(held, times, run, end)

    def _fail(self, held: HeldClaim, retryable: bool, times: int) -> None:
        error = json.dumps({"code": "engine_fault", "detail": "", "retryable": retryable})

        def run(fenced: dict[str, object]) -> str:
            return str(
                self.run_script("fail", {**fenced, "error": error, "retryable": retryable, "stages": "{}"}).status
            )

        def end(ended: ModelJob) -> str:
            if retryable and ended.deliveries < MAX_DELIVERIES:
                ended.state, ended.has_message = "delayed", False
                return "retried"
            ended.fail()
            return "done"

        self._settle(held, times, run, end)

    def _transfer(self, held: HeldClaim, size_bytes: int, times: int) -> None:
        def run(fenced: dict[str, object]) -> str:
            arguments = {**fenced, "stages": "{}", "warnings": "[]", "batch_jobs": 1, "idle_s": 0}
            return str(self.run_script("transfer", arguments, value=b"l" * size_bytes).status)

        def end(moved: ModelJob) -> str:
            needed = self.model.input_bytes() - moved.input_bytes + size_bytes
            if size_bytes > moved.input_bytes and needed > BUDGET_BYTES:
                return "no_room"
            if size_bytes > moved.input_bytes:
                self.model.evict(needed, self.seen.keys.get("blob_results", ()))
            if size_bytes:
                moved.input_bytes, moved.has_stages = size_bytes, True
            moved.state, moved.deliveries = "queued", 0
            return "done"

        self._settle(held, times, run, end)

    def _cancel(self, held: HeldClaim, times: int) -> None:
        def run(fenced: dict[str, object]) -> str:
            return str(self.run_script("cancel", {**fenced, "stages": "{}"}).status)

        def end(ended: ModelJob) -> str:
            ended.end("canceled")
            return "done"

        self._settle(held, times, run, end, overdue="done", canceled="done")

    def _give_back(self, held: HeldClaim) -> None:
        def run(fenced: dict[str, object]) -> str:
            return str(self.run_script("release", fenced).status)

        def end(returned: ModelJob) -> str:
            self._release(returned)
            return "done"

        self._settle(held, 1, run, end, overdue="done")

    def _release(self, job: ModelJob) -> None:
        job.state, job.worker, job.is_stale = "queued", "", False
        job.deliveries -= 1

    def _settle(
        self,
        held: HeldClaim,
        times: int,
        run: Callable[[dict[str, object]], str],
        end: Callable[[ModelJob], str],
        overdue: str = "lost",
        canceled: str = "canceled",
    ) -> None:
        """A worker ends a claim that it believes to hold, once or twice: only a current claim changes anything."""
        worker, job, claim = held
        fenced, status, is_settled = {"consumer": worker.consumer, **claim}, "", False
        for _ in range(times):
            owned = self.model.owns(worker, job, claim)
            if not owned:
                status = status if is_settled else "lost"  # a repeat gets the reply that was lost
            elif not job.is_live or job.is_overdue:
                job.end("failed" if job.is_live else job.state)
                job.worker, status = "", overdue
            else:
                if job.is_canceled:
                    job.end("canceled")
                    status = canceled
                else:
                    status = end(job)
                is_settled = status != "no_room"
                if is_settled:
                    job.worker, job.is_stale = "", False
            assert run(fenced) == status
        if status != "no_room":
            worker.held.pop(job.id, None)

    def restart(self, worker: ModelWorker) -> None:
        """A worker dies with all it holds, and another takes its place."""
        index = self.workers.index(worker)
        self.silence([worker])
        self.workers[index] = self._new_worker(index)

    def silence(self, workers: Iterable[ModelWorker]) -> None:
        """The heartbeats of workers are too old, as if they were gone."""
        for worker in workers:
            worker.is_silent = True
            for name in ("workers", f"workers:{worker.role}"):
                self.client.zrem(f"{self.keys.tag}:{name}", worker.consumer)

    def renew(self, worker: ModelWorker) -> None:
        worker.is_silent = False
        arguments = {"consumer": worker.consumer, "device": "", "role": worker.role}
        reply = self.run_script("renew", {**arguments, "claims": list(worker.held.values())})
        lost = {job_id for job_id, claim in worker.held.items() if not self._owns(worker, job_id, claim)}
        assert reply.ids == lost
        for job_id in list(worker.held):
            self.model.jobs[job_id].is_stale &= job_id in lost
            if job_id in lost:
                del worker.held[job_id]

    def _owns(self, worker: ModelWorker, job_id: str, claim: dict[str, object]) -> bool:
        job = self.model.jobs[job_id]
        return not job.is_expired and self.model.owns(worker, job, claim)

    def _drop(self, held: HeldClaim) -> None:
        """A worker could not write an end for two minutes: it leaves the job to become stale."""
        worker, job, _ = held
        del worker.held[job.id]
        worker.dropped.add(job.id)

    # --- what else happens

    def happen(self, draw: Draw) -> None:
        """A client cancels a job, time passes, or another program destroys something."""
        live, running, ended = self.model.live(), self._jobs("processing"), self._jobs(*FINAL)
        limited = [job for job in live if job.has_deadline]
        match draw("cancel", "lease", "lease", "retries", "deadline", "record", "delete", "group", "stream"):
            case "cancel" if live:
                self._cancel_job(draw(*live), times=draw(1, 2))
            case "lease" if running:
                self._a_lease_runs_out(draw(*running))
            case "retries":
                for job in self._jobs("delayed"):
                    job.is_due = True
                    self.client.zadd(f"{self.keys.tag}:delayed", {job.id: 1})
            case "deadline" if limited:
                self._a_deadline_passes(draw(*limited), is_noticed=draw(False, True))
            case "record" if ended:
                self._a_record_expires(draw(*ended))
            case "delete" if ended:
                self._delete(draw(*ended))
            case "group" | "stream" as what:
                self._vanish(draw(*LANES), what)

    def _cancel_job(self, job: ModelJob, times: int) -> None:
        for _ in range(times):
            record = self.run_script("cancel_job", {"id": job.id})
            if job.is_live:
                job.is_canceled = True
            if job.state in ("queued", "delayed"):
                job.end("canceled", has_message=job.state == "queued")
            assert record.state == job.state

    def _a_lease_runs_out(self, job: ModelJob) -> None:
        stream = self.keys.stream(self.seen.lanes[job.id])
        message: Any = self.client.hget(self.keys.job(job.id), "message")
        pending: Any = self.client.xpending_range(stream, "workers", message, message, 1)
        if pending:  # after a group vanished, its worker gets the message back first
            owner = pending[0]["consumer"]
            self.client.xclaim(stream, "workers", owner, 0, [message], idle=2 * HOUR_MS, justid=True)
            job.is_stale = True

    def _a_deadline_passes(self, job: ModelJob, is_noticed: bool) -> None:
        self.client.hset(self.keys.job(job.id), "deadline_ms", 1)
        self.client.zadd(f"{self.keys.tag}:deadlines", {job.id: 1})
        job.is_overdue = True
        if is_noticed:
            self.run_script("end_overdue_jobs", {"id": job.id})
            self._end_overdue()

    def _end_overdue(self) -> None:
        for job in self.model.live():
            if job.is_overdue:
                job.end("failed", has_message=job.state in ("queued", "processing"))

    def _a_record_expires(self, job: ModelJob) -> None:
        keys = self.keys
        self.client.delete(*(name(job.id) for name in (keys.job, keys.events, keys.result, keys.input)))
        if job.result_bytes:
            self.client.zadd(f"{self.keys.tag}:blob_results", {job.id: 1})
            self.run_script("read_stats", {})
        job.is_expired, job.result_bytes = True, 0

    def _delete(self, job: ModelJob) -> None:
        assert self.run_script("delete_job", {"id": job.id}).record is None
        job.is_deleted, job.is_dead, job.result_bytes = True, False, 0

    def _vanish(self, lane: str, what: str) -> None:
        stream = self.keys.stream(lane)
        for job_id in self.seen.keys.get(f"stream:{lane}", ()):
            job = self.model.jobs[job_id]
            job.is_stale = False
            job.has_message = what == "group" or (job.is_live and not job.is_expired)
        if what == "group":
            self.client.xgroup_destroy(stream, "workers") if self.client.exists(stream) else None
        else:
            self.client.delete(stream)
        self.claim(self.workers[0], 0, is_lost=False)

    @invariant()
    def every_job_has_one_place_and_every_sum_is_exact(self) -> None:
        self.seen = Snapshot(self.client, self.keys)
        self.seen.check(self.model)


def machine(url: str, **planted: scripts.LuaScript[Any]) -> type[QueueMachine]:
    return type("Machine", (QueueMachine,), {"url": url, "planted": planted})


SHORT = hypothesis.settings(
    max_examples=25,
    stateful_step_count=80,
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def test_hundreds_of_steps_in_any_order_leave_every_job_one_place_or_one_end(redis_url: str) -> None:
    run_state_machine_as_test(machine(redis_url), settings=SHORT)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        pytest.param("complete", "if not owns_claim() then return refuse(reply_not_owned()) end\n", "", id="no fence"),
        pytest.param(
            "cancel",
            "if latent_px then redis.call('DECRBY', prefix .. ':queued_px', latent_px) end",
            "",
            id="pixels not given back",
        ),
        pytest.param(
            "enqueue", "if args.upload ~= '' then redis.call('UNLINK', upload) end", "", id="a trace of a refusal"
        ),
        pytest.param("release", "redis.call('HINCRBY', job_key(id), 'deliveries', -1)", "", id="a start counted"),
        pytest.param("claim", "waiting >= left * math.max(1, live_workers())", "waiting >= left", id="too much ahead"),
        pytest.param("claim", "args.ahead and not may_claim_ahead()", "args.ahead", id="nothing ahead"),
        pytest.param("transfer", "#latents - held_bytes)\n", "#latents)\n", id="bytes counted twice"),
    ],
)
def test_a_fault_planted_in_one_script_is_found(redis_url: str, name: str, right: str, wrong: str) -> None:
    text = scripts.resolve(name)
    assert text.count(right) == 1
    reply = next(each.reply for each in vars(scripts).values() if getattr(each, "name", "") == name)
    planted = scripts.LuaScript(name, *_hashed(text.replace(right, wrong)), reply)
    quick = hypothesis.settings(SHORT, phases=[hypothesis.Phase.generate])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine(redis_url, **{name: planted}), settings=quick)


def _hashed(text: str) -> tuple[str, str]:
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_tens_of_thousands_of_steps_at_random(redis_url: str) -> None:
    seed = int(os.environ.get("CHAOS_SEED", "0")) or random.SystemRandom().randrange(2**32)
    print(f"\nqueue model: CHAOS_SEED={seed}")
    long = hypothesis.settings(SHORT, max_examples=800, stateful_step_count=50, derandomize=False)
    run_state_machine_as_test(hypothesis.seed(seed)(machine(redis_url)), settings=long)
