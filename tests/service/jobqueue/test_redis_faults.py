"""Faults of Redis that pass: requests get 503, workers wait, and no job is lost or runs twice."""

import asyncio
import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from giantleap.service.api.app import create_app
from giantleap.service.errors import BadConfiguration, NotReady
from giantleap.service.jobqueue.client import open_redis
from giantleap.service.jobqueue.consumer import JobConsumer
from giantleap.service.jobqueue.keys import Keys
from giantleap.service.jobqueue.server import check_url
from giantleap.service.jobs.job import JobState, ResultFile
from giantleap.service.settings import Settings
from tests.ports import free_ports
from tests.redis_fixtures import ProducerOpener
from tests.service.live_server import live_server
from tests.service.paper_bundle import write_paper_bundle
from tests.service.redis_groups import Server
from tests.waiting import wait_until

PNG = ResultFile("image/png", 3)
LANE = "pocket:high"


@dataclass(frozen=True)
class Fault:
    """Something that makes every script fail until it is undone."""

    begin: Callable[[redis.Redis, str], object]
    end: Callable[[redis.Redis, str], object]


def run_for_ever(client: redis.Redis, _: str) -> None:
    """Another program's script, which ends only when it is killed."""
    port: int = client.connection_pool.connection_kwargs["port"]
    other = redis.Redis(port=port, socket_timeout=60)

    def run() -> None:
        with contextlib.suppress(redis.RedisError), other:
            other.eval("while true do end", 0)

    threading.Thread(target=run, daemon=True).start()
    wait_until(lambda: is_busy(client), "the script blocks the server")


def is_busy(client: redis.Redis) -> bool:
    try:
        client.dbsize()
    except redis.ResponseError as error:
        return "BUSY" in str(error)
    return False


def kill_script(client: redis.Redis, _: str) -> None:
    client.script_kill()
    wait_until(lambda: not is_busy(client), "the script ends")


FAULTS = {
    "BUSY": Fault(run_for_ever, kill_script),
    "NOPERM": Fault(
        lambda client, _: client.execute_command("ACL", "SETUSER", "default", "-xgroup", "-hset", "-evalsha"),
        lambda client, _: client.execute_command("ACL", "SETUSER", "default", "+@all"),
    ),
    "NOREPLICAS": Fault(
        lambda client, _: client.config_set("min-replicas-to-write", 1),
        lambda client, _: client.config_set("min-replicas-to-write", 0),
    ),
    "READONLY": Fault(
        lambda client, _: client.execute_command("REPLICAOF", "127.0.0.1", 1),
        lambda client, _: client.execute_command("REPLICAOF", "NO", "ONE"),
    ),
    "WRONGTYPE": Fault(
        lambda client, tag: client.rename(f"{tag}:lanes", "away") and client.set(f"{tag}:lanes", "x"),
        lambda client, tag: client.rename("away", f"{tag}:lanes"),
    ),
    "OOM": Fault(
        lambda client, _: client.config_set("maxmemory", 1), lambda client, _: client.config_set("maxmemory", 0)
    ),
}
every_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of these tests alone: what they do to it is done to everybody."""
    port = free_ports(1)[0]
    started = Server(tmp_path_factory.mktemp("faults") / "server", port, "busy-reply-threshold 100", "maxclients 200")
    started.start()
    yield started
    started.kill()


@pytest.fixture
def redis_url(server: Server) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


@every_fault
async def test_requests_get_a_problem_that_passes_and_scrapes_tell_it(
    fault: Fault, settings: Settings, server: Server, tmp_path: Path
) -> None:
    tag = Keys(settings.key_prefix).tag
    changed = settings.model_copy(update={"bundle": (write_paper_bundle(tmp_path / "paper"),)})
    with live_server(create_app(changed)) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            later = {"Prefer": "respond-async"}
            assert (await client.post("/generate", json={"prompt": "a"}, headers=later)).status_code == 202
            await asyncio.to_thread(fault.begin, server.client, tag)
            try:
                for answer in (
                    await client.post("/generate", json={"prompt": "a"}, headers=later),
                    await client.get("/jobs"),
                    await client.get("/readyz"),
                ):
                    if answer.status_code == 200 and answer.request.method == "GET":
                        continue  # what reads only goes on where the server lets it
                    assert answer.status_code == 503, answer.text
                    assert answer.headers["content-type"] == "application/problem+json"
                    assert answer.json()["code"] == "not_ready" and answer.json()["retryable"]
                    assert int(answer.headers["retry-after"]) >= 1
                assert (await client.get("/metrics")).status_code == 200
                assert (await client.get("/livez")).status_code == 200
            finally:
                await asyncio.to_thread(fault.end, server.client, tag)
            assert (await client.post("/generate", json={"prompt": "a"}, headers=later)).status_code == 202


@every_fault
async def test_a_worker_waits_and_its_job_runs_once(
    fault: Fault, settings: Settings, server: Server, make_job: Any, open_producer: ProducerOpener, open_consumer: Any
) -> None:
    tag = Keys(settings.key_prefix).tag
    worker: JobConsumer = open_consumer(visibility_timeout_s=60.0)
    async with open_producer() as producer:
        first, second = make_job(), make_job()
        await producer.enqueue(first)
        await producer.enqueue(second)
        [claim] = await asyncio.to_thread(worker.claim, 1, 60.0)
        await asyncio.to_thread(fault.begin, server.client, tag)
        try:
            assert await asyncio.to_thread(worker.claim, 1, 0.3) == []
            await asyncio.to_thread(worker.emit, claim, "step", {"step": 1, "steps": 4})
            ending = asyncio.create_task(asyncio.to_thread(worker.complete, claim, [(PNG, b"png")], {}, []))
            await asyncio.wait([ending], timeout=0.3)
        finally:
            await asyncio.to_thread(fault.end, server.client, tag)
        assert await ending
        [claim] = await asyncio.to_thread(worker.claim, 1, 60.0)
        assert (claim.job.id, claim.delivery) == (second.id, 1)
        assert await asyncio.to_thread(worker.complete, claim, [(PNG, b"png")], {}, [])
        records = [await producer.get(job.id) for job in (first, second)]
        assert [(record.state, record.deliveries) for record in records if record] == [(JobState.SUCCEEDED, 1)] * 2


@pytest.mark.parametrize("what", ["group", "stream"])
async def test_a_group_or_stream_that_vanished_is_made_again_and_no_job_is_lost_or_runs_twice(
    what: str, settings: Settings, server: Server, make_job: Any, open_producer: ProducerOpener, open_consumer: Any
) -> None:
    keys = Keys(settings.key_prefix)
    workers: list[JobConsumer] = [open_consumer(visibility_timeout_s=60.0) for _ in range(2)]
    async with open_producer() as producer:
        jobs = [make_job() for _ in range(3)]
        for job in jobs:
            await producer.enqueue(job)
        [running] = await asyncio.to_thread(workers[0].claim, 1, 60.0)
        if what == "group":
            server.client.xgroup_destroy(keys.stream(LANE), "workers")
        else:
            server.client.delete(keys.stream(LANE))
        taken = await asyncio.to_thread(workers[1].claim, 8, 60.0)
        assert [claim.job.id for claim in taken] == [job.id for job in jobs[1:]], "not the one that runs"
        for worker, claim in ((workers[0], running), *((workers[1], each) for each in taken)):
            assert await asyncio.to_thread(worker.complete, claim, [], {}, [])
        records = [await producer.get(job.id) for job in jobs]
        assert [(record.state, record.deliveries) for record in records if record] == [(JobState.SUCCEEDED, 1)] * 3
        assert server.client.xlen(keys.stream(LANE)) == 0


async def test_a_server_that_hangs_is_told_by_scrapes_and_probes_and_costs_no_claim(
    settings: Settings, server: Server, tmp_path: Path, make_job: Any, open_consumer: Any
) -> None:
    """It hangs longer than a lease lasts: no worker could renew, so no claim is stale at once when it goes on."""
    changed = settings.model_copy(update={"bundle": (write_paper_bundle(tmp_path / "paper"),)})
    visibility_s = 4.0
    workers: list[JobConsumer] = [open_consumer(("paper",), visibility_timeout_s=visibility_s) for _ in range(2)]
    assert server.process is not None
    with live_server(create_app(changed)) as url:
        async with httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(25)) as client:
            await client.post("/generate", json={"prompt": "a"}, headers={"Prefer": "respond-async"})
            [claim] = await asyncio.to_thread(workers[0].claim, 1, 60.0)
            server.process.send_signal(signal.SIGSTOP)
            try:
                metrics, ready, made = await asyncio.gather(
                    client.get("/metrics"), client.get("/readyz"), client.post("/generate", json={"prompt": "a"})
                )
                assert metrics.status_code == 200 and "giantleap_queue_reachable 0" in metrics.text
                assert ready.status_code == 503 and "has not answered" in ready.json()["detail"]
                assert made.status_code == 503 and made.json()["retryable"]
                await asyncio.sleep(1.5 * visibility_s)
            finally:
                server.process.send_signal(signal.SIGCONT)
            assert all(other.job.id != claim.job.id for other in await asyncio.to_thread(workers[1].claim, 8, 0.0))
            assert await asyncio.to_thread(workers[0].complete, claim, [(PNG, b"png")], {}, [])


def test_a_claim_whose_reply_was_lost_comes_again_and_counts_once(
    settings: Settings, make_job: Any, open_consumer: Any, open_producer: ProducerOpener
) -> None:
    async def enqueue() -> str:
        async with open_producer() as producer:
            return (await producer.enqueue(make_job())).job_id

    job_id = asyncio.run(enqueue())
    worker: JobConsumer = open_consumer(visibility_timeout_s=60.0)
    worker._claimer._send(1, worker._claimer.lanes(), None)
    for _ in range(settings.max_deliveries):
        worker._claimer._send(1, worker._claimer.lanes(), None)
    [claim] = worker.claim(1, 60.0)
    assert (claim.job.id, claim.delivery) == (job_id, 1)
    assert worker.claim(1, 0.0) == []


@pytest.mark.parametrize(
    ("login", "rest", "says"),
    [
        ("nobody:wrong@", "/0", "refuses the login"),
        ("", "/99", "no database"),
        ("reader:secret@", "/0", "lacks a permission"),
        ("", "/0?decode_responses=True", "decode_responses"),
        ("", "/0?frobnicate=1", "frobnicate"),
        ("", "/zero", "not a number"),
    ],
)
def test_what_no_retry_mends_is_one_clear_line_at_the_start(
    login: str, rest: str, says: str, server: Server, settings: Settings
) -> None:
    server.client.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~*", "+get", "+ping")
    with pytest.raises(BadConfiguration, match=says) as refused:
        check_url(f"redis://{login}127.0.0.1:{server.port}{rest}", settings)
    assert "secret" not in refused.value.detail and "\n" not in refused.value.detail


async def test_events_are_read_by_protocol_3_too(
    server: Server, settings: Settings, make_job: Any, open_producer: ProducerOpener
) -> None:
    async with open_producer(redis_url=f"redis://127.0.0.1:{server.port}/0?protocol=3") as producer:
        job = make_job()
        await producer.enqueue(job)
        await producer.cancel(job.id)
        assert [event.name async for event in producer.events(job.id)] == ["queued", "done"]


def test_a_stop_ends_the_wait_for_a_server_that_is_away(settings: Settings) -> None:
    stop = threading.Event()
    worker = JobConsumer(open_redis("redis://127.0.0.1:1/0"), settings, ["pocket"], "w", stop=stop)
    failed: list[NotReady] = []

    def start() -> None:
        try:
            worker.open()
        except NotReady as error:
            failed.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    stop.set()
    thread.join(30)
    assert not thread.is_alive() and "ConnectionError" in str(failed[0])


@pytest.mark.parametrize(("policy", "appendonly"), [("allkeys-lru", "yes"), ("noeviction", "no")])
async def test_a_server_that_may_lose_accepted_jobs_is_warned_of(
    policy: str, appendonly: str, server: Server, settings: Settings, open_producer: ProducerOpener, caplog: Any
) -> None:
    server.client.config_set("maxmemory-policy", policy)
    server.client.config_set("appendonly", appendonly)
    try:
        async with open_producer() as producer:
            [warning] = producer.warnings
        check_url(str(settings.redis_url), settings)
        assert warning in caplog.text
        assert ("evicts" in warning) is (policy != "noeviction") and ("append-only" in warning) is (appendonly == "no")
    finally:
        server.client.config_set("maxmemory-policy", "noeviction")
        server.client.config_set("appendonly", "yes")
    async with open_producer() as producer:
        assert producer.warnings == ()


@pytest.mark.parametrize("skew_s", [-3600.0, 3600.0])
async def test_a_wrong_clock_of_a_host_changes_no_time_of_a_job(
    skew_s: float, server: Server, make_job: Any, open_producer: ProducerOpener, open_consumer: Any
) -> None:
    seconds, _ = server.client.time()
    worker: JobConsumer = open_consumer()
    async with open_producer() as producer:
        job = make_job()
        skewed = dataclasses.replace(job, created_at_s=job.created_at_s + skew_s)
        enqueued = await producer.enqueue(skewed)
        [claim] = await asyncio.to_thread(worker.claim, 1, 60.0)
        record = await producer.get(job.id)
        assert record is not None and enqueued.created_at_s == record.job.created_at_s
        assert abs(record.job.created_at_s - seconds) < 600
        assert 0 <= claim.waited_s <= claim.age_s() < 600
        assert 0 <= record.stages_s["queue"] < 600
        assert await asyncio.to_thread(worker.complete, claim, [], {}, [])
        ended = await producer.wait(job.id, 60.0, skewed)
        assert ended.job.created_at_s == record.job.created_at_s
