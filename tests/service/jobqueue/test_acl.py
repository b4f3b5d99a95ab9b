"""The access rule in `deploy/redis/giantleap.acl`: it grants what the code calls, nothing else, and that is enough."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from giantleap.service.jobqueue import scripts
from giantleap.service.jobqueue.server import check_url
from giantleap.service.jobs.job import JobError, JobState, Priority, ResultFile
from giantleap.service.settings import Settings
from tests.ports import free_ports
from tests.redis_fixtures import ConsumerOpener, ProducerOpener
from tests.service.redis_groups import Server

ROOT = Path(__file__).resolve().parents[3]
RULE = next(line for line in (ROOT / "deploy/redis/giantleap.acl").read_text().splitlines() if line.startswith("user "))
# What Python sends besides the scripts' commands.
SENT = {"evalsha", "script|load", "get", "set", "hget", "hset", "pexpire", "xread", "ping", "select"}
SENT |= {"subscribe", "unsubscribe"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("acl") / "server", free_ports(1)[0])
    started.start()
    yield started
    started.kill()


@pytest.fixture
def redis_url(server: Server, key_prefix: str) -> str:
    """The URL of a user with the rule of the file, for the keys of the test."""
    _, name, *rules = RULE.replace("{giantleap}", f"{{{key_prefix}}}").replace("CHANGE-ME", "secret").split()
    server.client.execute_command("ACL", "SETUSER", name, "reset", *rules)
    return f"redis://{name}:secret@127.0.0.1:{server.port}/0"


def test_the_rule_grants_the_commands_of_the_code_and_no_others() -> None:
    called = set()
    for path in (ROOT / "service/jobqueue/lua").rglob("*.lua"):
        for name, part in re.findall(r"redis\.p?call\('([A-Z]+)'(?:, '([A-Z]+)')?", path.read_text()):
            called.add(f"{name}|{part}".lower() if name in ("XGROUP", "XINFO") else name.lower())
    assert set(re.findall(r" \+(\S+)", RULE)) == called | SENT


async def test_the_whole_life_of_jobs_passes_under_the_rule(
    redis_url: str, settings: Settings, make_job: Any, open_producer: ProducerOpener, open_consumer: ConsumerOpener
) -> None:
    check_url(redis_url, settings)
    worker = await asyncio.to_thread(open_consumer)
    async with open_producer() as producer:
        await producer.read_warnings()
        jobs = [make_job(priority) for priority in (Priority.HIGH, Priority.HIGH, Priority.LOW)]
        for job in jobs:
            await producer.enqueue(job, b"input", idempotency_key=job.id, max_live=5)
        assert await producer.acquire_rate_limit("ann", 60) == 0
        claims = [(await asyncio.to_thread(worker.claim, 1, 60.0))[0] for _ in jobs]
        await asyncio.to_thread(worker.emit, claims[0], "step", {"step": 1, "steps": 4})
        await asyncio.to_thread(worker.release, [claims[2]])
        assert await asyncio.to_thread(worker.complete, claims[0], [(ResultFile("a", 1), b"a")], {}, [])
        assert await asyncio.to_thread(worker.fail, claims[1], JobError("job_failed", "no"))
        assert (await producer.wait(jobs[0].id, 60)).state is JobState.SUCCEEDED
        assert await producer.read_result(jobs[0].id, 0) == b"a"
        assert [event.name async for event in producer.events(jobs[1].id)][-1] == "done"
        assert await producer.cancel(jobs[2].id) is not None
        assert len((await producer.list_jobs("")).records) == 3
        assert (await producer.stats()).live_workers == 1
        await producer.run(scripts.TAKE_WEBHOOKS, {"max_deliveries": 1, "lease_ms": 1, "max_attempts": 1})
        assert (await producer.run(scripts.LIST_DEAD_LETTERS, {"max_jobs": 1})).letters
        await producer.delete(jobs[0].id)
