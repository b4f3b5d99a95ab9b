"""The worker's side against a real Redis, both the system's and the bundled one."""

import dataclasses
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from giantleap.models.worker_role import WorkerRole
from giantleap.service.errors import BlockedByFilter
from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.claims import Claim
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.keys import Keys, claim_order
from giantleap.service.jobqueue.runner import ScriptRunner
from giantleap.service.jobs.job import Job, JobError, JobState, Priority, ResultFile
from giantleap.service.settings import Settings
from tests.redis_fixtures import SERVERS, Put
from tests.waiting import wait_until

PNG = ResultFile("image/png", 3, seed=7)
FLAKY = JobError("engine_fault", "lost device", retryable=True)


@pytest.fixture(params=SERVERS)
def redis_url(request: pytest.FixtureRequest, start_server: Any) -> str:
    url: str = start_server(request.param)
    return url


@pytest.fixture
def state_of(settings: Settings, redis_client: redis.Redis) -> Callable[[Job], str]:
    def read(job: Job) -> str:
        state: Any = redis_client.hget(Keys(settings.key_prefix).job(job.id), "state")
        return (state or b"").decode()

    return read


def take_one(worker: JobConsumer, within_s: float = 60.0) -> Claim:
    [claim] = worker.claim(1, within_s)
    return claim


def test_claim_is_exclusive_between_workers(put: Put, open_consumer: Any, settings: Settings) -> None:
    jobs = [put((Priority.HIGH, Priority.LOW)[n % 2]) for n in range(120)]
    seen: list[str] = []

    def work(worker: JobConsumer) -> None:
        while batch := worker.claim(3, 0.2):
            for claim in batch:
                seen.append(claim.job.id)
                assert worker.complete(claim, [(PNG, b"png")], {}, [])

    # Leases that a stall of a busy machine does not outlast: this is about two that claim at once.
    workers = [open_consumer(visibility_timeout_s=20.0) for _ in range(6)]
    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(seen) == Counter(job.id for job in jobs)


def test_claim_takes_no_more_than_its_limit(
    put: Put, open_consumer: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    for priority in Priority:
        for _ in range(3):
            put(priority)
    worker = open_consumer()
    assert len(worker.claim(4, 0.0)) == 4
    streams = [Keys(settings.key_prefix).stream(f"pocket:{priority.value}") for priority in Priority]
    assert sum(redis_client.xpending(stream, "workers")["pending"] for stream in streams) == 4
    assert len(worker.claim(4, 0.0)) == 2
    assert worker.claim(4, 0.0) == []


def test_high_priority_goes_first_in_order_of_arrival(put: Put, open_consumer: Any) -> None:
    lows = [put(Priority.LOW) for _ in range(2)]
    highs = [put(Priority.HIGH) for _ in range(3)]
    worker = open_consumer()
    assert [take_one(worker).job for _ in range(5)] == highs + lows


def test_each_eighth_claim_takes_low_first_and_bundles_take_turns_at_being_first() -> None:
    orders = [claim_order(("a", "b"), turn, WorkerRole.GENERATE) for turn in range(16)]
    assert [turn for turn, order in enumerate(orders) if order[0].endswith(":low")] == [7, 15]
    assert orders[0] == ["a:high", "b:high", "a:low", "b:low"] and orders[1][0] == "b:high"
    assert orders[7] == ["b:low", "a:low", "b:high", "a:high"]
    assert orders[15][0] == "a:low", "no bundle is the first of low priority each time"
    assert {frozenset(order) for order in orders} == {frozenset(orders[0])}, "every lane in every claim"


def test_a_worker_of_all_stages_takes_from_both_queues_in_turn_and_others_from_their_own() -> None:
    orders = [claim_order(("a",), turn, WorkerRole.ALL) for turn in range(16)]
    assert orders[0] == ["a+finish:high", "a:high", "a+finish:low", "a:low"]
    assert orders[1] == ["a:high", "a+finish:high", "a:low", "a+finish:low"]
    assert orders[7] == ["a:low", "a+finish:low", "a:high", "a+finish:high"] and orders[15][0] == "a+finish:low"
    assert claim_order(("a", "b"), 2, WorkerRole.DECODE) == [
        "a+finish:high",
        "b+finish:high",
        "a+finish:low",
        "b+finish:low",
    ]


def test_low_priority_is_not_starved_by_a_steady_flow_of_high(put: Put, open_consumer: Any) -> None:
    lows = [put(Priority.LOW) for _ in range(2)]
    for _ in range(16):
        put(Priority.HIGH)
    worker = open_consumer()
    order = [take_one(worker).job for _ in range(16)]
    assert [n for n, job in enumerate(order) if job in lows] == [7, 15]


def test_bundles_take_turns_and_strange_ones_are_left_alone(put: Put, open_consumer: Any) -> None:
    for _ in range(3):
        put(bundle="a")
        put(bundle="b")
        put(bundle="elsewhere")
    worker = open_consumer(bundles=("a", "b"))
    order = [take_one(worker).job.bundle for _ in range(6)]
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert worker.claim(8, 0.0) == []


def test_a_job_wakes_an_idle_claim_and_not_a_poll(
    put: Put, settings: Settings, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker blocks in Redis for half the time for which its client reads: here the next poll is minutes away."""
    monkeypatch.setattr("giantleap.service.jobqueue.claiming.claimer._POLL_S", 600.0)
    with (
        redis.Redis.from_url(str(settings.redis_url), socket_timeout=600) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(JobConsumer(client, settings, ["pocket"], "w").claim, 1, 300.0)
        wait_until(lambda: any(each["cmd"] == "xread" for each in redis_client.client_list()), "the worker waits")
        job = put()
        assert [claim.job for claim in waiting.result(120)] == [job]


def test_idle_claim_returns_nothing_after_its_time(open_consumer: Any) -> None:
    worker = open_consumer()
    started_s = time.perf_counter()
    assert worker.claim(1, 0.4) == []
    assert time.perf_counter() - started_s > 0.35


def test_idle_claim_outlives_a_master_that_becomes_a_replica(open_consumer: Any, redis_client: redis.Redis) -> None:
    """Such a server ends what blocks with UNBLOCKED, as this command of an administrator does."""
    worker: JobConsumer = open_consumer()

    def blocked() -> list[int]:
        return [int(each["id"]) for each in redis_client.client_list() if each["cmd"] == "xread"]

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(worker.claim, 1, 5.0)
        deadline_s = time.monotonic() + 30
        ended = 0
        while ended == 0 and time.monotonic() < deadline_s and not waiting.done():
            ended = sum(redis_client.client_unblock(each, error=True) for each in blocked())
        assert waiting.result(60) == []
    assert ended > 0


def test_claim_carries_the_input_and_the_job_unchanged(put: Put, open_consumer: Any) -> None:
    latent = bytes(range(256)) * 4096
    job = put(body=latent, prompt="snow \u2603 over \U0001f3d4")
    claim = take_one(open_consumer())
    assert claim.job == job
    assert claim.body == latent
    assert claim.delivery == 1


def test_a_job_whose_input_is_gone_is_passed_over(
    put: Put, open_consumer: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    """A deadline may end a job between its claim and the reading of its input."""
    gone, worker = put(body=b"latent"), open_consumer()
    redis_client.delete(Keys(settings.key_prefix).input(gone.id))
    assert worker.claim(1, 0.3) == []
    job = put()
    assert take_one(worker).job == job


def test_a_job_of_a_newer_version_ends_no_worker(
    put: Put, open_consumer: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    newer, worker = put(), open_consumer()
    record = Keys(settings.key_prefix).job(newer.id)
    text = json.loads(redis_client.hget(record, "job") or "")
    redis_client.hset(record, "job", json.dumps(text | {"params": text["params"] | {"unheard_of": 1}}))
    job = put()
    assert [claim.job for claim in worker.claim(2, 0.3)] == [job]
    assert worker.claim(2, 0.3) == []
    assert redis_client.hmget(record, "state", "deliveries") == [b"queued", b"0"], "for a worker that can read it"
    redis_client.hset(record, "job", json.dumps(text))
    [claim] = open_consumer().claim(2, 60.0)
    assert (claim.job.id, claim.delivery) == (newer.id, 1)


def test_stale_claim_goes_first_to_another_worker(put: Put, open_consumer: Any, make_stale: Any) -> None:
    stuck = put(Priority.LOW, body=b"latent")
    dead = take_one(open_consumer(lease=False))
    assert dead.job == stuck
    make_stale(dead)
    put(Priority.HIGH)
    again = take_one(open_consumer())
    assert (again.job, again.body, again.delivery) == (stuck, b"latent", 2)


def test_late_write_after_a_lost_lease_changes_nothing(
    put: Put, open_consumer: Any, redis_client: redis.Redis, settings: Settings, state_of: Any, make_stale: Any
) -> None:
    job = put()
    slow, quick = open_consumer(lease=False), open_consumer()
    late = take_one(slow)
    make_stale(late)
    owned = take_one(quick)
    keys = Keys(settings.key_prefix)
    before = [redis_client.dump(key) for key in (keys.job(job.id), keys.events(job.id))]
    slow.emit(late, "step", {"step": 1, "steps": 4})
    assert not slow.complete(late, [(PNG, b"old")], {"decode": 1.0}, ["old"])
    assert not slow.fail(late, FLAKY)
    assert not slow.cancel(late)
    slow.release([late])
    assert [redis_client.dump(key) for key in (keys.job(job.id), keys.events(job.id))] == before
    assert redis_client.exists(keys.result(job.id)) == 0
    assert quick.complete(owned, [(PNG, b"new")], {}, [])
    assert not slow.complete(late, [(PNG, b"old")], {}, [])
    assert redis_client.hgetall(keys.result(job.id)) == {b"0": b"new"}
    assert state_of(job) == "succeeded"


def test_lease_is_kept_past_the_visibility_timeout(put: Put, open_consumer: Any) -> None:
    put()
    worker, rival = open_consumer(visibility_timeout_s=2.0), open_consumer(visibility_timeout_s=2.0)
    claim = take_one(worker)
    assert rival.claim(1, 3.6) == []
    assert worker.complete(claim, [], {}, [])


def test_heartbeat_does_not_take_a_lost_job_back(put: Put, open_consumer: Any, make_stale: Any) -> None:
    put()
    worker, rival = open_consumer(lease=False, visibility_timeout_s=1.0), open_consumer()
    late = take_one(worker)
    make_stale(late)
    owned = take_one(rival)
    worker.open()
    time.sleep(0.8)  # three heartbeats
    assert not worker.complete(late, [], {}, [])
    assert rival.complete(owned, [], {}, [])
    worker.close()


def test_leases_are_kept_again_after_an_error_that_nobody_foresaw(
    open_consumer: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    """The thread that keeps them must not die while its worker goes on: another would take each of its jobs."""
    workers = f"{Keys(settings.key_prefix).tag}:workers"
    open_consumer(visibility_timeout_s=1.0)
    redis_client.set(workers, "somebody's")  # no set: every heartbeat fails
    time.sleep(0.8)  # three of them
    redis_client.delete(workers)
    deadline_s = time.monotonic() + 30
    while not redis_client.exists(workers):
        assert time.monotonic() < deadline_s, "no heartbeat any more"
        time.sleep(0.02)
    assert redis_client.zcard(workers) == 1


def test_worker_does_not_claim_anew_what_it_still_holds(put: Put, open_consumer: Any, make_stale: Any) -> None:
    put()
    worker = open_consumer(lease=False)
    claim = take_one(worker)
    make_stale(claim)
    assert worker.claim(1, 0.0) == []
    assert worker.complete(claim, [], {}, [])


def test_restarted_worker_of_the_same_name_cannot_end_the_old_claim(
    put: Put, open_consumer: Any, make_stale: Any
) -> None:
    put()
    old = take_one(open_consumer(lease=False, consumer="host-1"))
    make_stale(old)
    reborn = open_consumer(consumer="host-1")
    assert not reborn.complete(old, [], {}, [])
    assert take_one(reborn).delivery == 2


def test_finish_repeated_after_a_lost_reply_says_what_it_did(put: Put, open_consumer: Any) -> None:
    put()
    put()
    worker = open_consumer()
    one, two = worker.claim(2, 1.0)
    assert worker.complete(one, [(PNG, b"png")], {}, [])
    assert worker.complete(one, [(PNG, b"png")], {}, [])
    assert worker.fail(two, FLAKY)
    assert worker.fail(two, FLAKY)
    assert take_one(worker).delivery == 2


def test_retry_waits_twice_as_long_each_time_and_ends_in_the_dead_letters(
    put: Put, open_consumer: Any, redis_client: redis.Redis, settings: Settings, state_of: Any
) -> None:
    job = put(body=b"latent")
    worker = open_consumer(retry_backoff_s=0.2)
    waits_s = []
    for delivery in (1, 2, 3):
        started_s = time.perf_counter()
        claim = take_one(worker)
        waits_s.append(time.perf_counter() - started_s)
        assert (claim.delivery, claim.body) == (delivery, b"latent")
        assert worker.fail(claim, dataclasses.replace(FLAKY, detail=f"lost device {delivery}"))
    assert waits_s[1] > 0.15 and waits_s[2] > 0.35
    assert state_of(job) == "failed"
    assert worker.claim(1, 0.3) == []
    letters: Any = redis_client.xrange(Keys(settings.key_prefix).dead)
    [(_, letter)] = letters
    assert letter[b"job"].decode() == job.id
    assert b"lost device 3" in letter[b"error"]
    events: Any = redis_client.xrange(Keys(settings.key_prefix).events(job.id))
    names = [fields[b"name"] for _, fields in events]
    assert names.count(b"retrying") == 2 and names[-1] == b"done"


def test_error_that_is_not_retryable_fails_at_once(
    put: Put, open_consumer: Any, redis_client: redis.Redis, settings: Settings, state_of: Any
) -> None:
    job = put()
    worker = open_consumer()
    assert worker.fail(take_one(worker), JobError("invalid_request", "NaN in the latent"), {"generate": 0.1})
    assert state_of(job) == "failed"
    assert redis_client.xlen(Keys(settings.key_prefix).dead) == 1
    assert worker.claim(1, 0.2) == []


def test_a_job_that_a_filter_refused_fails_without_a_dead_letter_and_leaves_no_input(
    put: Put, open_consumer: Any, redis_client: redis.Redis, settings: Settings, state_of: Any
) -> None:
    job, keys = put(body=b"photograph"), Keys(settings.key_prefix)
    worker = open_consumer()
    assert worker.fail(take_one(worker), JobError(BlockedByFilter.code, "filter x refused the image"))
    assert state_of(job) == "failed" and b"blocked" in (redis_client.hget(keys.job(job.id), "error") or b"")
    assert not redis_client.exists(keys.dead, keys.input(job.id))
    assert worker.claim(1, 0.2) == []


def test_job_started_too_often_is_dead_lettered_and_the_next_one_runs(
    put: Put, open_consumer: Any, redis_client: redis.Redis, settings: Settings, state_of: Any, make_stale: Any
) -> None:
    poison, healthy = put(), put()
    for delivery in (1, 2):
        claim = take_one(open_consumer(lease=False, max_deliveries=2))
        assert (claim.job, claim.delivery) == (poison, delivery)
        make_stale(claim)
    claim = take_one(open_consumer(max_deliveries=2))
    assert claim.job == healthy
    assert state_of(poison) == "failed"
    error: Any = redis_client.hget(Keys(settings.key_prefix).job(poison.id), "error")
    assert b"2 times" in error
    assert redis_client.xlen(Keys(settings.key_prefix).dead) == 1


def test_cancel_flag_of_running_work_is_seen_and_ends_it(
    put: Put, open_consumer: Any, redis_client: redis.Redis, settings: Settings, state_of: Any
) -> None:
    jobs = [put() for _ in range(3)]
    worker = open_consumer()
    batch = worker.claim(3, 1.0)
    assert worker.find_canceled(batch) == set()
    ScriptRunner(redis_client, settings).run(scripts.CANCEL_JOB, {"id": jobs[1].id})
    assert worker.find_canceled(batch) == {jobs[1].id}
    assert state_of(jobs[1]) == "processing"
    assert worker.cancel(batch[1], {"generate": 0.1})
    assert state_of(jobs[1]) == "canceled"
    assert worker.complete(batch[0], [], {}, [])
    assert worker.complete(batch[2], [], {}, [])


def test_canceled_job_is_neither_retried_nor_redelivered(
    put: Put, open_consumer: Any, redis_client: redis.Redis, settings: Settings, state_of: Any, make_stale: Any
) -> None:
    jobs = [put() for _ in range(3)]
    worker = open_consumer()
    stuck = take_one(open_consumer(lease=False))
    failing, handed_back = worker.claim(2, 1.0)
    for job in jobs:
        ScriptRunner(redis_client, settings).run(scripts.CANCEL_JOB, {"id": job.id})
    assert worker.fail(failing, FLAKY)
    worker.release([handed_back])
    assert [state_of(job) for job in jobs[1:]] == [JobState.CANCELED.value] * 2, "at once, not at the next claim"
    make_stale(stuck)
    assert worker.claim(3, 0.3) == []
    assert [state_of(job) for job in jobs] == [JobState.CANCELED.value] * 3


def test_released_work_is_first_for_the_next_worker_and_not_counted(
    put: Put, open_consumer: Any, state_of: Any
) -> None:
    job = put(Priority.LOW)
    leaving, staying = open_consumer(), open_consumer()
    claim = take_one(leaving)
    put(Priority.HIGH)
    leaving.release([claim])
    assert state_of(job) == "queued"
    assert not leaving.complete(claim, [], {}, [])
    again = take_one(staying)
    assert (again.job, again.delivery) == (job, 1)
    assert staying.complete(again, [], {}, [])


def test_closed_worker_is_no_longer_counted_as_alive(
    open_consumer: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    worker = open_consumer()
    key = f"{Keys(settings.key_prefix).tag}:workers"
    assert redis_client.zcard(key) == 1
    worker.close()
    assert redis_client.zcard(key) == 0


def test_claim_without_redis_returns_nothing_in_its_time(settings: Settings) -> None:
    worker = JobConsumer(open_redis("redis://127.0.0.1:1/0"), settings, ["pocket"], "w")
    started_s = time.perf_counter()
    assert worker.claim(1, 0.5) == []
    assert time.perf_counter() - started_s > 0.4


def test_claim_goes_on_after_redis_forgot_scripts_and_streams(
    put: Put, open_consumer: Any, redis_client: redis.Redis, settings: Settings
) -> None:
    worker = open_consumer()
    redis_client.script_flush()
    redis_client.delete(*redis_client.scan_iter(match=f"{Keys(settings.key_prefix).tag}*"))
    assert worker.claim(1, 0.1) == []
    job = put()
    assert take_one(worker).job == job


def test_impossible_claims_are_refused(open_consumer: Any, settings: Settings, redis_url: str) -> None:
    with pytest.raises(ValueError, match="max_jobs"):
        open_consumer(lease=False).claim(0, 0.0)
    with pytest.raises(ValueError, match="bundle"):
        open_consumer(bundles=(), lease=False)
    with (
        redis.Redis.from_url(redis_url, decode_responses=True) as text_client,
        pytest.raises(ValueError, match="decode"),
    ):
        JobConsumer(text_client, settings, ["pocket"], "w")
